package apply

import (
	"encoding/json"
	"fmt"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// recordSQL stores outcomes. One statement for a batch: $1 is a JSON array of record.
const recordSQL = `INSERT INTO duri.conflict (kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change,
	remote_time, remote_row, local_site, local_time, local_row)
SELECT kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change,
	remote_time, remote_row, local_site, local_time, local_row
FROM pg_catalog.jsonb_to_recordset($1::jsonb) AS r(kind text, code text, table_schema text, table_name text, key jsonb,
	origin int2, origin_lsn pg_lsn, origin_xid int8, change int4, remote_time timestamptz, remote_row jsonb,
	local_site int2, local_time timestamptz, local_row jsonb)`

// record is one row of duri.conflict: a conflict when Kind is set, else an exception of the applier.
type record struct {
	Kind       string          `json:"kind"`
	Code       string          `json:"code"`
	Schema     string          `json:"table_schema"`
	Table      string          `json:"table_name"`
	Key        json.RawMessage `json:"key"`
	Origin     wal.SiteID      `json:"origin"`
	LSN        wal.LSN         `json:"origin_lsn"`
	XID        uint32          `json:"origin_xid"`
	Change     int             `json:"change"`
	RemoteTime string          `json:"remote_time"`
	RemoteRow  json.RawMessage `json:"remote_row"`
	LocalSite  *wal.SiteID     `json:"local_site"`
	LocalTime  *string         `json:"local_time"`
	LocalRow   json.RawMessage `json:"local_row"`

	entry  *entry      // whose outcome this is, while the batch is worked on
	change *wal.Change // likewise
}

// newRecord writes down an outcome.
func newRecord(g *target, o outcome) record {
	r := o.ref
	rec := record{
		change: r.change,
		Kind:   string(o.decision.Kind), Code: string(o.decision.Code),
		Schema: g.schema, Table: g.name, Origin: r.txn.Origin, LSN: r.txn.CommitLSN, XID: r.txn.XID,
		Change: int(r.num), RemoteTime: r.txn.VersionTime.String(), RemoteRow: rowJSON(g.rel, r.row),
	}
	keyFrom := r.row
	if keyFrom == nil {
		keyFrom = r.change.Old
	}
	rec.Key = keyJSON(g, keyFrom)
	if o.rival.Existence != conflict.Absent && o.rival.Version != (wal.Version{}) {
		site, t := o.rival.Version.Site, o.rival.Version.Time.String()
		rec.LocalSite, rec.LocalTime = &site, &t
	}
	rec.LocalRow = rowJSON(g.rel, o.rival.image)
	return rec
}

// rowJSON writes an image as an object of texts; unchanged and omitted columns are left out.
func rowJSON(rel *wal.Relation, row wal.Tuple) json.RawMessage {
	if row == nil {
		return nil
	}
	b := []byte{'{'}
	for i, v := range row {
		if v.Kind == wal.Unchanged || v.Kind == wal.Omitted {
			continue
		}
		b = appendMember(b, rel.Columns[i].Name, v)
	}
	return append(b, '}')
}

func keyJSON(g *target, row wal.Tuple) json.RawMessage {
	if row == nil || len(g.key) == 0 {
		return nil
	}
	b := []byte{'{'}
	for _, k := range g.key {
		b = appendMember(b, g.rel.Columns[k.at].Name, row[k.at])
	}
	return append(b, '}')
}

func appendMember(b []byte, name string, v wal.Value) []byte {
	if len(b) > 1 {
		b = append(b, ',')
	}
	n, _ := json.Marshal(name) // strings always marshal
	b = append(append(b, n...), ':')
	if v.Kind == wal.Null {
		return append(b, "null"...)
	}
	s, _ := json.Marshal(string(v.Data))
	return append(b, s...)
}

// appliedSQL notes which transactions were merged, in the same transaction as their effects (rule 4; archive.md
// section 3): origin, from, to, min time, max time, transactions, changes, records, seen of this site, seen of others.
const appliedSQL = `INSERT INTO duri.applied (xid, origin, from_lsn, to_lsn, min_time, max_time, transactions, changes, records, seen, seen_others)
VALUES (pg_catalog.pg_current_xact_id(), $1::int2, $2::pg_lsn, $3::pg_lsn, $4::timestamptz, $5::timestamptz, $6::int4, $7::int4, $8::int4, $9::pg_lsn, $10::jsonb)`

func appliedParams(b *batch, origin, site wal.SiteID, records int) [][]byte {
	last := b.txns[len(b.txns)-1]
	others := []byte{'{'}
	for _, s := range last.Seen {
		if s.Site == site {
			continue
		}
		if len(others) > 1 {
			others = append(others, ',')
		}
		others = fmt.Appendf(others, `"%d":"%s"`, s.Site, s.LSN)
	}
	return [][]byte{
		fmt.Append(nil, origin), []byte(b.from().String()), []byte(b.to().String()),
		[]byte(b.minTime.String()), []byte(b.maxTime.String()),
		fmt.Append(nil, len(b.txns)), fmt.Append(nil, b.changes), fmt.Append(nil, records), []byte(last.SeenOf(site).String()),
		append(others, '}'),
	}
}

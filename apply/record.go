package apply

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// recordSQL stores outcomes, one statement for a batch: an array for each column. duri.conflict is written at the pace of
// conflicts, and this is the cheapest way to do it in one statement.
const recordSQL = `INSERT INTO duri.conflict (kind, code, table_schema, table_name, key, origin, origin_lsn, origin_xid, change,
	remote_time, remote_row, local_site, local_time, local_row)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::int2[], $7::pg_lsn[], $8::int8[], $9::int4[],
	$10::timestamptz[], $11::jsonb[], $12::int2[], $13::timestamptz[], $14::jsonb[])`

// recordParams are the parameters of recordSQL.
func recordParams(records []record) [][]byte {
	cols := make([][]byte, 14)
	for i := range cols {
		cols[i] = append(make([]byte, 0, 24*len(records)), '{')
	}
	for n, r := range records {
		values := [...]wal.Value{
			textOf(r.Kind), textOf(r.Code), textOf(r.Schema), textOf(r.Table), orNull(r.Key),
			{Kind: wal.Text, Data: strconv.AppendUint(nil, uint64(r.Origin), 10)},
			textOf(r.LSN.String()),
			{Kind: wal.Text, Data: strconv.AppendUint(nil, uint64(r.XID), 10)},
			{Kind: wal.Text, Data: strconv.AppendInt(nil, int64(r.Change), 10)},
			textOf(r.RemoteTime), orNull(r.RemoteRow),
			{Kind: wal.Null},
			{Kind: wal.Null},
			orNull(r.LocalRow),
		}
		if r.LocalSite != nil {
			values[11] = wal.Value{Kind: wal.Text, Data: strconv.AppendUint(nil, uint64(*r.LocalSite), 10)}
		}
		if r.LocalTime != nil {
			values[12] = textOf(*r.LocalTime)
		}
		for i, v := range values {
			if n > 0 {
				cols[i] = append(cols[i], ',')
			}
			cols[i] = appendElement(cols[i], v)
		}
	}
	for i := range cols {
		cols[i] = append(cols[i], '}')
	}
	return cols
}

func textOf(s string) wal.Value { return wal.Value{Kind: wal.Text, Data: []byte(s)} }

// orNull is a JSON document, or NULL for none.
func orNull(doc []byte) wal.Value {
	if doc == nil {
		return wal.Value{Kind: wal.Null}
	}
	return wal.Value{Kind: wal.Text, Data: doc}
}

// record is one row of duri.conflict: a conflict when Kind is set, else an exception of the applier.
type record struct {
	Kind       string
	Code       string
	Schema     string
	Table      string
	Key        json.RawMessage
	Origin     wal.SiteID
	LSN        wal.LSN
	XID        uint32
	Change     int
	RemoteTime string
	RemoteRow  json.RawMessage
	LocalSite  *wal.SiteID
	LocalTime  *string
	LocalRow   json.RawMessage

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

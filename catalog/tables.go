package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// Table is a table of the database as replication sees it. A partitioned table stands for its partitions: their rows,
// conflicts and replica identities count as its own.
type Table struct {
	Schema      string `json:"schema"`
	Name        string `json:"table"`
	Partitioned bool   `json:"partitioned"`
	PartitionOf string `json:"partition_of,omitempty"` // the topmost table

	Replicated bool   `json:"replicated"`
	Why        string `json:"why,omitempty"` // why it is not

	Key       []string `json:"key"`        // columns by which rows are found at the other sites
	KeySource string   `json:"key_source"` // primary key, replica identity index, or none
	Identity  string   `json:"identity"`   // replica identity: default, nothing, full, index; mixed among partitions

	Mode         policy.Mode `json:"mode"`
	Delta        []string    `json:"delta"`
	PolicySource string      `json:"policy_source"` // duri.yaml, sql, or default
	Overridden   bool        `json:"overridden"`    // duri.set_policy declares it too, which does not count

	ForeignKeys []ForeignKey `json:"foreign_keys"`
	Uniques     []Unique     `json:"uniques"`
	Notes       []Note       `json:"notes"` // what to know, or to do

	Rows      int64 `json:"rows"`          // estimate of the statistics
	Conflicts int64 `json:"conflicts_24h"` // recorded at this site in the last 24 hours

	facts policy.Facts
}

// ForeignKey is a foreign key constraint of a table (the child).
type ForeignKey struct {
	Name       string         `json:"name"`
	Columns    []string       `json:"columns"`
	References string         `json:"references"` // the parent
	Referenced []string       `json:"referenced_columns"`
	Match      string         `json:"match"` // simple or full
	Orphans    policy.Orphans `json:"orphans"`
	// Checked says that orphans are looked for. They are not where PostgreSQL itself does not insist: NOT VALID, NOT
	// ENFORCED.
	Checked bool  `json:"checked"`
	Open    int64 `json:"open_orphans"` // known orphans that nothing was done about (duri.orphan)
}

// Unique is a unique or exclusion constraint, or a unique index, besides the key.
type Unique struct {
	Name       string `json:"name"`
	Kind       string `json:"kind"` // unique or exclusion
	Definition string `json:"definition"`
	// Parkable says that of two rows that collide the one with the lesser version can be set aside until the other gives
	// way (rule 11): it takes a key to know the row by.
	Parkable bool   `json:"parkable"`
	Why      string `json:"why,omitempty"` // why not
}

// Note is something to know of a table, with advice.
type Note struct {
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
}

// FullName is the table's name as policies spell it.
func (t Table) FullName() policy.Name { return policy.Name{Schema: t.Schema, Table: t.Name} }

// Facts are what policy.Check needs of the table.
func (t Table) Facts() policy.Facts { return t.facts }

// tablesSQL describes every table of user schemas, one JSON document a row, without what is duri's own.
//
// Of a partitioned table, "leaves" are the partitions that hold rows; of another, itself. The key is the one that apply
// finds rows by. to_jsonb of a constraint tells conenforced, which PostgreSQL has from 18 on.
const tablesSQL = `
WITH covered AS (
	SELECT c.oid FROM pg_catalog.pg_publication_tables p
	JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
	JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename
	WHERE p.pubname = 'duri'
), t AS (
	SELECT c.*, n.nspname,
		ARRAY(SELECT l.relid::oid FROM pg_catalog.pg_partition_tree(c.oid) l WHERE l.isleaf AND c.relkind = 'p'
			UNION ALL SELECT c.oid WHERE c.relkind <> 'p') AS leaves,
		CASE WHEN c.relispartition THEN pg_catalog.pg_partition_root(c.oid)::oid ELSE 0 END AS root
	FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind IN ('r', 'p', 'f') AND c.relpersistence <> 't'
		AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'duri')
)
SELECT pg_catalog.jsonb_build_object(
	'schema', t.nspname, 'name', t.relname, 'kind', t.relkind, 'unlogged', t.relpersistence = 'u',
	'root', (SELECT pg_catalog.jsonb_build_object('schema', n.nspname, 'table', c.relname)
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = t.root),
	'published', EXISTS (SELECT FROM covered WHERE covered.oid = t.oid)
		OR EXISTS (SELECT FROM pg_catalog.pg_partition_ancestors(t.oid) a JOIN covered ON covered.oid = a.relid)
		OR t.relkind = 'p' AND NOT EXISTS (SELECT FROM unnest(t.leaves) l WHERE l NOT IN (SELECT oid FROM covered))
			AND (t.leaves <> '{}' OR EXISTS (SELECT FROM pg_catalog.pg_publication_namespace pn JOIN pg_catalog.pg_publication p ON p.oid = pn.pnpubid
				WHERE p.pubname = 'duri' AND pn.pnnspid = t.relnamespace)),
	'filtered', EXISTS (SELECT FROM pg_catalog.pg_publication_rel pr JOIN pg_catalog.pg_publication p ON p.oid = pr.prpubid
		WHERE p.pubname = 'duri' AND pr.prrelid = t.oid AND (pr.prqual IS NOT NULL OR pr.prattrs IS NOT NULL)),
	'rows', (SELECT coalesce(sum(CASE WHEN c.reltuples >= 0 THEN c.reltuples::numeric
			ELSE pg_catalog.pg_stat_get_live_tuples(c.oid)::numeric END), 0)::int8
		FROM unnest(t.leaves) l JOIN pg_catalog.pg_class c ON c.oid = l),
	'identities', (SELECT pg_catalog.jsonb_agg(DISTINCT c.relreplident) FROM unnest(t.leaves) l JOIN pg_catalog.pg_class c ON c.oid = l),
	'not_full', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('schema', n.nspname, 'table', c.relname)
			ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C")
		FROM unnest(t.leaves) l JOIN pg_catalog.pg_class c ON c.oid = l JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND c.relreplident <> 'f'),
	'members', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('schema', n.nspname, 'table', c.relname))
		FROM unnest(t.leaves) l JOIN pg_catalog.pg_class c ON c.oid = l JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace),
	'primary', ix.indisprimary, 'key_deferrable', NOT ix.indimmediate,
	'key', (SELECT pg_catalog.jsonb_agg(a.attname ORDER BY k) FROM pg_catalog.generate_series(0, ix.indnkeyatts - 1) k
		JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = (ix.indkey::int2[])[k]),
	'columns', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
			'name', a.attname, 'type', pg_catalog.format_type(a.atttypid, a.atttypmod), 'generated', a.attgenerated <> '',
			'base', (WITH RECURSIVE d AS (
				SELECT y.oid, y.typbasetype FROM pg_catalog.pg_type y WHERE y.oid = a.atttypid
				UNION ALL SELECT y.oid, y.typbasetype FROM d JOIN pg_catalog.pg_type y ON y.oid = d.typbasetype
			) SELECT d.oid::int8 FROM d WHERE d.typbasetype = 0),
			'unique', coalesce((SELECT min(ic.relname) FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
				WHERE i.indrelid = t.oid AND (i.indisunique OR i.indisexclusion)
					AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])), ''),
			'checked', coalesce((SELECT min(con.conname) FROM pg_catalog.pg_constraint con
				WHERE con.conrelid = t.oid AND con.contype = 'c' AND a.attnum = ANY (con.conkey)), '')
		) ORDER BY a.attnum) FROM pg_catalog.pg_attribute a WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped),
	'foreign_keys', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
			'name', con.conname, 'parent', pg_catalog.jsonb_build_object('schema', pn.nspname, 'table', p.relname),
			'full', con.confmatchtype = 'f', 'valid', con.convalidated,
			'enforced', coalesce((pg_catalog.to_jsonb(con) ->> 'conenforced')::bool, true),
			'columns', (SELECT pg_catalog.jsonb_agg(a.attname ORDER BY k.ord) FROM unnest(con.conkey) WITH ORDINALITY AS k(num, ord)
				JOIN pg_catalog.pg_attribute a ON a.attrelid = con.conrelid AND a.attnum = k.num),
			'referenced', (SELECT pg_catalog.jsonb_agg(a.attname ORDER BY k.ord) FROM unnest(con.confkey) WITH ORDINALITY AS k(num, ord)
				JOIN pg_catalog.pg_attribute a ON a.attrelid = con.confrelid AND a.attnum = k.num)
		) ORDER BY con.conname COLLATE "C")
		FROM pg_catalog.pg_constraint con JOIN pg_catalog.pg_class p ON p.oid = con.confrelid
		JOIN pg_catalog.pg_namespace pn ON pn.oid = p.relnamespace
		WHERE con.conrelid = t.oid AND con.contype = 'f' AND con.conparentid = 0),
	'uniques', (SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
			'name', ic.relname, 'exclusion', i.indisexclusion,
			'definition', coalesce((SELECT pg_catalog.pg_get_constraintdef(con.oid) FROM pg_catalog.pg_constraint con
				WHERE con.conindid = i.indexrelid AND con.contype IN ('u', 'x') LIMIT 1), pg_catalog.pg_get_indexdef(i.indexrelid))
		) ORDER BY ic.relname COLLATE "C")
		FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class ic ON ic.oid = i.indexrelid
		WHERE i.indrelid = t.oid AND (i.indisunique OR i.indisexclusion) AND i.indisready AND i.indexrelid IS DISTINCT FROM ix.indexrelid
			AND NOT i.indisprimary)
)
FROM t LEFT JOIN LATERAL (
	SELECT i.* FROM pg_catalog.pg_index i WHERE i.indrelid = t.oid AND i.indisvalid AND (i.indisprimary OR i.indisreplident)
	ORDER BY i.indisreplident DESC LIMIT 1
) ix ON true
ORDER BY t.nspname COLLATE "C", t.relname COLLATE "C"`

// tableDoc is a row of tablesSQL.
type tableDoc struct {
	Schema        string          `json:"schema"`
	Name          string          `json:"name"`
	Kind          string          `json:"kind"`
	Unlogged      bool            `json:"unlogged"`
	Root          *policy.Name    `json:"root"`
	Published     bool            `json:"published"`
	Filtered      bool            `json:"filtered"`
	Rows          int64           `json:"rows"`
	Identities    []string        `json:"identities"`
	NotFull       []policy.Name   `json:"not_full"`
	Members       []policy.Name   `json:"members"`
	Primary       bool            `json:"primary"`
	KeyDeferrable bool            `json:"key_deferrable"`
	Key           []string        `json:"key"`
	Columns       []policy.Column `json:"columns"`
	ForeignKeys   []fkDoc         `json:"foreign_keys"`
	Uniques       []uniqueDoc     `json:"uniques"`
}

type fkDoc struct {
	Name       string      `json:"name"`
	Parent     policy.Name `json:"parent"`
	Full       bool        `json:"full"`
	Valid      bool        `json:"valid"`
	Enforced   bool        `json:"enforced"`
	Columns    []string    `json:"columns"`
	Referenced []string    `json:"referenced"`
}

type uniqueDoc struct {
	Name       string `json:"name"`
	Exclusion  bool   `json:"exclusion"`
	Definition string `json:"definition"`
}

// policySources are the declarations, together and by where they were made.
type policySources struct {
	effective, file, sql policy.Set
}

// Tables describes every table of the database, sorted by name, partitions too. file is what duri.yaml declares; what
// duri.set_policy declares is read here. schemas are those that are replicated; empty: all user schemas.
func Tables(ctx context.Context, c *pgconn.PgConn, schemas []string, file policy.Set) ([]Table, error) {
	sql, err := Policies(ctx, c)
	if err != nil {
		return nil, err
	}
	docs, err := readTables(ctx, c)
	if err != nil {
		return nil, err
	}
	conflicts, err := recentConflicts(ctx, c)
	if err != nil {
		return nil, err
	}
	orphans, err := openOrphans(ctx, c)
	if err != nil {
		return nil, err
	}
	effective, _ := policy.Merge(file, sql)
	from := policySources{effective, file, sql}
	out := make([]Table, len(docs))
	for i, d := range docs {
		out[i] = d.table(schemas, from)
		for _, m := range d.Members {
			out[i].Conflicts += conflicts[m]
		}
		for j := range out[i].ForeignKeys {
			k := &out[i].ForeignKeys[j]
			k.Open = orphans[constraintName{d.name(), k.Name}]
		}
	}
	return out, nil
}

// TableFacts reads what policy.Check needs of the given tables; one that does not exist is Missing. It does not need
// duri's own tables, so that it can be asked before Migrate.
func TableFacts(ctx context.Context, c *pgconn.PgConn, names []policy.Name) ([]policy.Facts, error) {
	docs, err := readTables(ctx, c)
	if err != nil {
		return nil, err
	}
	out := make([]policy.Facts, len(names))
	for i, n := range names {
		at := slices.IndexFunc(docs, func(d tableDoc) bool { return d.name() == n })
		if out[i] = (policy.Facts{Name: n, Missing: true}); at >= 0 {
			out[i] = docs[at].facts()
		}
	}
	return out, nil
}

func readTables(ctx context.Context, c *pgconn.PgConn) ([]tableDoc, error) {
	rows, err := pg.Rows(ctx, c, tablesSQL)
	if err != nil {
		return nil, fmt.Errorf("read the tables: %w", err)
	}
	docs := make([]tableDoc, len(rows))
	for i, r := range rows {
		if err := json.Unmarshal([]byte(r[0]), &docs[i]); err != nil {
			return nil, fmt.Errorf("read the tables: %w", err)
		}
	}
	return docs, nil
}

// recentConflicts counts the conflicts of the last 24 hours by table.
func recentConflicts(ctx context.Context, c *pgconn.PgConn) (map[policy.Name]int64, error) {
	out := map[policy.Name]int64{}
	err := counted(ctx, c, `SELECT count(*), table_schema, table_name FROM duri.conflict
		WHERE kind <> '' AND at > pg_catalog.now() - interval '24 hours' GROUP BY table_schema, table_name`, func(r []string, n int64) {
		out[policy.Name{Schema: r[1], Table: r[2]}] = n
	})
	return out, err
}

// constraintName names a foreign key constraint by its child.
type constraintName struct {
	table policy.Name
	name  string
}

// openOrphans counts recorded orphans by constraint.
func openOrphans(ctx context.Context, c *pgconn.PgConn) (map[constraintName]int64, error) {
	out := map[constraintName]int64{}
	err := counted(ctx, c, `SELECT count(*), table_schema, table_name, constraint_name FROM duri.orphan
		GROUP BY table_schema, table_name, constraint_name`, func(r []string, n int64) {
		out[constraintName{policy.Name{Schema: r[1], Table: r[2]}, r[3]}] = n
	})
	return out, err
}

// counted calls f with each row of a query whose first column is a count.
func counted(ctx context.Context, c *pgconn.PgConn, sql string, f func(row []string, n int64)) error {
	rows, err := pg.Rows(ctx, c, sql)
	if err != nil {
		return fmt.Errorf("count by table: %w", err)
	}
	for _, r := range rows {
		n, err := strconv.ParseInt(r[0], 10, 64)
		if err != nil {
			return fmt.Errorf("count by table: %w", err)
		}
		f(r, n)
	}
	return nil
}

func (d tableDoc) name() policy.Name { return policy.Name{Schema: d.Schema, Table: d.Name} }

func (d tableDoc) facts() policy.Facts {
	f := policy.Facts{Name: d.name(), Missing: d.Kind == "f", Keyed: len(d.Key) > 0, NotFull: d.NotFull, Columns: d.Columns}
	if d.Root != nil {
		f.PartitionOf = *d.Root
	}
	for _, k := range d.ForeignKeys {
		f.ForeignKeys = append(f.ForeignKeys, k.Name)
	}
	return f
}

// table describes a table for people. It is pure.
func (d tableDoc) table(schemas []string, from policySources) Table {
	p := from.effective.Of(d.Schema, d.Name)
	t := Table{
		Schema: d.Schema, Name: d.Name, Partitioned: d.Kind == "p", Rows: d.Rows,
		Key: append([]string{}, d.Key...), KeySource: "none", Identity: d.identity(),
		Mode: p.Mode, Delta: append([]string{}, p.Delta...), ForeignKeys: []ForeignKey{}, Uniques: []Unique{}, Notes: []Note{},
		facts: d.facts(),
	}
	switch {
	case d.Primary:
		t.KeySource = "primary key"
	case len(d.Key) > 0:
		t.KeySource = "replica identity index"
	}
	declared := d.name()
	if d.Root != nil {
		t.PartitionOf, declared = d.Root.String(), *d.Root
	}
	t.PolicySource, t.Overridden = from.of(declared)
	for _, k := range d.ForeignKeys {
		match := "simple"
		if k.Full {
			match = "full"
		}
		t.ForeignKeys = append(t.ForeignKeys, ForeignKey{
			Name: k.Name, Columns: k.Columns, References: k.Parent.String(), Referenced: k.Referenced,
			Match: match, Orphans: p.Orphans(k.Name), Checked: k.Valid && k.Enforced,
		})
	}
	for _, u := range d.Uniques {
		t.Uniques = append(t.Uniques, d.unique(u))
	}
	why := d.why(schemas)
	t.Replicated, t.Why = why.Text == "", why.Text
	if why.Hint != "" {
		t.Notes = append(t.Notes, why)
	}
	if t.Replicated {
		t.Notes = append(t.Notes, d.notes(p)...)
	}
	return t
}

func (from policySources) of(n policy.Name) (source string, overridden bool) {
	switch {
	case from.file.Declares(n):
		return "duri.yaml", from.sql.Declares(n)
	case from.sql.Declares(n):
		return "sql", false
	}
	return "default", false
}

// why tells why a table is not replicated, if so.
func (d tableDoc) why(schemas []string) Note {
	switch {
	case d.Kind == "f":
		return Note{"a foreign table: its rows are elsewhere", ""}
	case d.Unlogged:
		return Note{"unlogged: its rows are not in the WAL", "ALTER TABLE " + d.name().SQL() + " SET LOGGED, if they matter at other sites"}
	case d.Published:
		return Note{}
	case len(schemas) > 0 && !slices.Contains(schemas, d.Schema):
		return Note{"its schema is not among those of duri.yaml", "add " + d.Schema + " to schemas in duri.yaml and run the SQL of `duri grants` again"}
	}
	return Note{"publication duri does not cover it", "run the SQL that `duri grants` prints as superuser in this database"}
}

func (d tableDoc) identity() string {
	words := map[string]string{"d": "default", "n": "nothing", "f": "full", "i": "index"}
	if len(d.Identities) > 1 {
		return "mixed"
	}
	return words[strings.Join(d.Identities, "")]
}

func (d tableDoc) unique(u uniqueDoc) Unique {
	out := Unique{Name: u.Name, Kind: "unique", Definition: u.Definition, Parkable: len(d.Key) > 0}
	if u.Exclusion {
		out.Kind = "exclusion"
	}
	if !out.Parkable {
		out.Why = "the table has no key to know its rows by"
	}
	return out
}

// notes says what to know of a replicated table.
func (d tableDoc) notes(p policy.Table) []Note {
	var out []Note
	full := "ALTER TABLE " + d.name().SQL() + " REPLICA IDENTITY FULL"
	switch {
	case d.Filtered:
		out = append(out, Note{"publication duri has a row filter or a column list for it, so sites would differ", "ALTER PUBLICATION duri DROP TABLE " + d.name().SQL()})
	case len(d.Key) == 0 && d.identity() == "full":
		out = append(out, Note{"without a key rows are matched whole, and concurrent updates of one row leave two", "add a primary key, if there is one"})
	case len(d.Key) == 0:
		out = append(out, Note{"without a key only INSERT replicates, and PostgreSQL refuses UPDATE and DELETE", "add a primary key, or " + full})
	case d.KeyDeferrable:
		out = append(out, Note{"its key is DEFERRABLE, which PostgreSQL does not take as replica identity", "make the key NOT DEFERRABLE, or " + full})
	}
	if d.Root == nil { // a partition's policy is looked at with the whole
		for _, problem := range append(policy.Check(p, d.facts()), policy.Warnings(p, d.facts())...) {
			if problem.Code != policy.CodeKey || p.NeedsFull() {
				out = append(out, Note{problem.Text, problem.Hint})
			}
		}
	}
	return out
}

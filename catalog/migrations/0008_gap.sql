-- Holes between two sites: what one of them had written and the other never received, because its origin had to let go of it.
CREATE TABLE duri.gap (
	id          int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	origin      int2 NOT NULL,
	peer        int2 NOT NULL,
	from_lsn    pg_lsn NOT NULL,
	to_lsn      pg_lsn NOT NULL,
	reason      text NOT NULL,
	declared_at timestamptz NOT NULL DEFAULT now(),
	passes      int4 NOT NULL DEFAULT 0,
	written     int8 NOT NULL DEFAULT 0,
	removed     int8 NOT NULL DEFAULT 0,
	repaired_at timestamptz,
	seen_lsn    pg_lsn,
	resume_lsn  pg_lsn
);
CREATE UNIQUE INDEX gap_open ON duri.gap (origin, peer) WHERE repaired_at IS NULL;
COMMENT ON TABLE duri.gap IS 'holes between two sites, at both: what origin wrote from from_lsn to to_lsn, peer never received; peer makes its rows equal to those of origin';
COMMENT ON COLUMN duri.gap.passes IS 'how often the tables were compared, at the peer; written and removed count the rows that were made equal';
COMMENT ON COLUMN duri.gap.resume_lsn IS 'at the peer: its transactions beyond it, in its own WAL, have seen origin up to seen_lsn';

-- What was written over to close a gap.
CREATE TABLE duri.gap_row (
	id           int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	gap          int8 NOT NULL REFERENCES duri.gap ON DELETE CASCADE,
	at           timestamptz NOT NULL DEFAULT now(),
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	key          jsonb,
	before       jsonb,
	after        jsonb,
	copies       int8,
	want         int8,
	done         bool NOT NULL DEFAULT false
);
CREATE INDEX gap_row_gap ON duri.gap_row (gap, id);
COMMENT ON TABLE duri.gap_row IS 'every row that closing a gap wrote here, before and after; written down first: without done it may not have been written';
COMMENT ON COLUMN duri.gap_row.copies IS 'for a table without a key: how often the row was there, and how often it shall be';

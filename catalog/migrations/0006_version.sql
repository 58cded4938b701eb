-- Versions of rows that were last written for a change that is not the row's newest one: an older change can still
-- contribute to a delta column, or to a column that no newer change touched.
CREATE TABLE duri.version (
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	key_norm     bytea NOT NULL,
	xid          xid8 NOT NULL,
	site         int2 NOT NULL,
	time         timestamptz NOT NULL,
	end_lsn      pg_lsn NOT NULL,
	PRIMARY KEY (table_schema, table_name, key_norm)
);
COMMENT ON TABLE duri.version IS 'the version of a row that transaction xid wrote, where it is not that transaction''s own';

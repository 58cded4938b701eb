-- Changes of rows that a client of this site keeps locked: set aside, in order, while everything else flows.
CREATE TABLE duri.held (
	origin       int2 NOT NULL,
	lsn          pg_lsn NOT NULL,
	change       int4 NOT NULL,
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	key_norm     bytea NOT NULL,
	at           timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (origin, lsn, change, table_schema, table_name, key_norm)
);
COMMENT ON TABLE duri.held IS 'changes that wait for a row lock of a client; the change itself stands in the journal';
COMMENT ON COLUMN duri.held.lsn IS 'where the commit record of the change''s transaction begins, in the journal of its origin';

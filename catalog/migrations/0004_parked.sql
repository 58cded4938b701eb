-- Rows that exist, but cannot be shown because a newer row has a value that must be unique.
CREATE TABLE duri.parked (
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	key_norm     bytea NOT NULL,
	key          jsonb NOT NULL,
	site         int2 NOT NULL,
	time         timestamptz NOT NULL,
	end_lsn      pg_lsn NOT NULL,
	row          jsonb NOT NULL,
	"constraint" text NOT NULL,
	rival        bytea NOT NULL,
	at           timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (table_schema, table_name, key_norm)
);
COMMENT ON TABLE duri.parked IS 'rows that a newer row hides at every site, because both have a value that must be unique; each reappears when the newer one makes way';
COMMENT ON COLUMN duri.parked.key_norm IS 'the key in the form in which equal keys have equal bytes';
COMMENT ON COLUMN duri.parked.site IS 'with time the version of the row';
COMMENT ON COLUMN duri.parked.end_lsn IS 'where, in the journal of its site, the transaction ends that made the row; 0/0: seen by every site';
COMMENT ON COLUMN duri.parked.rival IS 'key_norm of the newer row';

-- duri's own tables. Rows that the applier writes beside the data are local to each site and never replicated.

CREATE TABLE duri.meta (
	key   text PRIMARY KEY,
	value text NOT NULL
);
COMMENT ON TABLE duri.meta IS 'identity of this database in its duri cluster: cluster, site, enrolled_at';

CREATE TABLE duri.applied (
	xid          xid8 PRIMARY KEY,
	origin       int2 NOT NULL,
	from_lsn     pg_lsn NOT NULL,
	to_lsn       pg_lsn NOT NULL,
	min_time     timestamptz NOT NULL,
	max_time     timestamptz NOT NULL,
	transactions int4 NOT NULL,
	changes      int4 NOT NULL,
	records      int4 NOT NULL,
	seen         pg_lsn NOT NULL,
	at           timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX applied_origin ON duri.applied (origin, to_lsn DESC);
COMMENT ON TABLE duri.applied IS 'one row per apply transaction: which transactions of an origin were merged into it, with the least and greatest of their commit times (their rows all carry the greatest)';

CREATE TABLE duri.conflict (
	id           int8 GENERATED ALWAYS AS IDENTITY,
	at           timestamptz NOT NULL DEFAULT now(),
	kind         text NOT NULL,
	code         text NOT NULL,
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	key          jsonb,
	origin       int2 NOT NULL,
	origin_lsn   pg_lsn NOT NULL,
	origin_xid   int8 NOT NULL,
	change       int4 NOT NULL,
	remote_time  timestamptz NOT NULL,
	remote_row   jsonb,
	local_site   int2,
	local_time   timestamptz,
	local_row    jsonb,
	PRIMARY KEY (id, at)
) PARTITION BY RANGE (at);
CREATE TABLE duri.conflict_default PARTITION OF duri.conflict DEFAULT;
CREATE INDEX conflict_at ON duri.conflict (at DESC);
COMMENT ON TABLE duri.conflict IS 'every change of another site that did not simply apply: conflicts (kind is set, code lost or won) and exceptions (superseded, filled), with both images';

CREATE TABLE duri.event (
	id   int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	at   timestamptz NOT NULL DEFAULT now(),
	kind text NOT NULL,
	text text NOT NULL,
	data jsonb
);
COMMENT ON TABLE duri.event IS 'what people must see, one row each: enrolment, gaps, clock steps';

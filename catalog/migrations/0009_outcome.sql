-- What became of transactions that carry a mark (LTXID): a client whose COMMIT was not answered can be told.

CREATE TABLE duri.outcome (
	ltxid  bytea PRIMARY KEY,
	status text NOT NULL CHECK (status IN ('committed', 'aborted')),
	origin int2 NOT NULL,
	at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX outcome_at ON duri.outcome (at);
COMMENT ON TABLE duri.outcome IS 'fate of other sites'' marked transactions, once and for all: committed was applied here, aborted was decided here while its site was gone, and is not applied when it turns up';

CREATE TABLE duri.ghost (
	origin     int2 NOT NULL,
	commit_lsn pg_lsn NOT NULL,
	end_lsn    pg_lsn NOT NULL,
	xid        int8 NOT NULL,
	ltxid      bytea NOT NULL,
	reason     text NOT NULL,
	at         timestamptz NOT NULL DEFAULT now(),
	reversed   timestamptz,
	PRIMARY KEY (origin, commit_lsn)
);
COMMENT ON TABLE duri.ghost IS 'transactions that their own site committed while it was left out, and that do not count: not applied at the other sites, and reversed at their own';

-- A transaction calls it last of all, just before COMMIT. Without a change it does nothing. The level is what COMMIT waits for:
-- only where this database's own walsender is a synchronous standby that all commits must have ('sync', not one of several), as
-- else nobody knows whether it has waited for another site. SECURITY DEFINER: who is synchronous is not shown to everybody.
CREATE FUNCTION duri.mark(ltxid bytea) RETURNS void
LANGUAGE sql VOLATILE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	SELECT CASE WHEN pg_catalog.pg_current_xact_id_if_assigned() IS NOT NULL THEN pg_catalog.pg_logical_emit_message(true, 'duri.mark',
		pg_catalog.set_byte('\x00'::bytea, 0, coalesce(pg_catalog.array_position(
			ARRAY['off', 'local', 'remote_write', 'on', 'remote_apply'],
			CASE WHEN pg_catalog.current_setting('synchronous_commit') = 'off' OR EXISTS (
				SELECT FROM pg_catalog.pg_replication_slots s JOIN pg_catalog.pg_stat_get_wal_senders() w ON w.pid = s.active_pid
				WHERE s.database = pg_catalog.current_database() AND s.slot_name ^@ 'duri_' AND w.sync_state = 'sync')
				THEN pg_catalog.current_setting('synchronous_commit') ELSE 'local' END), 0)) || mark.ltxid) END;
END;
-- Every role may mark its own transactions; what is in the schema otherwise is not granted by this.
GRANT USAGE ON SCHEMA duri TO PUBLIC;
COMMENT ON FUNCTION duri.mark(bytea) IS 'marks the running transaction with a logical transaction id of 16 to 64 bytes';

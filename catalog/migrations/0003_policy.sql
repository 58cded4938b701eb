-- What is declared per table (replication.md rules 12 to 14), by DBAs and in duri.yaml, and the orphans that are known.
-- All local to the site: the same has to be declared at every site.

CREATE TABLE duri.policy (
	table_schema text NOT NULL,
	table_name   text NOT NULL,
	policy       jsonb NOT NULL,
	at           timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (table_schema, table_name)
);
COMMENT ON TABLE duri.policy IS 'what duri.set_policy declared; a table that duri.yaml names is declared there alone';

CREATE TABLE duri.orphan (
	table_schema    text NOT NULL,
	table_name      text NOT NULL,
	constraint_name text NOT NULL,
	key             jsonb NOT NULL,
	parent          jsonb NOT NULL,
	policy          text NOT NULL,
	reason          text NOT NULL,
	at              timestamptz NOT NULL DEFAULT now(),
	PRIMARY KEY (table_schema, table_name, constraint_name, key)
);
COMMENT ON TABLE duri.orphan IS 'rows whose parent is gone and that nothing was done about: key names the row, parent what it refers to; reason is why its policy could not be followed, or empty';

-- Names are quoted always, so that hints can be copied.
CREATE FUNCTION duri.quoted(name text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT SET search_path = pg_catalog, pg_temp
RETURN '"' || pg_catalog.replace(name, '"', '""') || '"';

-- The name as duri.yaml and `duri table` spell it.
CREATE FUNCTION duri.spelled(rel regclass) RETURNS text
LANGUAGE sql STABLE STRICT SET search_path = pg_catalog, pg_temp
RETURN (
	SELECT CASE WHEN n.nspname ~ '[."]' THEN duri.quoted(n.nspname) ELSE n.nspname::text END
		|| '.' || CASE WHEN c.relname ~ '[."]' THEN duri.quoted(c.relname) ELSE c.relname::text END
	FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = rel
);

-- What is wrong with the form of a policy, whatever the table; null when nothing is.
CREATE FUNCTION duri.malformed(policy jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
	k text;
	v jsonb;
BEGIN
	IF policy IS NULL OR jsonb_typeof(policy) <> 'object' THEN
		RETURN 'a policy is an object';
	END IF;
	FOR k, v IN SELECT e.key, e.value FROM jsonb_each(policy) e LOOP
		CASE k
		WHEN 'mode' THEN
			IF v NOT IN ('"row"', '"column"') THEN
				RETURN format('mode is %s, want "row" or "column"', v);
			END IF;
		WHEN 'delta' THEN
			IF jsonb_typeof(v) <> 'array' OR EXISTS (SELECT FROM jsonb_array_elements(v) e WHERE jsonb_typeof(e) <> 'string') THEN
				RETURN format('delta is %s, want an array of column names', v);
			END IF;
			IF jsonb_array_length(v) > (SELECT count(DISTINCT e) FROM jsonb_array_elements(v) e) THEN
				RETURN 'delta names a column twice';
			END IF;
		WHEN 'foreign_keys' THEN
			IF jsonb_typeof(v) <> 'object' OR EXISTS (SELECT FROM jsonb_each(v) e
				WHERE e.value NOT IN ('"report"', '"remove_child"', '"resurrect_parent"'))
			THEN
				RETURN format('foreign_keys is %s, want an object of constraint names to "report", "remove_child" or "resurrect_parent"', v);
			END IF;
		ELSE
			RETURN format('key "%s" is unknown', k);
		END CASE;
	END LOOP;
	RETURN NULL;
END
$function$;

-- What keeps a policy from fitting its table, one row each. The texts are those of the agent's own check (package policy).
CREATE FUNCTION duri.check_policy(rel regclass, policy jsonb) RETURNS TABLE (code text, message text, hint text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
	class pg_catalog.pg_class;
	root regclass := coalesce(pg_partition_root(rel), rel);
	col text;
	att record;
	fk text;
	full_needed boolean := policy ->> 'mode' = 'column' OR coalesce(jsonb_array_length(policy -> 'delta'), 0) > 0;
	alter_full text;
	have text;
BEGIN
	SELECT * INTO class FROM pg_class c WHERE c.oid = rel;
	IF class.oid IS NULL OR class.relkind NOT IN ('r', 'p') THEN
		RETURN QUERY SELECT 'policy_table', 'there is no such table', 'create it, or correct its name';
		RETURN;
	END IF;
	IF class.relispartition THEN
		RETURN QUERY SELECT 'policy_partition', 'it is a partition of ' || duri.spelled(root) || ', and rows move between partitions',
			'declare the policy for ' || duri.spelled(root);
		RETURN;
	END IF;
	IF NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = rel AND i.indisvalid AND (i.indisprimary OR i.indisreplident)) THEN
		RETURN QUERY SELECT 'policy_key', 'it has no key by which the sites could tell its rows apart', 'add a primary key';
	END IF;
	FOR col IN SELECT jsonb_array_elements_text(policy -> 'delta') LOOP
		SELECT a.attgenerated <> '' AS generated, format_type(a.atttypid, a.atttypmod) AS type,
			(WITH RECURSIVE d AS (
				SELECT t.oid, t.typbasetype FROM pg_type t WHERE t.oid = a.atttypid
				UNION ALL SELECT t.oid, t.typbasetype FROM d JOIN pg_type t ON t.oid = d.typbasetype
			) SELECT d.oid FROM d WHERE d.typbasetype = 0) AS base,
			(SELECT min(ic.relname) FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
				WHERE i.indrelid = rel AND (i.indisunique OR i.indisexclusion)
					AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])) AS keeper
		INTO att FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = col AND a.attnum > 0 AND NOT a.attisdropped;
		IF att IS NULL THEN
			RETURN QUERY SELECT 'policy_column', 'it has no column ' || duri.quoted(col), 'see its columns with \d in psql';
		ELSIF att.generated THEN
			RETURN QUERY SELECT 'policy_column', 'column ' || duri.quoted(col) || ' is generated: each site computes it',
				'name the columns that it is computed from';
		ELSIF att.base IN ('float4'::regtype, 'float8'::regtype) THEN
			RETURN QUERY SELECT 'policy_type', 'delta column ' || duri.quoted(col) || ' is ' || att.type ||
				', whose addition is not associative: the sum would depend on the order in which changes arrive, and sites would differ',
				(SELECT format('ALTER TABLE %s.%s ALTER COLUMN %s TYPE numeric, at every site',
					duri.quoted(n.nspname), duri.quoted(class.relname), duri.quoted(col)) FROM pg_namespace n WHERE n.oid = class.relnamespace);
		ELSIF att.base NOT IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype) THEN
			RETURN QUERY SELECT 'policy_type', 'delta column ' || duri.quoted(col) || ' is ' || att.type || ', which has no differences to add',
				'a delta column is smallint, integer, bigint or numeric';
		ELSIF att.keeper IS NOT NULL THEN
			RETURN QUERY SELECT 'policy_delta_key', 'delta column ' || duri.quoted(col) || ' is part of ' || duri.quoted(att.keeper) ||
				', by which rows are told apart, and a sum is known only after merging',
				'leave it out of delta, or out of that key';
		END IF;
	END LOOP;
	-- Each partition has a replica identity of its own.
	SELECT string_agg(format('ALTER TABLE %s.%s REPLICA IDENTITY FULL', duri.quoted(n.nspname), duri.quoted(c.relname)), '; '
		ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C") INTO alter_full
	FROM (SELECT rel::oid AS relid WHERE class.relkind = 'r' UNION SELECT l.relid FROM pg_partition_tree(rel) l WHERE l.isleaf AND class.relkind = 'p') t
	JOIN pg_class c ON c.oid = t.relid JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE c.relkind = 'r' AND c.relreplident <> 'f';
	IF full_needed AND alter_full IS NOT NULL THEN
		RETURN QUERY SELECT 'policy_identity', 'column mode and delta columns need the old row, which is sent with REPLICA IDENTITY FULL only', alter_full;
	END IF;
	SELECT string_agg(conname, ', ' ORDER BY conname COLLATE "C") INTO have FROM pg_constraint WHERE conrelid = rel AND contype = 'f' AND conparentid = 0;
	FOR fk IN SELECT k FROM jsonb_object_keys(policy -> 'foreign_keys') k ORDER BY k COLLATE "C" LOOP
		IF NOT EXISTS (SELECT FROM pg_constraint WHERE conrelid = rel AND contype = 'f' AND conparentid = 0 AND conname = fk) THEN
			RETURN QUERY SELECT 'policy_foreign_key', 'it has no foreign key constraint ' || duri.quoted(fk), coalesce('its foreign keys: ' || have,
				'the table has none: a policy is declared for the table that refers, not for the one referred to');
		END IF;
	END LOOP;
END
$function$;
COMMENT ON FUNCTION duri.check_policy(regclass, jsonb) IS 'what keeps a policy from fitting a table; no rows when it fits';

CREATE FUNCTION duri.set_policy(rel regclass, policy jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $function$
DECLARE
	bad record;
	form text := duri.malformed(policy);
	whole jsonb;
BEGIN
	IF rel IS NULL THEN
		RAISE EXCEPTION 'set a table policy: no table is named' USING ERRCODE = 'null_value_not_allowed';
	END IF;
	IF form IS NOT NULL THEN
		RAISE EXCEPTION 'set the policy of %: %', duri.spelled(rel), form USING ERRCODE = 'invalid_parameter_value',
			HINT = 'for example {"mode": "row", "delta": ["balance"], "foreign_keys": {"account_branch_fkey": "report"}}';
	END IF;
	FOR bad IN SELECT * FROM duri.check_policy(rel, policy) LIMIT 1 LOOP
		RAISE EXCEPTION 'set the policy of %: %', duri.spelled(rel), bad.message USING ERRCODE = 'invalid_parameter_value', HINT = bad.hint;
	END LOOP;
	whole := '{"mode": "row", "delta": [], "foreign_keys": {}}' || policy;
	INSERT INTO duri.policy AS p (table_schema, table_name, policy)
		SELECT n.nspname, c.relname, whole FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = rel
		ON CONFLICT ON CONSTRAINT policy_pkey DO UPDATE SET policy = excluded.policy, at = now();
	RETURN whole;
END
$function$;
COMMENT ON FUNCTION duri.set_policy(regclass, jsonb) IS 'declare how a table merges; call it at every site; returns the whole policy with its defaults';

CREATE FUNCTION duri.clear_policy(rel regclass) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
	DELETE FROM duri.policy p USING pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.oid = rel AND p.table_schema = n.nspname AND p.table_name = c.relname;
	RETURN FOUND;
END
$function$;
COMMENT ON FUNCTION duri.clear_policy(regclass) IS 'take back what duri.set_policy declared for a table; whether there was anything';

REVOKE ALL ON FUNCTION duri.set_policy(regclass, jsonb), duri.clear_policy(regclass) FROM PUBLIC;

\set ON_ERROR_STOP on
\pset pager off
CREATE TABLE item(id int PRIMARY KEY, name text, parent int REFERENCES item DEFERRABLE INITIALLY DEFERRED);
\copy item(id, name) FROM PROGRAM 'seq 1 1000 | sed "s/.*/&\tn&/"'
\d item
\dt
SELECT count(*), sum(id) FROM item;
SELECT id, name FROM item ORDER BY id LIMIT 3 \gx
SELECT 'SELECT ' || g || ' AS g' FROM generate_series(1, 5) g \gexec
SELECT max(id) AS most FROM item \gset
\echo :most
\set FETCH_COUNT 70
SELECT id FROM item WHERE id <= 300 ORDER BY id;
\unset FETCH_COUNT
\set AUTOCOMMIT off
UPDATE item SET name = 'changed' WHERE id = 7;
\set ON_ERROR_ROLLBACK on
\set ON_ERROR_STOP off
SELECT 1/0;
\echo :ERROR :SQLSTATE :LAST_ERROR_MESSAGE
\set ON_ERROR_STOP on
COMMIT;
SELECT name FROM item WHERE id = 7;
COMMIT;
\set AUTOCOMMIT on
SET search_path = pg_catalog, public;
SET app.me = 'x';
SET work_mem = '7MB';
SELECT current_setting('search_path'), current_setting('app.me'), current_setting('work_mem') FROM generate_series(1, 2);
SHOW work_mem;
RESET work_mem;
SHOW work_mem;
\encoding LATIN1
SHOW client_encoding;
\encoding UTF8
CREATE TEMP TABLE x(a int) ON COMMIT PRESERVE ROWS;
INSERT INTO x SELECT generate_series(1, 10);
SELECT sum(a) FROM x;
DISCARD ALL;
SELECT to_regclass('x') IS NULL AS gone;
PREPARE p(int) AS SELECT name FROM item WHERE id = $1;
EXECUTE p(1);
EXECUTE p(2);
DEALLOCATE p;
BEGIN;
DECLARE c CURSOR WITH HOLD FOR SELECT id FROM item ORDER BY id;
COMMIT;
FETCH 3 FROM c;
FETCH 3 FROM c;
CLOSE c;
LISTEN news;
NOTIFY news, 'hello';
UNLISTEN *;
SELECT pg_advisory_lock(1), pg_advisory_unlock(1);
BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE;
SHOW transaction_isolation;
COMMIT;
DO $$ BEGIN RAISE NOTICE 'heard'; END $$;
VACUUM item;
CREATE INDEX CONCURRENTLY item_name ON item(name);

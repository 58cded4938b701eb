package clients

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// debianPython is the interpreter that Debian's packages are for; DURI_PYTHON names another one.
const debianPython = "/usr/bin/python3"

// jars are Debian's.
var jars = []string{"/usr/share/java/postgresql.jar", "/usr/share/java/HikariCP.jar", "/usr/share/java/slf4j-api.jar", "/usr/share/java/slf4j-nop.jar"}

func python(packages ...string) []Need {
	needs := []Need{{debianPython, "python3"}}
	for _, p := range packages {
		needs = append(needs, Need{"/usr/lib/python3/dist-packages/" + p, "python3-" + p})
	}
	return needs
}

var (
	node = []Need{{"node", "nodejs"}, {"npm", "npm"}}
	java = []Need{{"javac", "default-jdk-headless"}, {jars[0], "libpostgresql-jdbc-java"}, {jars[1], "libhikaricp-java"}}
)

// Short are the programs of `make test`: about a minute in all.
var Short = []Program{
	{Name: "pgbench", Moves: 300, Command: `
		pgbench -i -s 1 -q >"$TMP/log" 2>&1 || { cat "$TMP/log"; exit 1; }
		for m in simple extended prepared; do
			pgbench -n -M $m -c 6 -j 2 -t 100 2>&1 | grep -E '^number of (failed|transactions actually)'
		done
		psql -XAtc 'SELECT count(*) > 0, sum(delta) = (SELECT sum(abalance) FROM pgbench_accounts), sum(delta) = (SELECT sum(bbalance) FROM pgbench_branches) FROM pgbench_history'`},
	{Name: "psql", Moves: 20, Command: `psql -X -f psql/session.sql 2>&1 | sed -E 's/server process with PID [0-9]+/PID/'`},
	{Name: "pg_dump and pg_restore", Moves: 1, Command: dumpAndRestore("1")},
	{Name: "node-postgres", Moves: 100, Needs: node, Command: `node node/pg.js`},
	{Name: "postgres.js", Moves: 50, Needs: node, Command: `node node/postgresjs.js`},
	{Name: "psycopg 3", Moves: 50, Needs: python("psycopg"), Command: `"$PY" python/psycopg3.py`},
	{Name: "psycopg2", Moves: 20, Needs: python("psycopg2"), Command: `"$PY" python/psycopg2_.py`},
	{Name: "asyncpg", Moves: 100, Needs: python("asyncpg"), Command: `"$PY" python/asyncpg_.py`},
	{Name: "SQLAlchemy", Moves: 20, Needs: python("sqlalchemy", "psycopg2", "asyncpg"), Command: `"$PY" python/alchemy.py`},
	{Name: "PgJDBC and HikariCP", Moves: 100, Needs: java, Command: `javac -d "$TMP" java/Jdbc.java && java -XX:TieredStopAtLevel=1 -cp "$TMP:$CLASSPATH" Jdbc`},
	{Name: "replication programs", Moves: 1, Command: replication},
}

// dumpAndRestore copies a database with n workers and compares.
func dumpAndRestore(scale string) string {
	return `
		pgbench -i -s ` + scale + ` -q --partitions=3 --foreign-keys >"$TMP/log" 2>&1 || { cat "$TMP/log"; exit 1; }
		psql -Xqc "CREATE VIEW v AS SELECT bid, sum(abalance) FROM pgbench_accounts GROUP BY bid; CREATE SEQUENCE s START 42; SELECT lo_from_bytea(4711, repeat('x', 5000)::bytea)" >/dev/null
		pg_dump -N duri -Fd -j 2 -f "$TMP/dump"
		psql -Xqc "CREATE SCHEMA IF NOT EXISTS public" -c "DROP VIEW v; DROP SEQUENCE s; SELECT lo_unlink(4711)" -c "DROP TABLE pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history CASCADE" 2>&1 | grep -E 'ERROR' || true
		pg_restore -d "$PGDATABASE" -j 2 --no-owner --no-comments "$TMP/dump" 2>&1 | grep -v 'schema "public" already exists' | grep -E 'error' || true
		psql -XAtc "SELECT (SELECT count(*) FROM pgbench_accounts), (SELECT count(*) FROM v), nextval('s'), length(lo_get(4711)), (SELECT count(*) FROM pg_constraint WHERE contype = 'f')"
		pg_dump -N duri | grep -vE '^-- (Dumped|Name: .* Owner)|restrict' | sha256sum`
}

// replication are programs that need a connection of their own, and get it.
const replication = `
	psql -Xqc "CREATE TABLE t(a int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)"
	psql -XAtqc "SELECT 'moved' FROM t LIMIT 1"
	psql -XAtqc "SELECT count(*) FROM t"
	slot="s_$PGPORT"
	pg_recvlogical -d "$PGDATABASE" --slot "$slot" --create-slot -P test_decoding
	psql -Xqc "INSERT INTO t VALUES (5000), (5001); DELETE FROM t WHERE a = 1"
	timeout -s INT 60 pg_recvlogical -d "$PGDATABASE" --slot "$slot" --start -f "$TMP/changes" --endpos "$(psql -XAtc 'SELECT pg_current_wal_lsn()')"
	# The marks of the gateway are in the stream as well, as messages with the prefix duri.mark.
	grep -aE '^table' "$TMP/changes"
	pg_recvlogical -d "$PGDATABASE" --slot "$slot" --drop-slot
	pg_basebackup -D "$TMP/backup" -X stream -c fast && pg_verifybackup "$TMP/backup"
	psql -XAt "dbname=$PGDATABASE replication=database" -c 'SHOW wal_level'
	PGDATABASE= psql -XAt "dbname=$PGDATABASE replication=database" -c 'SHOW server_encoding' 2>/dev/null || true`

// InstallNode brings the Node.js drivers of testdata/node/package-lock.json into a folder of the user's cache, by `npm ci`,
// and gives that folder.
func InstallNode(ctx context.Context, testdata string) (dir string, err error) {
	lock, err := os.ReadFile(filepath.Join(testdata, "node", "package-lock.json"))
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(lock)
	dir = filepath.Join(cache, "duri", "clients", fmt.Sprintf("node-%x", sum[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	// Renamed when it is complete, so that a run that is broken off leaves nothing that looks installed.
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "installing-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	for _, name := range []string{"package.json", "package-lock.json"} {
		b, err := os.ReadFile(filepath.Join(testdata, "node", name))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(tmp, name), b, 0o644); err != nil { //nolint:gosec // nothing secret
			return "", err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts")
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci in %s: %w: %s", tmp, err, strings.TrimSpace(string(out)))
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, there := os.Stat(dir); there != nil {
			return "", err
		}
	}
	return dir, nil
}

// Long are those that take longer.
var Long = []Program{}

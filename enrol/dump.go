package enrol

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/config"
)

// program is a pg_dump and its major version.
type program struct {
	path  string
	major int
}

// installed lists where distributions put PostgreSQL's programs: Debian and Ubuntu, then the project's RPMs.
var installed = []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"}

const installHint = "install the PostgreSQL client programs of the server's version (apt-get install postgresql-client) or set postgres.bin_dir"

// findDump finds a pg_dump that can read a server: the one in binDir if that is set, else, of those on PATH and where
// distributions install it, the oldest that is not older than the server.
func findDump(ctx context.Context, binDir string, serverMajor int) (program, error) {
	const op = "find pg_dump"
	var found []program
	for _, path := range dumpPaths(binDir) {
		p, err := dumpVersion(ctx, path)
		if ctx.Err() != nil {
			return p, ctx.Err()
		}
		if err == nil {
			found = append(found, p)
		} else if binDir != "" {
			return p, &Error{Op: op, Err: err, Hint: "correct postgres.bin_dir in duri.yaml"}
		}
	}
	return chooseDump(found, serverMajor)
}

func dumpPaths(binDir string) []string {
	if binDir != "" {
		return []string{filepath.Join(binDir, "pg_dump")}
	}
	var paths []string
	for _, pattern := range installed {
		dirs, _ := filepath.Glob(filepath.Join(pattern, "pg_dump")) // The pattern is a constant, so it cannot be malformed.
		paths = append(paths, dirs...)
	}
	if path, err := exec.LookPath("pg_dump"); err == nil {
		paths = append(paths, path)
	}
	return paths
}

// chooseDump picks from what was found. It is pure.
func chooseDump(found []program, serverMajor int) (program, error) {
	const op = "find pg_dump"
	if len(found) == 0 {
		return program{}, &Error{Op: op, Text: "it is not installed on the source's host", Hint: installHint}
	}
	fit := slices.DeleteFunc(slices.Clone(found), func(p program) bool { return p.major < serverMajor })
	if len(fit) == 0 {
		newest := slices.MaxFunc(found, func(a, b program) int { return cmp.Compare(a.major, b.major) })
		return program{}, &Error{
			Op: op, Hint: installHint,
			Text: fmt.Sprintf("%s is version %d, which cannot read a server of version %d", newest.path, newest.major, serverMajor),
		}
	}
	return slices.MinFunc(fit, func(a, b program) int { return cmp.Compare(a.major, b.major) }), nil
}

// dumpVersion asks a pg_dump for its major version.
func dumpVersion(ctx context.Context, path string) (program, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return program{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	major, err := parseDumpVersion(string(out))
	return program{path, major}, err
}

// parseDumpVersion reads "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
func parseDumpVersion(out string) (int, error) {
	_, rest, _ := strings.Cut(out, "(PostgreSQL) ")
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	n, err := strconv.Atoi(digits)
	if err != nil {
		return 0, fmt.Errorf("%q is not the version line of pg_dump", strings.TrimSpace(out))
	}
	return n, nil
}

// dump is one database as pg_dump is to see it.
type dump struct {
	program  program
	args     []string // connection and what to leave out; no secret among them
	env      []string
	snapshot string
}

// newDump prepares pg_dump for the server that c is connected to. dsn is c's connection string.
func newDump(p program, c *pgconn.PgConn, dsn, database, snapshot string, schemas []string) (dump, error) {
	cfg, err := pgconn.ParseConfig(dsn)
	if err != nil {
		return dump{}, err
	}
	keys, err := config.DSNKeys(dsn)
	if err != nil {
		return dump{}, err
	}
	if database != "" {
		cfg.Database = database
	}
	d := dump{program: p, snapshot: snapshot}
	d.env = dumpEnv(os.Environ(), cfg.Password, keys)
	host, port := peer(c.Conn().RemoteAddr(), cfg)
	d.args = []string{
		"--host=" + host, "--port=" + port, "--username=" + cfg.User, "--dbname=" + dumpDatabase(cfg.Database), "--no-password",
		"--schema-only", "--encoding=UTF8", "--snapshot=" + snapshot, "--exclude-schema=duri",
		"--no-publications", "--no-subscriptions", "--no-tablespaces",
	}
	if len(schemas) > 0 {
		// Naming schemas leaves extensions out, which the tables' types may need.
		d.args = append(d.args, "--strict-names", "--extension=*")
	}
	for _, s := range schemas {
		d.args = append(d.args, "--schema="+pattern(s))
	}
	return d, nil
}

// pattern quotes a name so that pg_dump's patterns take it literally.
func pattern(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// dumpDatabase is a database's name for --dbname, which would read one with an equals sign or in the form of a URL as a
// connection string.
func dumpDatabase(name string) string {
	return "dbname='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(name) + "'"
}

// peer is where the connection really went: a DSN may name several hosts, and the snapshot exists on one server.
func peer(addr net.Addr, cfg *pgconn.Config) (host, port string) {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok { // a Unix-domain socket
		return cfg.Host, strconv.Itoa(int(cfg.Port))
	}
	host = cfg.Host
	for _, f := range cfg.Fallbacks {
		if f.Host != host {
			host = tcp.IP.String()
			break
		}
	}
	if strings.HasPrefix(host, "/") {
		host = tcp.IP.String()
	}
	return host, strconv.Itoa(tcp.Port)
}

// dsnEnv are the settings of a connection string that pg_dump takes from its environment. The password is another.
var dsnEnv = map[string]string{
	"sslmode": "PGSSLMODE", "sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY", "sslrootcert": "PGSSLROOTCERT",
	"sslcrl": "PGSSLCRL", "sslsni": "PGSSLSNI", "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
	"ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION", "channel_binding": "PGCHANNELBINDING",
	"sslnegotiation": "PGSSLNEGOTIATION", "krbsrvname": "PGKRBSRVNAME", "gssencmode": "PGGSSENCMODE",
	"service": "PGSERVICE", "servicefile": "PGSERVICEFILE", "passfile": "PGPASSFILE",
}

// dumpEnv is the environment of pg_dump: our own, the connection's settings, and the password, which every user of the
// machine could read in the arguments. It is pure.
func dumpEnv(env []string, password string, dsnKeys map[string]string) []string {
	set := map[string]string{
		"LC_ALL": "C", "PGAPPNAME": applicationName, "PGCONNECT_TIMEOUT": "10",
		// pg_dump writes its strings as the session has them, and a database can be set to the old way.
		"PGOPTIONS": "-c standard_conforming_strings=on",
	}
	for key, name := range dsnEnv {
		if v, ok := dsnKeys[key]; ok {
			set[name] = v
		}
	}
	if password != "" {
		set["PGPASSWORD"] = password
	}
	// These would lead pg_dump elsewhere.
	drop := []string{"PGHOSTADDR", "PGDATABASE", "PGCLUSTER"}
	out := slices.DeleteFunc(slices.Clone(env), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		_, mine := set[name]
		return mine || slices.Contains(drop, name)
	})
	for name, v := range set {
		out = append(out, name+"="+v)
	}
	slices.Sort(out)
	return out
}

// stopTimeout is how long a pg_dump whose context ended may take to end.
const stopTimeout = 5 * time.Second

// section runs pg_dump for one section, pre-data or post-data, and gives the SQL for a server.
func (d dump) section(ctx context.Context, name string) (string, error) {
	args := append(slices.Clone(d.args), "--section="+name)
	cmd := exec.CommandContext(ctx, d.program.path, args...)
	cmd.Env, cmd.WaitDelay = d.env, stopTimeout
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		text := strings.TrimSpace(stderr.String())
		return "", &Error{Op: "dump the schema", Text: text, Err: err, Hint: dumpHint(text)}
	}
	sql := filter{}.clean(stdout.String())
	if strings.IndexByte(sql, 0) >= 0 {
		return "", errors.New("dump the schema: pg_dump wrote a zero byte")
	}
	return sql, nil
}

// dumpHint reads pg_dump's complaint. It is pure.
func dumpHint(text string) string {
	switch {
	case strings.Contains(text, "server version mismatch"):
		return installHint
	case strings.Contains(text, "permission denied"):
		return "run the SQL that `duri grants` prints as superuser in this database"
	case strings.Contains(text, "no matching schemas"):
		return "correct schemas: of this database in duri.yaml"
	case strings.Contains(text, "password"):
		return "check the password of postgres.dsn (PGPASSWORD or ~/.pgpass)"
	}
	return "see PostgreSQL's log at the source"
}

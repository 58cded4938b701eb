package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	osuser "os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pair"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/internal/pki"
)

// The ways from the client to the server.
const (
	direct           = "direct"
	haproxyTCP       = "HAProxy, tcp"
	pgbouncer        = "PgBouncer, transaction"
	pgbouncerSession = "PgBouncer, session"
	duriSession      = "duri, session"
	duriTransaction  = "duri, transaction"
)

// system is a way.
type system struct {
	name, address string
	pid           func() int // of the process in between; nil: there is none
	only          string     // the protocol it can do; empty: all
	cmd           *exec.Cmd
}

// prepare makes the scripts of the loads.
func (b *bench) prepare() (err error) {
	for _, sh := range []shape{{}, {writes: true}} {
		sql := "SELECT v FROM t WHERE id = :id"
		if sh.writes {
			sql = "UPDATE t SET n = n + 1 WHERE id = :id"
		}
		if err := os.WriteFile(b.script(sh), fmt.Appendf(nil, "\\set id random(1, %d)\n%s;\n", rows, sql), 0o600); err != nil {
			return err
		}
	}
	b.pgbench, err = pair.FindPgbench()
	return err
}

func (b *bench) script(sh shape) string {
	return filepath.Join(b.dir, fmt.Sprintf("writes-%v.sql", sh.writes))
}

func (b *bench) sites(ctx context.Context, binary string) (_ *pair.Pair, err error) {
	doors := map[string]string{}
	for _, site := range []string{"a", "b"} {
		if doors[site], err = freeAddress(); err != nil {
			return nil, err
		}
	}
	modes := map[string]string{"a": "session", "b": "transaction"}
	settings, more := map[string]string{"max_connections": "200"}, ""
	if b.tls {
		cert, key, err := b.certificate()
		if err != nil {
			return nil, err
		}
		settings["ssl"], settings["ssl_cert_file"], settings["ssl_key_file"] = "on", cert, key
		more = fmt.Sprintf("  cert: %s\n  key: %s\n", cert, key)
	}
	p, err := pair.Start(ctx, pair.Options{
		Binary: binary, Settings: settings,
		Config: func(site, text string) string {
			text = regexp.MustCompile(`dsn: "([^"]*)"`).ReplaceAllString(text, `dsn: "$1 sslmode=`+b.sslmode()+`"`)
			return text + fmt.Sprintf("\ngateway:\n  listen: %s\n  mode: %s\n%s", doors[site], modes[site], more)
		},
		Seed: func(ctx context.Context, a *pair.Site) error {
			return a.Cluster.Exec(ctx, database, fmt.Sprintf("CREATE TABLE t (id int PRIMARY KEY, v text, n int) WITH (fillfactor = 50); INSERT INTO t SELECT n, md5(n::text), 0 FROM generate_series(1, %d) AS n", rows))
		},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	for _, s := range p.Sites {
		sql := fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'; GRANT pg_read_all_data, pg_write_all_data TO %[1]s", user, password)
		if err := errors.Join(s.Cluster.Exec(ctx, database, sql), s.Cluster.Exec(ctx, database, grants.SQL(grants.Spec{Gateway: true}))); err != nil {
			return nil, err
		}
	}
	wait, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := p.WaitReady(wait); err != nil {
		return nil, err
	}
	b.systems = []*system{{name: direct, address: fmt.Sprintf("127.0.0.1:%d", p.Sites[1].Cluster.Port())}}
	b.agent = p.Sites[1].AgentPID
	if err := b.peers(ctx, p.Sites[1].Cluster); err != nil {
		return nil, err
	}
	b.systems = append(b.systems,
		&system{name: duriSession, address: doors["a"], pid: p.Sites[0].AgentPID},
		&system{name: duriTransaction, address: doors["b"], pid: p.Sites[1].AgentPID})
	return p, nil
}

// sslmode is libpq's, on both legs.
func (b *bench) sslmode() string {
	if b.tls {
		return "require"
	}
	return "disable"
}

// certificate makes one with its key, for all that answer clients. PostgreSQL's user reads the key by its group, if that is another one.
func (b *bench) certificate() (cert, key string, err error) {
	ca, err := pki.NewCA("0b8d5c3e-7f13-4b3a-9a55-2d7f6c1e2b3a", "bench")
	if err != nil {
		return "", "", err
	}
	pair, err := ca.Issue("bench", "127.0.0.1")
	if err != nil {
		return "", "", err
	}
	cert, key = filepath.Join(b.dir, "server.crt"), filepath.Join(b.dir, "server.key")
	if err := pair.Write(cert, key); err != nil || os.Getuid() != 0 {
		return cert, key, err
	}
	group, err := osuser.LookupGroup("postgres")
	if err != nil {
		return "", "", err
	}
	gid, err := strconv.Atoi(group.Gid)
	if err != nil {
		return "", "", err
	}
	return cert, key, errors.Join(os.Chown(key, 0, gid), os.Chmod(key, 0o640))
}

// peers starts those that are installed.
func (b *bench) peers(ctx context.Context, c *pgcluster.Cluster) error {
	verifier, err := c.QueryText(ctx, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = '"+user+"'")
	if err != nil {
		return err
	}
	// Each connects to the server in its own way, and asks the client for its password.
	files := map[string]string{"users.txt": fmt.Sprintf("%q %q\n", user, verifier[0][0])}
	for _, peer := range []struct {
		name, program, only, config string
		args                        []string
	}{
		{haproxyTCP, "haproxy", "", "defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\nlisten pg\n  bind %[1]s\n  server pg 127.0.0.1:%[3]d\n", []string{"-db", "-f"}},
		{pgbouncer, "pgbouncer", "simple", bouncer + "pool_mode = transaction\n", nil},
		{pgbouncerSession, "pgbouncer", "", bouncer + "pool_mode = session\n", nil},
	} {
		program, err := exec.LookPath(peer.program)
		if err != nil {
			if program, err = exec.LookPath("/usr/sbin/" + peer.program); err != nil {
				fmt.Printf("%s is not installed (apt-get install %s)\n", peer.name, peer.program)
				continue
			}
		}
		address, err := freeAddress()
		if err != nil {
			return err
		}
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return err
		}
		dir := filepath.Join(b.dir, fmt.Sprintf("peer-%d", len(b.systems)))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		text := fmt.Sprintf(peer.config, address, host, c.Port(), port, filepath.Join(dir, "users.txt"))
		if b.tls && peer.program == "pgbouncer" {
			text += fmt.Sprintf("client_tls_sslmode = require\nclient_tls_cert_file = %s/server.crt\nclient_tls_key_file = %[1]s/server.key\nserver_tls_sslmode = require\n", b.dir)
		}
		files["peer.conf"] = text
		for name, content := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil { //nolint:gosec // PgBouncer is another user's, the password is a test's
				return err
			}
		}
		s := &system{name: peer.name, address: address, only: peer.only}
		s.cmd = exec.Command(program, append(peer.args, filepath.Join(dir, "peer.conf"))...)
		s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if peer.program == "pgbouncer" { // it refuses to be root's
			s.cmd.SysProcAttr.Credential = c.Credential()
		}
		if err := s.cmd.Start(); err != nil {
			return err
		}
		s.pid = func() int { return s.cmd.Process.Pid }
		b.systems = append(b.systems, s)
		if err := awaitListener(ctx, address); err != nil {
			return fmt.Errorf("%s: %w", peer.name, err)
		}
	}
	return nil
}

const bouncer = `[databases]
app = host=127.0.0.1 port=%[3]d
[pgbouncer]
listen_addr = %[2]s
listen_port = %[4]s
auth_type = scram-sha-256
auth_file = %[5]s
unix_socket_dir =
max_client_conn = 500
default_pool_size = 50
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
`

// end ends the peers.
func (b *bench) end() {
	for _, s := range b.systems {
		if s.cmd != nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait() // it was killed
		}
	}
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// awaitListener waits until somebody listens.
func awaitListener(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// cpuTime is the processor time of a process so far.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Behind the name, which may hold anything, in parentheses: state is field 3, utime 14, stime 15, in hundredths of seconds.
	fields := splitStat(string(b))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

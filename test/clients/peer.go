package clients

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Bouncer runs the short programs through Debian's PgBouncer in transaction mode, with its settings as they come, and tells which
// of them do not say what they say directly. It judges nothing: it is there for the table in docs/reference/gateway.md.
func Bouncer(ctx context.Context, dirs Dirs) (said string, err error) {
	program, err := exec.LookPath("/usr/sbin/pgbouncer")
	if err != nil {
		return "not run: PgBouncer is not installed (apt-get install pgbouncer)", nil //nolint:nilerr // nothing is judged
	}
	err = with(ctx, false, func(s *Sites) (err error) {
		c := s.Servers[0]
		dir, err := os.MkdirTemp("", "duri-clients-")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // PgBouncer is another user's
			return err
		}
		rows, err := c.QueryText(ctx, "postgres", "SELECT rolpassword FROM pg_authid WHERE rolname = '"+appRole+"'")
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		if err := l.Close(); err != nil {
			return err
		}
		users := filepath.Join(dir, "users.txt")
		conf := fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %s\nauth_type = scram-sha-256\nauth_file = %s\nunix_socket_dir =\npool_mode = transaction\n"+
			"ignore_startup_parameters = extra_float_digits,options,statement_timeout\n", c.Port(), port, users)
		for name, text := range map[string]string{"users.txt": fmt.Sprintf("%q %q\n", appRole, rows[0][0]), "bouncer.ini": conf} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil { //nolint:gosec // the password is a test's
				return err
			}
		}
		cmd := exec.Command(program, "-q", filepath.Join(dir, "bouncer.ini"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: c.Credential()}
		if err := cmd.Start(); err != nil {
			return err
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // it was killed
		}()
		if err := awaitListener(ctx, "127.0.0.1:"+port); err != nil {
			return err
		}
		var lines []string
		for _, p := range Short {
			p.Within = 40 * time.Second
			lines = append(lines, s.beside(ctx, p, dirs, port))
		}
		said = strings.Join(lines, "\n")
		return nil
	})
	return said, err
}

// beside says how a program does through the peer at a port.
func (s *Sites) beside(ctx context.Context, p Program, dirs Dirs, port string) string {
	if err := p.lacking(); err != nil {
		return p.Name + ": " + err.Error()
	}
	var outs [2]string
	for i, w := range []way{s.ways()[0], {"PgBouncer", "127.0.0.1", port}} {
		if err := s.Database(ctx, "peer"); err != nil {
			return p.Name + ": " + err.Error()
		}
		out, err := s.run(ctx, p, w, "peer", dirs)
		if err != nil {
			lines := strings.Split(strings.TrimSpace(out), "\n")
			return fmt.Sprintf("%s, %s: %v: %s", p.Name, w.name, err, strings.Join(lines[max(0, len(lines)-3):], " | "))
		}
		outs[i] = out
	}
	if outs[0] != outs[1] {
		return fmt.Sprintf("%s says other things: %s", p.Name, difference(outs[0], outs[1]))
	}
	return p.Name + ": the same"
}

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

package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/pgcluster"
	"github.com/duri-io/duri/server"
)

// site is one of the two: its PostgreSQL, its agent, and a watcher of that agent's status.
type site struct {
	letter   string // "A" or "B"
	name     string
	cluster  *pgcluster.Cluster
	agent    *process
	spec     agentSpec
	control  *server.Control
	watcher  *watcher
	password string // of the gateways' roles, the same at both
}

// label names the site for people.
func (s *site) label() string { return s.letter + " (" + s.name + ")" }

// superDSN is for what the demo itself does, over the Unix-domain socket; it holds no password.
func (s *site) superDSN() string {
	return fmt.Sprintf("host=%s port=%d user=%s sslmode=disable", quoteValue(s.cluster.SocketDir()), s.cluster.Port(), s.cluster.Superuser())
}

// quoteValue quotes a value in a connection string.
func quoteValue(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(v) + "'"
}

func (s *site) connect(ctx context.Context) (*pgconn.PgConn, error) {
	c, err := pg.Connect(ctx, s.superDSN(), database, nil)
	if err != nil {
		return nil, fmt.Errorf("connect to site %s: %w", s.label(), err)
	}
	return c, nil
}

// startAgent starts the agent; the site's status is then being watched.
func (s *site) startAgent() error {
	p, err := startAgent(s.spec)
	if err != nil {
		return fmt.Errorf("site %s: %w", s.label(), err)
	}
	s.agent = p
	return nil
}

// await waits until what the agent says of itself satisfies cond. It fails when the agent ends, or when it has not come
// to that within timeout; the error then tells the agent's own words.
func (s *site) await(ctx context.Context, what string, timeout time.Duration, cond func(view) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTooLong)
	defer cancel()
	for {
		v := s.watcher.view()
		if v.fresh() && cond(v) {
			return nil
		}
		if !s.agent.alive() {
			return &Error{
				Msg:  fmt.Sprintf("wait until site %s %s: its agent ended (%v): %s", s.label(), what, s.agent.err, lastLine(s.spec.log)),
				Hint: "see the agent's own error above; run again with --keep --dir DIR to look at its log",
			}
		}
		if err := pause(ctx, watchEvery/2); err != nil {
			if !errors.Is(err, errTooLong) {
				return err
			}
			return &Error{
				Msg:  fmt.Sprintf("wait until site %s %s: not within %v: %s", s.label(), what, timeout, v.trouble()),
				Hint: "the machine may be too busy: run again with fewer --clients or a lower --rate",
			}
		}
	}
}

var errTooLong = errors.New("it takes too long")

// lastLine gives the last line of a log, for an error message.
func lastLine(path string) string { return lastLines(path, 1)[0] }

// lastLines gives the last n lines of a log, at least one.
func lastLines(path string, n int) []string {
	b, err := os.ReadFile(path)
	if err != nil {
		return []string{err.Error()}
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[max(0, len(lines)-n):]
}

// kill ends the site, or a part of it, as a power cut would: SIGKILL to the agent and to every process of PostgreSQL, at once.
func (s *site) kill(what string) error {
	ended := make(chan error, 1)
	go func() {
		if what == KillPostgres {
			ended <- nil
			return
		}
		ended <- s.agent.kill()
	}()
	var err error
	if what != KillAgent {
		err = s.cluster.Kill()
	}
	return errors.Join(err, <-ended)
}

// serverUser names the system user that the server runs as, if it is not the one that runs the demo.
func (s *site) serverUser() string {
	st, err := os.Stat(s.cluster.DataDir())
	if err != nil {
		return ""
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || int(sys.Uid) == os.Geteuid() {
		return ""
	}
	uid := strconv.Itoa(int(sys.Uid))
	if u, err := user.LookupId(uid); err == nil {
		return u.Username
	}
	return uid
}

// dataDir is where the agent of a site keeps its journal and its control socket: config's default beside duri.yaml.
func dataDir(configFile string) string { return filepath.Join(filepath.Dir(configFile), "data") }

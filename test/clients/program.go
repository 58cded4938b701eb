package clients

import (
	"bytes"
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
	"syscall"
	"time"
)

// Program is a client. Its command is told by libpq's environment (PGHOST and so on) where to connect, and its output is
// what is compared.
type Program struct {
	Name string
	// Command is run by a shell, with the folder testdata as working directory; $PY, $NODE_PATH, $CLASSPATH and $TMP are set.
	Command string
	Role    string        // empty: the ordinary one
	Within  time.Duration // 0: two minutes
	// Moves is how many transactions each site must have had at least, so that it is known that the program was moved.
	Moves int
	Needs []Need
}

// Need is what a program needs on the machine.
type Need struct{ Path, Package string }

// lacking names what is not there, and how to get it.
func (p *Program) lacking() error {
	var packages []string
	for _, n := range p.Needs {
		if _, err := os.Stat(n.Path); err == nil {
			continue
		}
		if _, err := exec.LookPath(n.Path); err != nil || strings.Contains(n.Path, "/") {
			packages = append(packages, n.Package)
		}
	}
	if len(packages) > 0 {
		slices.Sort(packages)
		return fmt.Errorf("%s cannot run here; hint: apt-get install %s (or: make programs)", p.Name, strings.Join(slices.Compact(packages), " "))
	}
	return nil
}

// way is how a program is led to PostgreSQL.
type way struct{ name, host, port string }

func (s *Sites) ways() []way {
	host, port, _ := net.SplitHostPort(s.Gateway.Address)
	return []way{{"direct", "127.0.0.1", strconv.Itoa(s.Servers[0].Port())}, {"gateway", host, port}}
}

// Result is what a program said in both ways.
type Result struct {
	Direct, Through string
	Took            [2]time.Duration
	Routed          map[string]int // transactions through the gateway, by site
}

// Run runs a program both ways, each with an empty database of its own, and compares. The error tells what differs.
func (s *Sites) Run(ctx context.Context, p Program, dirs Dirs) (Result, error) {
	var res Result
	if err := p.lacking(); err != nil {
		return res, err
	}
	database := "p_" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToLower(p.Name))
	for i, w := range s.ways() {
		if err := s.Database(ctx, database); err != nil {
			return res, err
		}
		begin := time.Now()
		out, err := s.run(ctx, p, w, database, dirs)
		res.Took[i] = time.Since(begin)
		if err != nil {
			return res, fmt.Errorf("%s, %s: %w\n%s", p.Name, w.name, err, tail(out))
		}
		if i == 0 {
			res.Direct = out
			continue
		}
		res.Through = out
		after, err := s.Gateway.Stats()
		if err != nil {
			return res, err
		}
		res.Routed = after.Routed[database]
	}
	if res.Direct != res.Through {
		return res, fmt.Errorf("%s says other things through the gateway:\n%s", p.Name, difference(res.Direct, res.Through))
	}
	for _, site := range []string{"a", "b"} {
		if res.Routed[site] < max(p.Moves, 1) {
			return res, fmt.Errorf("%s was not moved: %v transactions at the sites", p.Name, res.Routed)
		}
	}
	if strings.TrimSpace(res.Direct) == "" {
		return res, fmt.Errorf("%s has said nothing", p.Name)
	}
	return res, nil
}

// Dirs is where programs find what they need.
type Dirs struct {
	Testdata string // the folder with the scripts
	Node     string // a folder with node_modules; see InstallNode
}

func (s *Sites) run(ctx context.Context, p Program, w way, database string, dirs Dirs) (string, error) {
	within := p.Within
	if within == 0 {
		within = 2 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tmp, err := os.MkdirTemp("", "duri-clients-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	cmd := exec.CommandContext(ctx, "/bin/bash", "-euo", "pipefail", "-c", p.Command)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with what the shell has started
	cmd.Dir = dirs.Testdata
	role := p.Role
	if role == "" {
		role = appRole
	}
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "NODE_") })
	python := os.Getenv("DURI_PYTHON")
	if python == "" {
		python = debianPython
	}
	cmd.Env = append(cmd.Env,
		"PGHOST="+w.host, "PGPORT="+w.port, "PGDATABASE="+database, "PGUSER="+role, "PGPASSWORD="+password, "PGSSLMODE=disable",
		"PGPASSFILE="+filepath.Join(tmp, "none"), "PGCONNECT_TIMEOUT=30", "PSQLRC=/dev/null",
		"PATH="+s.Servers[0].BinDir()+":"+os.Getenv("PATH"), "NODE_NO_WARNINGS=1", "LC_ALL=C.UTF-8", "TZ=UTC", "TMP="+tmp, "TMPDIR="+tmp,
		"NODE_PATH="+filepath.Join(dirs.Node, "node_modules"), "CLASSPATH="+strings.Join(jars, ":"), "PY="+python, "PYTHONDONTWRITEBYTECODE=1",
	)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = errors.Join(err, fmt.Errorf("it was ended after %v", within))
	}
	return out.String(), err
}

// tail is the end of a long text.
func tail(s string) string {
	const most = 6000
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}

// difference shows where two texts part.
func difference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	i := 0
	for i < len(x) && i < len(y) && x[i] == y[i] {
		i++
	}
	part := func(lines []string) string {
		return strings.Join(lines[min(i, len(lines)):min(i+12, len(lines))], "\n")
	}
	return fmt.Sprintf("from line %d on, direct:\n%s\nthrough the gateway:\n%s", i+1, part(x), part(y))
}

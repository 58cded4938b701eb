package pair

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Pgbench runs PostgreSQL's pgbench as the superuser against a database and gives what it prints. A cluster whose
// programs have no pgbench is loaded by the one on PATH or of the distribution: its protocol is the same.
func Pgbench(ctx context.Context, c *pgcluster.Cluster, database string, args ...string) (string, error) {
	program, err := findPgbench(c.BinDir())
	if err != nil {
		return "", err
	}
	args = append([]string{"-h", "127.0.0.1", "-p", strconv.Itoa(c.Port()), "-U", c.Superuser()}, append(args, database)...)
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("pgbench: %w: %s", err, out)
	}
	return string(out), nil
}

// findPgbench prefers the server's own directory of programs.
func findPgbench(binDir string) (string, error) {
	own := filepath.Join(binDir, "pgbench")
	if _, err := os.Stat(own); err == nil {
		return own, nil
	}
	path, err := exec.LookPath("pgbench")
	if err == nil {
		return path, nil
	}
	if dir, err := pgcluster.FindBinDir(""); err == nil {
		if other := filepath.Join(dir, "pgbench"); other != own {
			return other, nil
		}
	}
	return "", fmt.Errorf("find pgbench: %w; install it: apt-get install postgresql-contrib", err)
}

var (
	processed = regexp.MustCompile(`number of transactions actually processed: (\d+)`)
	failed    = regexp.MustCompile(`number of failed transactions: (\d+)`)
)

// PgbenchCounts reads from pgbench's output how many transactions it committed and how many it gave up; 0 where it does
// not say.
func PgbenchCounts(out string) (committed, gaveUp int) {
	return number(processed, out), number(failed, out)
}

func number(re *regexp.Regexp, text string) int {
	m := re.FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, _ := strconv.Atoi(m[1]) // all digits
	return n
}

// FindPgbench is the path of a pgbench.
func FindPgbench() (string, error) { return findPgbench("") }

// Logged is one line of pgbench's log: a transaction, when it ended and how long it took.
type Logged struct {
	At      time.Time
	Latency time.Duration
}

// TakePgbenchLog reads the files that a pgbench wrote with --log-prefix, and removes them.
func TakePgbenchLog(prefix string) ([]Logged, error) {
	files, err := filepath.Glob(prefix + ".*")
	if err != nil {
		return nil, err
	}
	var all []Logged
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		some, err := readPgbenchLog(f)
		if err := errors.Join(err, f.Close(), os.Remove(name)); err != nil {
			return nil, fmt.Errorf("read pgbench's log: %w", err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// readPgbenchLog reads lines of: client, number, latency in µs, script, second and µs of the end.
func readPgbenchLog(r io.Reader) ([]Logged, error) {
	var all []Logged
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 6 {
			return nil, fmt.Errorf("line %q is too short", lines.Text())
		}
		var n [3]int64
		for i, column := range []int{2, 4, 5} {
			v, err := strconv.ParseInt(f[column], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("line %q: %w", lines.Text(), err)
			}
			n[i] = v
		}
		all = append(all, Logged{time.Unix(n[1], n[2]*1000), time.Duration(n[0]) * time.Microsecond})
	}
	return all, lines.Err()
}

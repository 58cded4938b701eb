package pair

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"

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

package pair

import (
	"context"
	"os"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/pgcluster"
)

// EnvMajors names further PostgreSQLs, as for the tests: "16=/path/bin:17=/path/bin".
const EnvMajors = "DURI_PG_BINS"

// NewestPostgres finds the newest of the PostgreSQL that is installed and those of DURI_PG_BINS: the directory of its
// programs and its major.
func NewestPostgres(ctx context.Context) (binDir string, major int, err error) {
	installed, err := pgcluster.FindBinDir("")
	if err != nil {
		return "", 0, err
	}
	dirs := []string{installed}
	for item := range strings.SplitSeq(os.Getenv(EnvMajors), ":") {
		if _, dir, ok := strings.Cut(item, "="); ok {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		version, err := pgcluster.ProgramVersion(ctx, dir)
		if err != nil {
			return "", 0, err
		}
		if m := majorOf(version); m > major {
			binDir, major = dir, m
		}
	}
	return binDir, major, nil
}

// majorOf reads the digits at the start of "15.20", "19beta1" or "20devel"; 0 when there are none.
func majorOf(version string) int {
	end := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(version)
	}
	n, err := strconv.Atoi(version[:end])
	if err != nil {
		return 0
	}
	return n
}

package pgtest

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/duri-io/duri/internal/pgcluster"
)

// EnvMajors names the environment variable with further majors to test: "16=/path/bin:17=/path/bin".
const EnvMajors = "DURI_PG_BINS"

// Major is a major version of PostgreSQL that can be run here.
type Major struct {
	Number int
	BinDir string
}

// String names the major, for t.Run.
func (m Major) String() string { return "pg" + strconv.Itoa(m.Number) }

// Majors lists the majors to test, ascending: the one that pgcluster.FindBinDir finds and those of DURI_PG_BINS. One that
// is named and cannot be run, or is of another major than named, fails the test.
func Majors(t testing.TB) []Major {
	t.Helper()
	named, err := parseMajors(os.Getenv(EnvMajors))
	if err != nil {
		t.Fatalf("pgtest: read %s: %v\nhint: its form is 16=/path/bin:17=/path/bin.", EnvMajors, err)
	}
	for _, m := range named {
		if err := m.check(t.Context()); err != nil {
			t.Fatalf("pgtest: read %s: %v", EnvMajors, err)
		}
	}
	binDir, err := pgcluster.FindBinDir("")
	if err != nil {
		fatal(t, err)
	}
	number, err := majorOf(t.Context(), binDir)
	if err != nil {
		fatal(t, err)
	}
	return merge(Major{number, binDir}, named)
}

// check runs the programs and compares their major with the one that was named.
func (m Major) check(ctx context.Context) error {
	if _, err := pgcluster.FindBinDir(m.BinDir); err != nil {
		return fmt.Errorf("major %d: %w", m.Number, err)
	}
	got, err := majorOf(ctx, m.BinDir)
	if err == nil && got != m.Number {
		err = fmt.Errorf("%s holds major %d", m.BinDir, got)
	}
	if err != nil {
		return fmt.Errorf("major %d: %w", m.Number, err)
	}
	return nil
}

// majorOf asks the programs for their major version.
func majorOf(ctx context.Context, binDir string) (int, error) {
	version, err := pgcluster.ProgramVersion(ctx, binDir)
	if err != nil {
		return 0, err
	}
	return parseMajor(version)
}

// parseMajor reads the digits at the start of "15.20", "19beta1" or "20devel".
func parseMajor(version string) (int, error) {
	end := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(version)
	}
	n, err := strconv.Atoi(version[:end])
	if err != nil {
		return 0, fmt.Errorf("version %q does not begin with a major", version)
	}
	return n, nil
}

// parseMajors reads the form of EnvMajors.
func parseMajors(s string) ([]Major, error) {
	var majors []Major
	for item := range strings.SplitSeq(s, ":") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		number, dir, ok := strings.Cut(item, "=")
		n, err := strconv.Atoi(number)
		if !ok || err != nil || n <= 0 || !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%q is not MAJOR=/absolute/directory", item)
		}
		if slices.ContainsFunc(majors, func(m Major) bool { return m.Number == n }) {
			return nil, fmt.Errorf("major %d is named twice", n)
		}
		majors = append(majors, Major{n, dir})
	}
	return majors, nil
}

// merge sorts the majors; a named one takes the place of the found one.
func merge(found Major, named []Major) []Major {
	majors := slices.Clone(named)
	if !slices.ContainsFunc(named, func(m Major) bool { return m.Number == found.Number }) {
		majors = append(majors, found)
	}
	slices.SortFunc(majors, func(a, b Major) int { return cmp.Compare(a.Number, b.Number) })
	return majors
}

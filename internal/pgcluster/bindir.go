package pgcluster

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// EnvBinDir names the environment variable that holds the directory of PostgreSQL's programs.
const EnvBinDir = "DURI_PG_BIN"

// programs are what a directory must hold to count as PostgreSQL's.
var programs = []string{"postgres", "initdb", "pg_ctl"}

// installed lists where distributions put PostgreSQL: Debian and Ubuntu, then the PostgreSQL project's RPMs. Neither
// puts the server's programs on PATH.
var installed = []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"}

// FindBinDir finds the directory with postgres, initdb and pg_ctl: the explicit one, else $DURI_PG_BIN, else that of
// the `postgres` on PATH (symbolic links followed), else the newest major where distributions install it. A directory
// that is named explicitly or by the variable and is not PostgreSQL's is an error, never passed over.
func FindBinDir(explicit string) (string, error) {
	const op = "find PostgreSQL's programs"
	if explicit != "" {
		if err := checkBinDir(explicit); err != nil {
			return "", &Error{op, err, "name the directory that holds " + strings.Join(programs, ", ") + "."}
		}
		return filepath.Abs(explicit)
	}
	if dir := os.Getenv(EnvBinDir); dir != "" {
		if err := checkBinDir(dir); err != nil {
			return "", &Error{op, fmt.Errorf("%s: %w", EnvBinDir, err), "correct or unset " + EnvBinDir + "."}
		}
		return filepath.Abs(dir)
	}
	if dir, ok := binDirOnPath(); ok {
		return dir, nil
	}
	var found []string
	for _, pattern := range installed {
		dirs, _ := filepath.Glob(pattern) // The pattern is a constant, so it cannot be malformed.
		for _, dir := range dirs {
			if checkBinDir(dir) == nil {
				found = append(found, dir)
			}
		}
	}
	if dir, ok := newest(found); ok {
		return dir, nil
	}
	return "", &Error{
		op, fmt.Errorf("no postgres on PATH and none in %s", strings.Join(installed, " or ")),
		"install it (apt-get install postgresql) or set " + EnvBinDir + " to its bin directory.",
	}
}

// checkBinDir says which of the programs dir lacks.
func checkBinDir(dir string) error {
	var missing []string
	for _, p := range programs {
		st, err := os.Stat(filepath.Join(dir, p))
		if err != nil || st.IsDir() || st.Mode()&0o111 == 0 {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s does not hold %s", dir, strings.Join(missing, ", "))
	}
	return nil
}

// binDirOnPath follows the `postgres` on PATH to the directory it really lives in. PostgreSQL finds its share and lib
// directories relative to that.
func binDirOnPath() (string, bool) {
	path, err := exec.LookPath("postgres")
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return "", false
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", false
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil || checkBinDir(dir) != nil {
		return "", false
	}
	return dir, true
}

// newest picks the directory of the highest major, which is the only number in each path.
func newest(dirs []string) (string, bool) {
	if len(dirs) == 0 {
		return "", false
	}
	return slices.MaxFunc(dirs, func(a, b string) int { return cmp.Compare(majorInPath(a), majorInPath(b)) }), true
}

// majorInPath reads the major version that a path such as /usr/lib/postgresql/17/bin or /usr/pgsql-17/bin names; 0
// when it names none.
func majorInPath(path string) int {
	name := strings.TrimPrefix(filepath.Base(filepath.Dir(path)), "pgsql-")
	n, err := strconv.Atoi(name)
	if err != nil {
		return 0
	}
	return n
}

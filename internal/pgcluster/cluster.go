package pgcluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Options say how a cluster is made. The zero value is a good one.
type Options struct {
	// BinDir is the directory of PostgreSQL's programs; empty: see FindBinDir.
	BinDir string
	// Dir is the directory to make; it may exist if it is empty. Empty means a new one below os.TempDir. Everything in
	// it belongs to the cluster and Destroy removes it.
	Dir string
	// Port on 127.0.0.1; 0 chooses a free one, which the cluster then keeps for life.
	Port int
	// Settings are parameters for postgresql.conf that override the defaults (wal_level=logical,
	// track_commit_timestamp=on, 20 WAL senders and slots).
	Settings map[string]string
	// Superuser is the name of the bootstrap role; empty means postgres.
	Superuser string
	// Password makes TCP connections ask for SCRAM passwords and is the superuser's. Empty: 127.0.0.1 is trusted.
	Password string
	// Detach leaves the server running when this program ends. Without it the server ends with the program.
	Detach bool
	// Template is the DataDir of a cluster that was created with the same programs and Superuser, without a password,
	// and never started. It is copied instead of running initdb, and the copy gets a system identifier of its own.
	Template string
	// StandbyOf is the connection string of a running server, without a database, of which the cluster becomes a physical
	// standby: it is copied instead of running initdb, and followed by that connection from the first start on. The other
	// server has the same programs and Superuser. Not with Template or Password.
	StandbyOf string
}

// Cluster is one PostgreSQL cluster: a directory and, while it runs, a server.
type Cluster struct {
	opts  Options
	dir   string
	as    runAs
	port  int
	lease *portLease // nil when another program holds it

	opMu sync.Mutex // orders Start and Destroy; see the package comment

	mu       sync.Mutex // guards the rest
	child    *child     // the last server that this Cluster started; nil before the first
	segments []segment
}

// Bounds of the waits that have no deadline in their context.
const (
	initTimeoutMax  = 2 * time.Minute
	startTimeoutMax = 3 * time.Minute // Crash recovery comes before the first answer.
	stopTimeoutMax  = 3 * time.Minute // A fast shutdown writes a checkpoint, and waits for WAL senders.
	killTimeoutMax  = 30 * time.Second
)

// Create makes a cluster (initdb: UTF8, locale C.UTF-8) and does not start it. When it fails it leaves nothing behind.
func Create(ctx context.Context, opts Options) (*Cluster, error) {
	c, err := newCluster(opts)
	if err != nil {
		return nil, err
	}
	madeDir, err := c.makeDir()
	if err != nil {
		return nil, err
	}
	if err := c.fill(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("create a PostgreSQL cluster in %s: %w", c.dir, err), c.undoCreate(madeDir))
	}
	return c, nil
}

// Open takes over a cluster that an earlier program made with Create, running or not. BinDir, Superuser, Password and
// Detach are as at its creation; Port, Settings, Template and StandbyOf are not looked at.
func Open(ctx context.Context, opts Options) (*Cluster, error) {
	if opts.Dir == "" {
		return nil, errors.New("open a PostgreSQL cluster: no directory named")
	}
	c, err := newCluster(opts)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(c.DataDir(), confName)); err != nil {
		return nil, fmt.Errorf("open the PostgreSQL cluster in %s: %w", c.dir, err)
	}
	out, err := c.run(ctx, "postgres", "-D", c.DataDir(), "-C", "port")
	if err != nil {
		return nil, fmt.Errorf("open the PostgreSQL cluster in %s: %w", c.dir, err)
	}
	if c.port, err = strconv.Atoi(strings.TrimSpace(out)); err != nil {
		return nil, fmt.Errorf("open the PostgreSQL cluster in %s: read its port: %w", c.dir, err)
	}
	c.lease, _ = leasePort(c.port) // The lease only keeps others from choosing the port; Start checks the port itself.
	if pid := c.PID(); pid != 0 {
		c.segments = segmentsOf(pid)
	}
	return c, nil
}

// newCluster checks the options and fills in what they leave open. It touches no file.
func newCluster(opts Options) (*Cluster, error) {
	var err error
	if opts.BinDir, err = FindBinDir(opts.BinDir); err != nil {
		return nil, err
	}
	if opts.Superuser == "" {
		opts.Superuser = "postgres"
	}
	if strings.ContainsAny(opts.Password, "\n\r\x00") {
		return nil, errors.New("create a PostgreSQL cluster: the password has a line break or a zero byte")
	}
	if opts.Port < 0 || opts.Port > 65535 {
		return nil, fmt.Errorf("create a PostgreSQL cluster: port %d is not between 1 and 65535", opts.Port)
	}
	if opts.Template != "" && opts.Password != "" {
		return nil, errors.New("create a PostgreSQL cluster: a template has no password; leave out one of the two")
	}
	if opts.StandbyOf != "" && (opts.Template != "" || opts.Password != "") {
		return nil, errors.New("create a PostgreSQL cluster: a standby has its primary's content and passwords; leave out template and password")
	}
	as, err := chooseUser(os.Geteuid(), user.Lookup)
	if err != nil {
		return nil, err
	}
	c := &Cluster{opts: opts, as: as}
	if opts.Dir != "" {
		// Processes are recognized by their current directory, which the kernel shows without symbolic links.
		if c.dir, err = realPath(opts.Dir); err != nil {
			return nil, fmt.Errorf("create a PostgreSQL cluster: %w", err)
		}
	}
	return c, nil
}

// realPath makes a path absolute and follows the symbolic links of its longest part that exists.
func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	real, err := filepath.EvalSymlinks(abs)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return real, err
	}
	parent, err := realPath(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// socketPathMax is the longest path of a Unix-domain socket on Linux (sun_path without the final zero).
const socketPathMax = 107

// makeDir makes the cluster's directory, owned by the user that runs the server, and reports whether it was new.
func (c *Cluster) makeDir() (made bool, err error) {
	if c.dir == "" {
		tmp, err := realPath(os.TempDir())
		if err != nil {
			return false, fmt.Errorf("make a temporary directory for PostgreSQL: %w", err)
		}
		if c.dir, err = os.MkdirTemp(tmp, "duri-pg-"); err != nil {
			return false, fmt.Errorf("make a temporary directory for PostgreSQL: %w", err)
		}
		made = true
	}
	if longest := filepath.Join(c.dir, ".s.PGSQL.65535"); len(longest) > socketPathMax {
		return made, errors.Join(&Error{
			"use " + c.dir + " for PostgreSQL",
			fmt.Errorf("the path of its socket would have %d bytes, and the system allows %d", len(longest), socketPathMax),
			"choose a directory with a shorter path.",
		}, c.undoCreate(made))
	}
	if !made {
		if made, err = makeEmptyDir(c.dir); err != nil {
			return false, fmt.Errorf("make a directory for PostgreSQL: %w", err)
		}
	}
	if err := errors.Join(c.as.checkSearchable(c.dir), os.Chmod(c.dir, 0o700), c.as.own(c.dir)); err != nil {
		return made, errors.Join(err, c.undoCreate(made))
	}
	return made, nil
}

// makeEmptyDir makes dir and its parents; a dir that exists must be empty.
func makeEmptyDir(dir string) (made bool, err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return false, err
		}
		return true, os.Mkdir(dir, 0o700)
	case err != nil:
		return false, err
	case len(entries) > 0:
		return false, &Error{"use " + dir, errors.New("it is not empty"), "remove it or choose another directory."}
	}
	return false, nil
}

// undoCreate removes what Create made: the directory, or only its content when it was there before.
func (c *Cluster) undoCreate(madeDir bool) error {
	c.lease.release()
	if madeDir {
		return os.RemoveAll(c.dir)
	}
	entries, err := os.ReadDir(c.dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(c.dir, e.Name())))
	}
	return err
}

// confName is our configuration file, which postgresql.conf includes as its last line.
const confName = "duri.conf"

// fill makes the data directory and its configuration.
func (c *Cluster) fill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, initTimeoutMax)
	defer cancel()
	if err := c.choosePort(); err != nil {
		return err
	}
	conf, err := renderConf(c.opts.Settings, c.port, c.dir)
	if err != nil {
		return err
	}
	switch {
	case c.opts.StandbyOf != "":
		err = c.basebackup(ctx)
	case c.opts.Template != "":
		err = c.copyTemplate(c.opts.Template)
	default:
		err = c.initdb(ctx)
	}
	if err != nil {
		return err
	}
	return errors.Join(
		c.writeFile(filepath.Join(c.DataDir(), confName), conf),
		c.writeFile(filepath.Join(c.DataDir(), "pg_hba.conf"), renderHBA(c.opts.Password != "")),
		c.writeFile(c.LogPath(), ""),
	)
}

// choosePort sets the port and reserves it.
func (c *Cluster) choosePort() (err error) {
	if c.opts.Port != 0 {
		c.port = c.opts.Port
		// Somebody else's lease is no obstacle: the user named this port, and Start checks whether it is free.
		c.lease, _ = leasePort(c.port)
		return nil
	}
	if c.lease, err = leaseFreePort(); err != nil {
		return err
	}
	c.port = c.lease.port
	return nil
}

// initdb runs initdb and makes postgresql.conf include our file.
func (c *Cluster) initdb(ctx context.Context) error {
	args := []string{
		"--pgdata=" + c.DataDir(), "--encoding=UTF8", "--locale=C.UTF-8", "--username=" + c.opts.Superuser,
		"--auth=trust", "--no-sync", "--no-instructions",
	}
	if c.opts.Password != "" {
		// By a file, because arguments can be read by every user of the machine.
		pwfile := filepath.Join(c.dir, "password")
		if err := c.writeFile(pwfile, c.opts.Password+"\n"); err != nil {
			return err
		}
		defer os.Remove(pwfile)
		args = append(args, "--pwfile="+pwfile)
	}
	_, err := c.run(ctx, "initdb", args...)
	if err != nil && ctx.Err() == nil && strings.Contains(err.Error(), "invalid locale name") {
		// Systems without C.UTF-8 (some minimal images) have C always; only the order of text and upper/lower case of
		// non-ASCII letters differ.
		args[2] = "--locale=C"
		_, err = c.run(ctx, "initdb", args...)
	}
	if err != nil {
		return err
	}
	return appendFile(filepath.Join(c.DataDir(), "postgresql.conf"), "\ninclude '"+confName+"'\n")
}

// basebackup copies the primary's data directory, with the signal file and the connection of a standby. The copy includes
// our file, which fill then writes with this cluster's port.
func (c *Cluster) basebackup(ctx context.Context) error {
	_, err := c.run(ctx, "pg_basebackup", "--pgdata="+c.DataDir(), "--dbname="+c.opts.StandbyOf, "--write-recovery-conf",
		"--wal-method=stream", "--checkpoint=fast", "--no-password", "--no-sync")
	return err
}

// run runs one of PostgreSQL's programs as the cluster's user and gives its output; the error holds its last messages.
func (c *Cluster) run(ctx context.Context, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.opts.BinDir, program), args...)
	cmd.Dir = c.dir
	cmd.Env = environment()
	// initdb starts postgres itself; a cancelled run ends the whole process group.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.as.credential(), Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = killTimeoutMax
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("run %s: %w\n%s", program, err, tail(stdout.String()+"\n"+stderr.String(), 10))
	}
	return stdout.String(), nil
}

// environment is the program's own, without the variables by which libpq and postgres would be led to another cluster.
func environment() []string {
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		return strings.HasPrefix(kv, "PG") || strings.HasPrefix(kv, "LC_") || strings.HasPrefix(kv, "LANG")
	})
	return append(env, "LC_ALL=C") // Messages in English: some are recognized.
}

// writeFile writes a file for the cluster's user only.
func (c *Cluster) writeFile(path, content string) error {
	return errors.Join(os.WriteFile(path, []byte(content), 0o600), os.Chmod(path, 0o600), c.as.own(path))
}

func appendFile(path, content string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	return errors.Join(err, f.Close())
}

// Dir is the cluster's directory, absolute and without symbolic links.
func (c *Cluster) Dir() string { return c.dir }

// DataDir is PGDATA.
func (c *Cluster) DataDir() string { return filepath.Join(c.dir, "data") }

// LogPath is the file with the server's messages of all its lives.
func (c *Cluster) LogPath() string { return filepath.Join(c.dir, "log") }

// SocketDir is the directory of the Unix-domain socket, for host= in a connection string.
func (c *Cluster) SocketDir() string { return c.dir }

// BinDir is the directory of the PostgreSQL programs that the cluster runs with.
func (c *Cluster) BinDir() string { return c.opts.BinDir }

// Superuser is the name of the bootstrap role.
func (c *Cluster) Superuser() string { return c.opts.Superuser }

// Port is the TCP port on 127.0.0.1. It does not change.
func (c *Cluster) Port() int { return c.port }

// DSN is a keyword/value connection string over TCP for a database and a role; an empty role means the superuser. It
// holds the password for the superuser only.
func (c *Cluster) DSN(db, role string) string {
	if role == "" {
		role = c.opts.Superuser
	}
	dsn := fmt.Sprintf("host=127.0.0.1 port=%d dbname=%s user=%s sslmode=disable", c.port, dsnQuote(db), dsnQuote(role))
	if c.opts.Password != "" && role == c.opts.Superuser {
		dsn += " password=" + dsnQuote(c.opts.Password)
	}
	return dsn
}

// Version is the version of the programs, such as "15.20". The server need not run.
func (c *Cluster) Version(ctx context.Context) (string, error) {
	return ProgramVersion(ctx, c.opts.BinDir)
}

// ProgramVersion is the version of the PostgreSQL in a directory of programs, such as "15.20" or "19rc1".
func ProgramVersion(ctx context.Context, binDir string) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(binDir, "postgres"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s/postgres for its version: %w", binDir, err)
	}
	return parseVersion(string(out))
}

// parseVersion reads "postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)".
func parseVersion(out string) (string, error) {
	_, rest, ok := strings.Cut(out, "(PostgreSQL) ")
	f := strings.Fields(rest)
	if !ok || len(f) == 0 {
		return "", fmt.Errorf("%q is not the version line of a PostgreSQL", strings.TrimSpace(out))
	}
	return f[0], nil
}

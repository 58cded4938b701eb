package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/duri-io/duri/internal/pgcluster"
)

// Options say how a demo is run. The zero value is a good one.
type Options struct {
	// Duration is how long the clients write; 0: a minute. Making and comparing the sites comes on top, about 20 s.
	Duration time.Duration
	// Dir is the directory to make; it must not exist. Empty: a new one below os.TempDir.
	Dir string
	// BinDir is the directory of PostgreSQL's programs; empty: see pgcluster.FindBinDir.
	BinDir string
	// Program is the duri binary that the agents run; empty: the running program.
	Program string
	// PortBase is the first of six consecutive ports on 127.0.0.1: PostgreSQL of A and B, agent of A and B, gateways of both
	// applications. 0: free ones. With RPO0 there are twelve: voters of A, B and the witness (two each).
	PortBase int
	// RPO0 adds a witness, and lets commits wait until the other site has them.
	RPO0 bool
	// Kill is what dies at A: one of the Kill constants; empty: KillSite.
	Kill string
	// Clients per site; 0: 4. Rate is payments per second and site; 0: 200.
	Clients, Rate int
	// Seed of what the clients do; 0: a random one. The report names it. When clients meet is up to the machine.
	Seed uint64
	// Keep leaves servers and agents running when Run returns without an error, whatever the verdict; see Stop.
	Keep bool
	// Out gets the live progress; nil: nobody. A terminal gets a panel, anything else lines.
	Out io.Writer
	// NoColour switches colour off on a terminal too.
	NoColour bool
}

// What may die at A.
const (
	KillSite     = "site" // PostgreSQL and agent, at once
	KillPostgres = "postgres"
	KillAgent    = "agent"
)

// Kills lists what may die at A.
func Kills() []string { return []string{KillSite, KillPostgres, KillAgent} }

// Limits of Options, and what a demo needs.
const (
	durationMin = 5 * time.Second
	clientsMax  = 20 // per site: below the servers' max_connections
	rateMax     = 5000
	diskMin     = 1 << 30 // bytes
	versionMin  = 15      // PostgreSQL major
)

func (o *Options) defaults() {
	if o.Duration == 0 {
		o.Duration = time.Minute
	}
	if o.Clients == 0 {
		o.Clients = 4
	}
	if o.Rate == 0 {
		o.Rate = 200
	}
	if o.Seed == 0 {
		o.Seed = 1 + rand.Uint64N(1<<32)
	}
	if o.Kill == "" {
		o.Kill = KillSite
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
}

// check refuses what cannot work. It touches nothing.
func (o *Options) check() error {
	switch {
	case o.Duration < durationMin:
		return &Error{Msg: fmt.Sprintf("the duration %v is too short", o.Duration), Hint: fmt.Sprintf("give at least %v", durationMin)}
	case o.Clients < 1 || o.Clients > clientsMax:
		return &Error{Msg: fmt.Sprintf("%d clients per site are not possible", o.Clients), Hint: fmt.Sprintf("give 1 to %d", clientsMax)}
	case o.Rate < 1 || o.Rate > rateMax:
		return &Error{Msg: fmt.Sprintf("%d payments per second are not possible", o.Rate), Hint: fmt.Sprintf("give 1 to %d", rateMax)}
	case !slices.Contains(Kills(), o.Kill):
		return &Error{Msg: fmt.Sprintf("%q cannot be killed", o.Kill), Hint: "give one of " + strings.Join(Kills(), ", ")}
	case o.PortBase != 0 && (o.PortBase < 1024 || o.PortBase > 65535-o.portCount()+1):
		return &Error{Msg: fmt.Sprintf("port base %d is not possible", o.PortBase), Hint: fmt.Sprintf("give 1024 to %d", 65535-o.portCount()+1)}
	}
	return nil
}

// findPostgres gives the directory of PostgreSQL's programs and their version, and refuses one that is too old.
func findPostgres(ctx context.Context, binDir string) (dir, version string, err error) {
	if dir, err = pgcluster.FindBinDir(binDir); err != nil {
		return "", "", err
	}
	if version, err = pgcluster.ProgramVersion(ctx, dir); err != nil {
		return "", "", err
	}
	return dir, version, checkVersion(dir, version)
}

// checkVersion is pure. A version is "15.20", "19rc1" or "18devel".
func checkVersion(dir, version string) error {
	digits := strings.IndexFunc(version+".", func(r rune) bool { return r < '0' || r > '9' })
	major, err := strconv.Atoi(version[:digits])
	if err != nil {
		return fmt.Errorf("read the version of %s: %q is none", dir, version)
	}
	if major < versionMin {
		return &Error{
			Msg:  fmt.Sprintf("PostgreSQL in %s is version %s, and duri needs %d or later", dir, version, versionMin),
			Hint: "install a newer one, or name its programs with --pg-bin",
		}
	}
	return nil
}

// ports are the demo's, on 127.0.0.1.
type ports struct {
	postgres, agent, gateway [2]int
	voter                    [6]int // peer and client of A, B and the witness
}

// portCount is how many of them are used.
func (o Options) portCount() int {
	if o.RPO0 {
		return 12
	}
	return 6
}

func portsFrom(base int) ports {
	p := ports{postgres: [2]int{base, base + 1}, agent: [2]int{base + 2, base + 3}, gateway: [2]int{base + 4, base + 5}}
	for i := range p.voter {
		p.voter[i] = base + 6 + i
	}
	return p
}

// choosePorts takes the named block, or finds a free one. It looks below the ephemeral ports, which any outgoing
// connection may take while a site is down, and below those that pgcluster chooses by itself.
func choosePorts(base, n int) (ports, error) {
	if base != 0 {
		return portsFrom(base), checkPorts(base, n)
	}
	const from, to, attempts = 10000, 19999, 200
	var err error
	for range attempts {
		base = from + rand.IntN((to-from)/n)*n
		if err = checkPorts(base, n); err == nil {
			return portsFrom(base), nil
		}
	}
	return ports{}, err
}

// checkPorts tries to listen on each port of a block.
func checkPorts(base, n int) error {
	for port := base; port < base+n; port++ {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			return &Error{
				Msg:  fmt.Sprintf("port %d is in use", port),
				Hint: fmt.Sprintf("name another first port with --port-base, or see who listens: ss -ltnp 'sport = :%d'", port),
			}
		case err != nil:
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
		if err := l.Close(); err != nil {
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
	}
	return nil
}

// makeDir makes the demo's directory and gives its path, absolute and without symbolic links. Started by root, the
// servers run as another user, who must be able to pass through it.
func makeDir(dir string) (string, error) {
	var err error
	if dir == "" {
		if err := checkDisk(os.TempDir()); err != nil {
			return "", err
		}
		if dir, err = os.MkdirTemp("", "duri-demo-"); err != nil {
			return "", fmt.Errorf("make a temporary directory: %w", err)
		}
	} else if err := makeNamedDir(dir); err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		return "", errors.Join(fmt.Errorf("make the demo's directory: %w", err), os.Remove(dir))
	}
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("make the demo's directory: %w", err), os.Remove(dir))
	}
	return abs, nil
}

func makeNamedDir(dir string) error {
	if _, err := os.Lstat(dir); err == nil {
		return &Error{
			Msg:  "directory " + dir + " exists already",
			Hint: "name a new one with --dir; if it is from an earlier demo, remove it with: duri demo --stop " + dir,
		}
	}
	if err := checkDisk(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		return &Error{Msg: "make the demo's directory", Err: err, Hint: "name a directory whose parent exists and is writable with --dir"}
	}
	return nil
}

// checkDisk looks whether there is room for two servers.
func checkDisk(dir string) error {
	var fsys unix.Statfs_t
	err := unix.Statfs(dir, &fsys)
	if errors.Is(err, fs.ErrNotExist) {
		return &Error{Msg: "look at the disk of " + dir, Err: err, Hint: "name a directory whose parent exists with --dir"}
	}
	if err != nil {
		return fmt.Errorf("look at the disk of %s: %w", dir, err)
	}
	return enoughDisk(dir, fsys.Bavail*uint64(fsys.Bsize))
}

// enoughDisk is pure.
func enoughDisk(dir string, free uint64) error {
	if free >= diskMin {
		return nil
	}
	return &Error{
		Msg:  fmt.Sprintf("only %d MiB are free at %s, and two servers need %d", free>>20, dir, diskMin>>20),
		Hint: "free some space, or name a directory on another disk with --dir",
	}
}

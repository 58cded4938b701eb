package kills

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pair"
)

// Kinds of faults.
const (
	killServer  = "kill -9 of PostgreSQL"
	killBackend = "kill -9 of one session" // the server then restarts all by itself
	stopServer  = "SIGSTOP of PostgreSQL"
	killAgent   = "kill -9 of the agent"
	stopAgent   = "SIGSTOP of the agent"
	killSite    = "kill -9 of the site"
	stopSite    = "SIGSTOP of the site"
	cutLink     = "cut of the link"
	cutOneWay   = "one-way cut of the link"
	resetLink   = "reset of the link"
	killWitness = "kill -9 of the witness"
	fastStop    = "fast stop of PostgreSQL"
	cancelWait  = "cancel of waiting commits"
	endWait     = "termination of waiting commits"
	diskFull    = "full disk of the journal"
	diskHangs   = "hanging disk of the journal"
	takeOver    = "takeover of the agent" // planned; only where it is asked for, as it needs gateways
)

// Kinds lists them all.
func Kinds() []string {
	return []string{
		killServer, killBackend, stopServer, killAgent, stopAgent, killSite, stopSite, cutLink, cutOneWay, resetLink, killWitness,
		fastStop, cancelWait, endWait, diskFull, diskHangs,
	}
}

// needDisk reports kinds that need pair.Options.DiskBytes.
func needDisk(kind string) bool { return kind == diskFull || kind == diskHangs }

// fault is one of them, at a site (its number; of no meaning for the witness) or at its link to another one, for a while.
type fault struct {
	kind        string
	site, other int
	length      time.Duration
}

func (f *fault) String() string {
	where := fmt.Sprintf(" of site %d", f.site+1)
	switch f.kind {
	case killWitness:
		where = ""
	case cutLink, cutOneWay, resetLink:
		where += fmt.Sprintf(" to site %d", f.other+1)
	}
	return fmt.Sprintf("%s%s for %s", f.kind, where, f.length)
}

func (c *campaign) choose() *fault {
	n := len(c.p.Sites)
	f := &fault{kind: c.o.Faults[c.rng.IntN(len(c.o.Faults))], site: c.rng.IntN(n)}
	f.other = (f.site + 1 + c.rng.IntN(n-1)) % n
	f.length = time.Duration(200+c.rng.IntN(4000)) * time.Millisecond
	return f
}

func (f *fault) begin(ctx context.Context, p *pair.Pair) error {
	s, other := p.Sites[f.site], p.Sites[f.other]
	there, back := p.Link(s.Name, other.Name), p.Link(other.Name, s.Name)
	switch f.kind {
	case killServer:
		return s.Cluster.Kill()
	case killBackend:
		return killSession(ctx, s)
	case stopServer:
		return s.Cluster.Signal(syscall.SIGSTOP)
	case killAgent:
		return s.SignalAgent(syscall.SIGKILL)
	case stopAgent:
		return s.SignalAgent(syscall.SIGSTOP)
	case killSite:
		return errors.Join(s.SignalAgent(syscall.SIGKILL), s.Cluster.Kill())
	case stopSite:
		return errors.Join(s.SignalAgent(syscall.SIGSTOP), s.Cluster.Signal(syscall.SIGSTOP))
	case cutLink:
		there.Cut()
		back.Cut()
	case cutOneWay:
		there.Drop(faultnet.ToTarget)
	case resetLink:
		there.Reset()
		back.Reset()
	case killWitness:
		return p.Witness.Signal(syscall.SIGKILL)
	case fastStop:
		return s.Cluster.Stop(ctx, "fast")
	case cancelWait, endWait:
		eachLink(p, s, (*faultnet.Relay).Cut) // so that commits wait
		return disturbWaiters(ctx, s, f.kind == endWait)
	case diskFull:
		return s.Disk.Fill()
	case diskHangs:
		return s.Disk.Hang()
	case takeOver:
		_, err := s.TakeOverAgent("--drain", "5s")
		return err
	default:
		return fmt.Errorf("there is no fault %q; there are %s", f.kind, strings.Join(Kinds(), ", "))
	}
	return nil
}

func (f *fault) end(ctx context.Context, p *pair.Pair) error {
	s := p.Sites[f.site]
	switch f.kind {
	case killServer, fastStop:
		return s.Cluster.Start(ctx)
	case stopServer:
		return s.Cluster.Signal(syscall.SIGCONT)
	case killAgent:
		return s.RestartAgent()
	case stopAgent:
		return s.SignalAgent(syscall.SIGCONT)
	case killSite:
		return errors.Join(s.Cluster.Start(ctx), s.RestartAgent())
	case stopSite:
		return errors.Join(s.Cluster.Signal(syscall.SIGCONT), s.SignalAgent(syscall.SIGCONT))
	case diskFull:
		return s.Disk.Free()
	case diskHangs:
		return s.Disk.Thaw()
	case cancelWait, endWait:
		eachLink(p, s, (*faultnet.Relay).Heal)
	case cutLink, cutOneWay:
		p.Link(s.Name, p.Sites[f.other].Name).Heal()
		p.Link(p.Sites[f.other].Name, s.Name).Heal()
	case killWitness:
		return p.Witness.Start()
	}
	return nil
}

// eachLink does something to all links of a site, in both directions.
func eachLink(p *pair.Pair, s *pair.Site, do func(*faultnet.Relay)) {
	for _, o := range p.Sites {
		if o != s {
			do(p.Link(s.Name, o.Name))
			do(p.Link(o.Name, s.Name))
		}
	}
}

// killSession kills a client's session, one that is in the midst of something if there is one.
func killSession(ctx context.Context, s *pair.Site) error {
	rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT pid FROM pg_stat_activity WHERE usename = '"+role+"' ORDER BY wait_event = 'SyncRep' DESC NULLS LAST, state = 'active' DESC LIMIT 1")
	if err != nil || len(rows) == 0 {
		return nil //nolint:nilerr // there is nobody to kill: the server is about to come back from the fault before
	}
	pid, err := strconv.Atoi(rows[0][0])
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// disturbWaiters ends the wait of every commit that waits at a site, as a person does who sees sessions hang: the commits
// become visible without a receipt. It waits for some to wait.
func disturbWaiters(ctx context.Context, s *pair.Site, end bool) error {
	const some = time.Second
	f := "pg_cancel_backend"
	if end {
		f = "pg_terminate_backend"
	}
	for begun := time.Now(); time.Since(begun) < some; {
		rows, err := s.Cluster.QueryText(ctx, s.Database, "SELECT "+f+"(pid) FROM pg_stat_activity WHERE usename = '"+role+"' AND wait_event = 'SyncRep'")
		if err == nil && len(rows) > 1 { // an error: the server is about to come back from the fault before
			return nil
		}
		sleep(ctx, 10*time.Millisecond)
	}
	return nil // the site was not the one that waits
}

// CheckKinds says which name is no kind of fault.
func CheckKinds(names []string) error {
	for _, n := range names {
		if n != takeOver && !slices.Contains(Kinds(), n) {
			return fmt.Errorf("there is no fault %q; there are %s, and with gateways %s", n, strings.Join(Kinds(), ", "), takeOver)
		}
	}
	return nil
}

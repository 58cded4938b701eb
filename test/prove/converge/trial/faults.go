package trial

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/duri-io/duri/internal/faultnet"
)

// disturb makes the faults when their time has come, each beside the load and beside others. load ends with the load;
// faults that have begun then go on to their end, so that everything runs and is connected when disturb returns.
func (r *run) disturb(load, ctx context.Context) error {
	var g errgroup.Group
	var agents, servers [maxSites]sync.Mutex // one fault at a time for each process
	for _, f := range r.s.Faults {
		if !r.reached(load, f.At) {
			break
		}
		r.load.fault(f.Kind)
		g.Go(func() error {
			switch f.Kind {
			case killAgent, stopAgent:
				agents[f.Site].Lock()
				defer agents[f.Site].Unlock()
			case killServer, stopServer:
				servers[f.Site].Lock()
				defer servers[f.Site].Unlock()
			}
			if err := r.fault(ctx, f); err != nil {
				return fmt.Errorf("%s: %w", f, err)
			}
			return nil
		})
	}
	err := g.Wait()
	for _, s := range r.p.Sites { // overlapping faults of a link may end in any order
		s.Relay.Heal()
		s.Relay.Delay(0)
	}
	return err
}

// reached waits until so many changes are committed; false when the load ends before.
func (r *run) reached(load context.Context, at int) bool {
	for r.load.changes.Load() < int64(at) {
		if load.Err() != nil {
			return false
		}
		pause(load, 5*time.Millisecond)
	}
	return load.Err() == nil
}

// fault makes one fault and ends it.
func (r *run) fault(ctx context.Context, f Fault) error {
	s := r.p.Sites[f.Site]
	wait := func() { pause(ctx, time.Duration(f.For)*time.Millisecond) }
	value := time.Duration(f.Value) * time.Millisecond
	switch f.Kind {
	case killAgent:
		if err := s.SignalAgent(syscall.SIGKILL); err != nil {
			return err
		}
		wait()
		return s.StartAgent()
	case stopAgent:
		if err := s.SignalAgent(syscall.SIGSTOP); err != nil {
			return err
		}
		wait()
		return s.SignalAgent(syscall.SIGCONT)
	case killServer:
		if err := s.Cluster.Kill(); err != nil {
			return err
		}
		wait()
		return s.Cluster.Start(ctx)
	case stopServer:
		err := s.Cluster.Signal(syscall.SIGSTOP)
		wait()
		return errors.Join(err, s.Cluster.Signal(syscall.SIGCONT))
	case stepClock:
		return r.clocks[f.Site].set(value)
	}
	there, back := r.p.Link(r.p.Sites[f.Peer].Name, s.Name), r.p.Link(s.Name, r.p.Sites[f.Peer].Name)
	switch f.Kind {
	case cutLink:
		there.Cut()
		back.Cut()
		wait()
		there.Heal()
		back.Heal()
	case oneWay:
		direction := faultnet.ToTarget
		if f.For%2 == 0 {
			direction = faultnet.ToClient
		}
		there.Drop(direction)
		wait()
		there.Heal()
	case slowLink:
		there.Delay(value)
		back.Delay(value)
		wait()
		there.Delay(0)
		back.Delay(0)
	case resetLink:
		there.Reset()
		back.Reset()
	default:
		return fmt.Errorf("unknown kind of fault %q", f.Kind)
	}
	return nil
}

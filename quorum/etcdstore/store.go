// Package etcdstore keeps the register of package quorum in etcd: Store is the client, Member one voter that runs inside
// this process. The voters authenticate each other and their clients with the cluster's own certificates.
//
// Nothing here decides who may acknowledge, and no rule uses a lease or a clock. A store that is not reachable gives
// errors within the time that its callers allow; it never gives an old value for a new one.
package etcdstore

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/duri-io/duri/quorum"
)

const (
	// A request to one voter is given up after firstTry, and asked of the next: one that hangs answers no more than one
	// that is dead, and what was under way to a leader that died is lost. Enough for a round trip to another continent
	// and two fsyncs; where it is not, the time doubles with each try, up to tryTime.
	firstTry = 400 * time.Millisecond
	tryTime  = 2 * time.Second
	// pause stands between tries that fail at once.
	pause = 50 * time.Millisecond
	// watchRead bounds how late a watcher learns a change when the voter that it watches hangs.
	watchRead = 2 * time.Second
)

// Config says where the register is.
type Config struct {
	ClusterID string
	Endpoints []string    // host:port or URLs of the voters' client addresses
	TLS       *tls.Config // the client's of pki.TLS, or that for an etcd of somebody else
	Log       *slog.Logger
}

// Store is a quorum.Store in etcd. It may be used from several goroutines.
type Store struct {
	client *clientv3.Client
	key    string

	mu   sync.Mutex
	seen at // newest value read or written, so that a swap mostly needs one request
}

var _ quorum.Store = (*Store)(nil)

// at is where etcd keeps a value.
type at struct {
	epoch    uint64 // 0: absent
	revision int64  // of the key's last change
	known    bool
}

// Open makes a store. It connects when it is used, so that the voters need not be there yet. The store ends with ctx or
// Close.
func Open(ctx context.Context, c Config) (*Store, error) {
	client, err := clientv3.New(clientv3.Config{
		Context:   ctx,
		Endpoints: c.Endpoints,
		TLS:       c.TLS,
		// gRPC takes no shorter time for pings; the timeout is the kernel's TCP_USER_TIMEOUT as well, and so ends a
		// connection on which something is under way much sooner.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: time.Second,
		DialTimeout:          time.Second,
		BackoffWaitBetween:   pause,
		Logger:               newZap(c.Log),
	})
	if err != nil {
		return nil, fmt.Errorf("open the register: %w", err)
	}
	return &Store{client: client, key: "/duri/" + c.ClusterID + "/register"}, nil
}

// Close ends the connections; calls that run end with an error.
func (s *Store) Close() error { return s.client.Close() }

// Get reads the value, as quorum.Store describes.
func (s *Store) Get(ctx context.Context) (quorum.Register, error) {
	r, _, err := s.get(ctx)
	return r, err
}

func (s *Store) get(ctx context.Context) (quorum.Register, at, error) {
	for t := firstTry; ; t = min(2*t, tryTime) {
		try, cancel := context.WithTimeout(ctx, t)
		resp, err := s.client.Get(try, s.key)
		cancel()
		if err == nil {
			if len(resp.Kvs) == 0 {
				where := s.saw(at{known: true})
				return quorum.Register{}, where, quorum.ErrAbsent
			}
			return s.decode(resp.Kvs[0].Value, resp.Kvs[0].ModRevision)
		}
		if final(err) {
			return quorum.Register{}, at{}, fmt.Errorf("read the register: %w", err)
		}
		if !wait(ctx) {
			return quorum.Register{}, at{}, fmt.Errorf("read the register: no answer from a majority of the voters: %w", ended(ctx, err))
		}
	}
}

// saw notes where the newest value is.
func (s *Store) saw(a at) at {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.revision >= s.seen.revision {
		s.seen = a
	}
	return a
}

func (s *Store) decode(value []byte, revision int64) (quorum.Register, at, error) {
	var r quorum.Register
	if err := json.Unmarshal(value, &r); err != nil {
		return quorum.Register{}, at{}, fmt.Errorf("%w: %w", errForeign, err)
	}
	return r, s.saw(at{epoch: r.Epoch, revision: revision, known: true}), nil
}

// Swap writes the next value, as quorum.Store describes. It asks again when a voter does not answer: a value that went
// in at the first try is recognised as its own at the second.
func (s *Store) Swap(ctx context.Context, next quorum.Register) (quorum.Register, error) {
	value, err := json.Marshal(next)
	if err != nil {
		return quorum.Register{}, fmt.Errorf("change the register: %w", err)
	}
	s.mu.Lock()
	where := s.seen
	s.mu.Unlock()
	if !where.known || where.epoch != next.Epoch-1 {
		r, found, err := s.get(ctx)
		if err != nil && !errors.Is(err, quorum.ErrAbsent) {
			return quorum.Register{}, err
		}
		if found.epoch == next.Epoch && r.Equal(next) {
			return r, nil
		}
		if found.epoch != next.Epoch-1 {
			return r, quorum.ErrChanged
		}
		where = found
	}
	for t := firstTry; ; t = min(2*t, tryTime) {
		r, err := s.try(ctx, t, where, value, next)
		if err == nil || errors.Is(err, quorum.ErrChanged) {
			return r, err
		}
		if final(err) {
			return quorum.Register{}, fmt.Errorf("change the register: %w", err)
		}
		if !wait(ctx) {
			return quorum.Register{}, fmt.Errorf("change the register: %w: %w", quorum.ErrUnknown, ended(ctx, err))
		}
	}
}

// try is one request of a swap.
func (s *Store) try(ctx context.Context, t time.Duration, where at, value []byte, next quorum.Register) (quorum.Register, error) {
	ctx, cancel := context.WithTimeout(ctx, t)
	defer cancel()
	resp, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(s.key), "=", where.revision)).
		Then(clientv3.OpPut(s.key, string(value))).
		Else(clientv3.OpGet(s.key)).
		Commit()
	if err != nil {
		return quorum.Register{}, err
	}
	if resp.Succeeded {
		s.saw(at{epoch: next.Epoch, revision: resp.Header.Revision, known: true})
		return next.Clone(), nil
	}
	kvs := resp.Responses[0].GetResponseRange().Kvs
	if len(kvs) == 0 {
		return quorum.Register{}, quorum.ErrChanged // somebody removed the key
	}
	stands, _, err := s.decode(kvs[0].Value, kvs[0].ModRevision)
	if err == nil && !stands.Equal(next) {
		err = quorum.ErrChanged
	}
	return stands, err
}

// final reports whether asking again is of no use, and nothing was changed.
func final(err error) bool {
	return errors.Is(err, rpctypes.ErrNoSpace) || errors.Is(err, rpctypes.ErrPermissionDenied) || errors.Is(err, rpctypes.ErrUserEmpty) ||
		errors.Is(err, rpctypes.ErrRequestTooLarge) || errors.Is(err, errForeign)
}

var errForeign = errors.New("the register holds what duri did not write")

// wait lets some time pass; false when the context has ended.
func wait(ctx context.Context) bool {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return ctx.Err() == nil
	}
}

// ended joins why a call ended with what went wrong last, which says more.
func ended(ctx context.Context, err error) error {
	if errors.Is(err, ctx.Err()) {
		return err
	}
	return fmt.Errorf("%w (%w)", ctx.Err(), err)
}

// Watch delivers changes, as quorum.Store describes. Beside etcd's own watch, it reads now and then: etcd does not tell
// that a voter which hangs has nothing to say any more.
func (s *Store) Watch(ctx context.Context) <-chan quorum.Register {
	out := make(chan quorum.Register)
	go func() {
		defer close(out)
		w := watcher{s: s, out: out}
		for ctx.Err() == nil && s.client.Ctx().Err() == nil {
			w.once(ctx)
			wait(ctx)
		}
	}()
	return out
}

// watcher is the state of one Watch.
type watcher struct {
	s    *Store
	out  chan<- quorum.Register
	last uint64 // epoch delivered
}

// once follows one watch of etcd until it ends.
func (w *watcher) once(ctx context.Context) {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	if !w.read(ctx) {
		return
	}
	changes := w.s.client.Watch(ctx, w.s.key)
	// What was written before the watch began is in no change.
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.s.client.Ctx().Done():
			return
		case <-tick.C:
			if !w.read(ctx) {
				return
			}
			tick.Reset(watchRead)
		case resp, ok := <-changes:
			if !ok || resp.Err() != nil {
				return
			}
			for _, e := range resp.Events {
				if e.Kv == nil || e.Type != clientv3.EventTypePut {
					continue
				}
				if r, _, err := w.s.decode(e.Kv.Value, e.Kv.ModRevision); err == nil && !w.deliver(ctx, r) {
					return
				}
			}
		}
	}
}

// read delivers the present value; false when it cannot be read now.
func (w *watcher) read(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	r, err := w.s.Get(ctx)
	if errors.Is(err, quorum.ErrAbsent) {
		return true
	}
	return err == nil && w.deliver(ctx, r)
}

func (w *watcher) deliver(ctx context.Context, r quorum.Register) bool {
	if r.Epoch <= w.last {
		return true
	}
	select {
	case w.out <- r:
		w.last = r.Epoch
		return true
	case <-ctx.Done():
		return false
	}
}

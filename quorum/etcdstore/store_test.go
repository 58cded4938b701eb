package etcdstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/quorum"
)

const clusterX = "4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a"

// TestMain lets idle HTTP connections between voters pass: etcd closes none of them, and they end by themselves, 5 s after
// their last byte.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
		goleak.IgnoreAnyFunction("net/http.(*conn).serve"), goleak.IgnoreAnyFunction("net/http.(*connReader).backgroundRead"))
}

// patience is far more than anything here takes.
const patience = 30 * time.Second

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func newCA(t *testing.T, cluster string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(cluster, "demo")
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// files makes the certificate of a site, for an address that is not ours: only the cluster counts.
func files(t *testing.T, ca *pki.CA, site string) pki.Files {
	t.Helper()
	dir := t.TempDir()
	pair, err := ca.Issue(site, site+".invalid:7480")
	if err != nil {
		t.Fatal(err)
	}
	f := pki.Files{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "site.crt"), Key: filepath.Join(dir, "site.key")}
	if err := errors.Join(ca.WriteCert(f.CA), pair.Write(f.Cert, f.Key)); err != nil {
		t.Fatal(err)
	}
	return f
}

// voters are three voters a, b and w of a new cluster.
type voters struct {
	t       *testing.T
	ca      *pki.CA
	configs map[string]MemberConfig
	running map[string]*Member
}

func newVoters(t *testing.T) *voters {
	t.Helper()
	v := &voters{t: t, ca: newCA(t, clusterX), configs: map[string]MemberConfig{}, running: map[string]*Member{}}
	var all []Voter
	for _, name := range []string{"a", "b", "w"} {
		all = append(all, Voter{Name: name, Peer: freeAddress(t), Client: freeAddress(t)})
	}
	for _, x := range all {
		v.configs[x.Name] = MemberConfig{
			ClusterID: clusterX, Name: x.Name, DataDir: filepath.Join(t.TempDir(), "etcd"), Voters: all, TLS: files(t, v.ca, x.Name), Prefer: "w",
			ListenPeer: x.Peer, ListenClient: x.Client, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		}
	}
	t.Cleanup(func() {
		for name := range v.running { // one after the other: a leader waits for whom it hands over to
			v.stop(name)
		}
	})
	v.start("a", "b", "w")
	return v
}

// start starts voters and waits until they serve.
func (v *voters) start(names ...string) {
	v.t.Helper()
	for _, name := range names {
		m, err := StartMember(v.t.Context(), v.configs[name])
		if err != nil {
			v.t.Fatal(err)
		}
		v.running[name] = m
	}
	for _, name := range names {
		select {
		case <-v.running[name].Ready():
		case <-time.After(patience):
			v.t.Fatalf("voter %s is not ready", name)
		}
	}
}

func (v *voters) stop(name string) {
	v.t.Helper()
	m := v.running[name]
	delete(v.running, name)
	m.Close()
	select {
	case <-m.Done():
	default:
		v.t.Error("a closed voter is not done")
	}
	if m.Err() != nil {
		v.t.Errorf("closed, but: %v", m.Err())
	}
}

func (v *voters) endpoints() []string {
	var all []string
	for _, x := range v.configs["a"].Voters {
		all = append(all, x.Client)
	}
	return all
}

func clientTLS(t *testing.T, ca *pki.CA, site string) *tls.Config {
	t.Helper()
	_, client, err := pki.TLS(files(t, ca, site), ca.ClusterID(), site)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func (v *voters) open(site string) *Store {
	v.t.Helper()
	return open(v.t, Config{ClusterID: clusterX, Endpoints: v.endpoints(), TLS: clientTLS(v.t, v.ca, site)})
}

// relayed opens a store that reaches the voters through relays.
func (v *voters) relayed(site string) ([]*faultnet.Relay, *Store) {
	v.t.Helper()
	var relays []*faultnet.Relay
	var addresses []string
	for _, e := range v.endpoints() {
		r, err := faultnet.New(e)
		if err != nil {
			v.t.Fatal(err)
		}
		v.t.Cleanup(func() { _ = r.Close() })
		relays, addresses = append(relays, r), append(addresses, r.Addr())
	}
	return relays, open(v.t, Config{ClusterID: clusterX, Endpoints: addresses, TLS: clientTLS(v.t, v.ca, site)})
}

func open(t *testing.T, c Config) *Store {
	t.Helper()
	s, err := Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("never: %s", what)
		}
	}
}

func must(t *testing.T) func(quorum.Register, error) quorum.Register {
	return func(r quorum.Register, err error) quorum.Register {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
}

func first() quorum.Register {
	return quorum.Initial([]string{"a", "b"}, "a", time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC))
}

func renewed(t *testing.T, r quorum.Register, by string) quorum.Register {
	t.Helper()
	return must(t)(quorum.Renew(r, quorum.Note{By: by, At: time.Now()}))
}

// TestThreeVoters walks one cluster through its life: starting one takes longer than each of the parts.
func TestThreeVoters(t *testing.T) {
	v := newVoters(t)
	a, b := v.open("a"), v.open("b")
	seen := watch(t, b)
	value := first()

	if !t.Run("absent, then written once", func(t *testing.T) {
		if _, err := a.Get(within(t, patience)); !errors.Is(err, quorum.ErrAbsent) {
			t.Fatalf("got %v", err)
		}
		if got := must(t)(a.Swap(within(t, patience), value)); !got.Equal(value) {
			t.Errorf("wrote %+v", got)
		}
		other := first()
		other.By = "b"
		if got, err := b.Swap(within(t, patience), other); !errors.Is(err, quorum.ErrChanged) || !got.Equal(value) {
			t.Errorf("a second first value: %+v, %v", got, err)
		}
		if got := must(t)(b.Get(within(t, patience))); !got.Equal(value) {
			t.Errorf("read %+v", got)
		}
	}) {
		return
	}

	t.Run("a swap quotes the epoch", func(t *testing.T) {
		ahead := renewed(t, renewed(t, value, "a"), "a")
		if got, err := a.Swap(within(t, patience), ahead); !errors.Is(err, quorum.ErrChanged) || !got.Equal(value) {
			t.Errorf("two epochs ahead: %+v, %v", got, err)
		}
		next := renewed(t, value, "a")
		began := time.Now()
		value = must(t)(a.Swap(within(t, patience), next))
		t.Logf("a swap takes %s", time.Since(began))
		if got := must(t)(a.Swap(within(t, patience), next)); !got.Equal(value) {
			t.Errorf("its own value again: %+v", got)
		}
	})

	t.Run("of swaps that race, one wins", func(t *testing.T) {
		for range 5 {
			value = race(t, []*Store{a, b}, value)
		}
	})

	t.Run("the witness leads", func(t *testing.T) {
		eventually(t, "the witness leads", v.running["w"].Leads)
	})

	t.Run("changes are delivered in order", func(t *testing.T) {
		eventually(t, "the last epoch is delivered", func() bool { all := seen(); return len(all) > 0 && all[len(all)-1].Equal(value) })
		if all := seen(); !slices.IsSortedFunc(all, func(x, y quorum.Register) int { return int(x.Epoch) - int(y.Epoch) }) {
			t.Errorf("epochs out of order: %v", all)
		}
	})

	relays, far := v.relayed("b")
	t.Run("a voter that hangs is passed over", func(t *testing.T) {
		delivered := watch(t, far)
		// With each relay cut in turn, one of them is that which the store or the watch has used.
		for i, r := range relays {
			must(t)(far.Get(within(t, patience)))
			r.Cut()
			began := time.Now()
			value = must(t)(far.Swap(within(t, patience), renewed(t, value, "b")))
			if took := time.Since(began); took > 2*tryTime {
				t.Errorf("with voter %d hanging, a swap took %s", i, took)
			}
			eventually(t, "the change is delivered", func() bool { all := delivered(); return len(all) > 0 && all[len(all)-1].Equal(value) })
			t.Logf("with voter %d hanging, a change is delivered after %s", i, time.Since(began))
			r.Heal()
		}
	})

	t.Run("an answer that is lost", func(t *testing.T) {
		next := renewed(t, value, "b")
		for _, r := range relays {
			r.Drop(faultnet.ToClient)
		}
		if _, err := far.Swap(within(t, 700*time.Millisecond), next); !errors.Is(err, quorum.ErrUnknown) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		eventually(t, "the swap has arrived all the same", func() bool { r, err := a.Get(within(t, patience)); return err == nil && r.Equal(next) })
		for _, r := range relays {
			r.Heal()
		}
		if got := must(t)(far.Swap(within(t, patience), next)); !got.Equal(next) {
			t.Errorf("the same swap again: %+v", got)
		}
		value = next
	})

	t.Run("the loss of one voter stops nothing", func(t *testing.T) {
		v.stop("w") // the leader
		began := time.Now()
		value = must(t)(a.Swap(within(t, patience), renewed(t, value, "a")))
		t.Logf("with the leader gone, a swap takes %s", time.Since(began))
		value = must(t)(b.Swap(within(t, patience), renewed(t, value, "b")))
	})

	t.Run("the loss of two is an error in time", func(t *testing.T) {
		v.stop("b")
		for what, call := range map[string]func(context.Context) error{
			"get":  func(ctx context.Context) error { _, err := a.Get(ctx); return err },
			"swap": func(ctx context.Context) error { _, err := b.Swap(ctx, renewed(t, value, "b")); return err }, // it knows the value
		} {
			began := time.Now()
			err := call(within(t, 1200*time.Millisecond))
			if took := time.Since(began); err == nil || took > 3*time.Second {
				t.Errorf("%s: %v after %s", what, err, took)
			}
			if got := errors.Is(err, quorum.ErrUnknown); got != (what == "swap") {
				t.Errorf("%s: unknown is %v: %v", what, got, err)
			}
		}
	})

	t.Run("voters come back with their data", func(t *testing.T) {
		v.start("b", "w")
		r := must(t)(b.Get(within(t, patience)))
		if r.Epoch != value.Epoch && r.Epoch != value.Epoch+1 { // the swap whose answer was not known may have arrived
			t.Errorf("epoch %d, was %d", r.Epoch, value.Epoch)
		}
		value = must(t)(b.Swap(within(t, patience), renewed(t, r, "b")))
	})

	t.Run("a lost data directory", func(t *testing.T) {
		v.stop("b")
		c := v.configs["b"]
		c.DataDir = filepath.Join(t.TempDir(), "new")
		v.configs["b"] = c
		if _, err := StartMember(t.Context(), c); !IsLost(err) {
			t.Fatalf("an empty voter was taken for the old one: %v", err)
		}
		at := slices.IndexFunc(c.Voters, func(x Voter) bool { return x.Name == "b" })
		if err := Replace(within(t, patience), Config{ClusterID: clusterX, Endpoints: v.endpoints(), TLS: clientTLS(t, v.ca, "b")}, c.Voters[at]); err != nil {
			t.Fatal(err)
		}
		c.Join = true
		v.configs["b"] = c
		v.start("b")
		v.stop("w") // so that b counts
		value = must(t)(a.Swap(within(t, patience), renewed(t, value, "a")))
	})

	t.Run("strangers", func(t *testing.T) { strangers(t, v) })

	eventually(t, "the watcher has seen all", func() bool { all := seen(); return all[len(all)-1].Equal(value) })
}

// strangers: neither leg takes certificates of another cluster, nor does a client take such voters.
func strangers(t *testing.T, v *voters) {
	for name, id := range map[string]string{"another cluster": "11111111-2222-4333-8444-555555555555", "the same id, another authority": clusterX} {
		ca := newCA(t, id)
		own := files(t, ca, "b")
		pair, err := tls.LoadX509KeyPair(own.Cert, own.Key)
		if err != nil {
			t.Fatal(err)
		}
		anyone := &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
		for leg, address := range map[string]string{"peer": v.configs["a"].Voters[0].Peer, "client": v.configs["a"].Voters[0].Client} {
			if err := handshake(t, address, anyone); err == nil || !strings.Contains(err.Error(), "certificate") {
				t.Errorf("%s, %s leg: %v", name, leg, err)
			}
		}
		store := open(t, Config{ClusterID: clusterX, Endpoints: v.endpoints(), TLS: clientTLS(t, ca, "b")})
		if r, err := store.Get(within(t, 300*time.Millisecond)); err == nil {
			t.Errorf("%s read %+v", name, r)
		}
	}
	known := clientTLS(t, v.ca, "b")
	for leg, address := range map[string]string{"peer": v.configs["a"].Voters[0].Peer, "client": v.configs["a"].Voters[0].Client} {
		if err := handshake(t, address, known); err != nil {
			t.Errorf("a site of the cluster is refused on the %s leg: %v", leg, err)
		}
	}
}

// handshake connects and waits for what the server says: in TLS 1.3 the client only learns by reading that it is refused.
func handshake(t *testing.T, address string, c *tls.Config) error {
	t.Helper()
	d := tls.Dialer{Config: c}
	conn, err := d.DialContext(within(t, patience), "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return nil // nothing is said, so it waits for a request
	}
	return err
}

// race lets all stores propose a next value at once; exactly one may win, and all must learn which.
func race(t *testing.T, stores []*Store, old quorum.Register) quorum.Register {
	t.Helper()
	got := make([]quorum.Register, len(stores))
	errs := make([]error, len(stores))
	var wg sync.WaitGroup
	ctx := within(t, patience)
	for i, s := range stores {
		wg.Go(func() {
			next, err := quorum.Renew(old, quorum.Note{By: fmt.Sprint("racer ", i)})
			if err == nil {
				got[i], err = s.Swap(ctx, next)
			}
			errs[i] = err
		})
	}
	wg.Wait()
	won := 0
	for i, err := range errs {
		switch {
		case err == nil:
			won++
			if got[i].By != fmt.Sprint("racer ", i) {
				t.Errorf("racer %d won with the value of %s", i, got[i].By)
			}
		case !errors.Is(err, quorum.ErrChanged):
			t.Error(err)
		}
		if !got[i].Equal(got[0]) {
			t.Errorf("racers see %+v and %+v", got[0], got[i])
		}
	}
	if won != 1 {
		t.Errorf("%d of the racers won", won)
	}
	return got[0]
}

// watch collects what a store's Watch delivers.
func watch(t *testing.T, s *Store) func() []quorum.Register {
	ctx, cancel := context.WithCancel(t.Context())
	changes := s.Watch(ctx)
	var mu sync.Mutex
	var all []quorum.Register
	var wg sync.WaitGroup
	wg.Go(func() {
		for r := range changes {
			mu.Lock()
			all = append(all, r)
			mu.Unlock()
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return func() []quorum.Register {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

func TestAVoterThatFindsNoMajorityEnds(t *testing.T) {
	ca := newCA(t, clusterX)
	var all []Voter
	for _, name := range []string{"a", "b", "w"} {
		all = append(all, Voter{Name: name, Peer: freeAddress(t), Client: freeAddress(t)})
	}
	c := MemberConfig{ClusterID: clusterX, Name: "a", DataDir: filepath.Join(t.TempDir(), "etcd"), Voters: all, TLS: files(t, ca, "a")}
	m, err := StartMember(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	m.Close()
	m.Close()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("ending took %s", took)
	}
}

func TestWrongMemberConfigIsRefused(t *testing.T) {
	v := Voter{Name: "a", Peer: "127.0.0.1:1", Client: "127.0.0.1:2"}
	for want, c := range map[string]MemberConfig{
		`"x" is not one of the voters`: {Name: "x", Voters: []Voter{v}},
		"missing port in address":      {Name: "a", Voters: []Voter{{Name: "a", Peer: "nonsense", Client: "127.0.0.1:2"}}},
	} {
		if _, err := StartMember(t.Context(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := StartMember(cancelled, MemberConfig{Name: "a", Voters: []Voter{v}}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/duri-io/duri/internal/faultnet"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	cluster  = "c0ffee"
	database = "shop"
)

// authority makes certificates for the sites of a cluster.
type authority struct {
	ca  *pki.CA
	dir string
}

func newAuthority(t testing.TB, clusterID string) authority {
	t.Helper()
	ca, err := pki.NewCA(clusterID, "test")
	if err != nil {
		t.Fatal(err)
	}
	a := authority{ca, t.TempDir()}
	if err := ca.WriteCert(filepath.Join(a.dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	return a
}

// tls gives a site's configurations.
func (a authority) tls(t testing.TB, site string) (server, client *tls.Config) {
	t.Helper()
	files := pki.Files{CA: filepath.Join(a.dir, "ca.crt"), Cert: filepath.Join(a.dir, site+".crt"), Key: filepath.Join(a.dir, site+".key")}
	if _, err := os.Stat(files.Cert); err != nil {
		pair, err := a.ca.Issue(site)
		if err == nil {
			err = pair.Write(files.Cert, files.Key)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	server, client, err := pki.TLS(files, a.ca.ClusterID(), site)
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

// offer is a Database with function fields.
type offer struct {
	j        *journal.Journal
	notReady error
	fetchRow func(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error)
	copy     func(ctx context.Context, w io.Writer) error
	compare  func(ctx context.Context, request []byte) ([]byte, error)

	mu     sync.Mutex
	acks   map[string][]Ack
	stated map[string]Statement
	copies map[string]*journal.Journal
}

func (o *offer) Journal() (*journal.Journal, error) { return o.j, o.notReady }
func (o *offer) FetchRow(ctx context.Context, rel *wal.Relation, key []string, row wal.Tuple) (wal.Tuple, bool, error) {
	return o.fetchRow(ctx, rel, key, row)
}
func (o *offer) Copy(ctx context.Context, w io.Writer) error { return o.copy(ctx, w) }
func (o *offer) Compare(ctx context.Context, request []byte) ([]byte, error) {
	return o.compare(ctx, request)
}

func (o *offer) Acknowledged(site string, a Ack) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.acks == nil {
		o.acks = map[string][]Ack{}
	}
	o.acks[site] = append(o.acks[site], a)
}

func (o *offer) Uncaptured() bool { return false }

func (o *offer) Stated(site string, s Statement) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stated == nil {
		o.stated = map[string]Statement{}
	}
	o.stated[site] = s
}

func (o *offer) CopyOf(site string) (*journal.Journal, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if j := o.copies[site]; j != nil {
		return j, nil
	}
	return nil, errors.New("there is no copy of the journal of " + site)
}

// last is the latest acknowledgement of a site.
func (o *offer) last(site string) Ack {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.acks[site]); n > 0 {
		return o.acks[site][n-1]
	}
	return Ack{}
}

// world is seoul, which serves, and a relay in front of it.
type world struct {
	t      testing.TB
	ca     authority
	db     *offer
	server *Server
	relay  *faultnet.Relay
	addr   string // of the server itself
	stop   func() // ends Serve and waits for it
}

// header is that of seoul's journal.
func header() journal.Header {
	return journal.Header{
		Cluster: cluster, Site: 1, SiteName: "seoul", From: 0x1000,
		Incarnation: journal.Incarnation{SystemID: 7, Timeline: 1, Database: database, Slot: "duri_shop", CreatedLSN: 0x1000},
	}
}

func newJournal(t testing.TB, h journal.Header, o journal.Options) *journal.Journal {
	t.Helper()
	j, err := journal.Create(filepath.Join(t.TempDir(), "journal"), h, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

// newWorld starts seoul with an empty journal; change may adjust the server.
func newWorld(t testing.TB, change func(*ServerConfig)) *world {
	t.Helper()
	w := &world{t: t, ca: newAuthority(t, cluster), db: &offer{j: newJournal(t, header(), journal.Options{SegmentBytes: 1 << 20})}}
	server, _ := w.ca.tls(t, "seoul")
	c := ServerConfig{
		TLS: server, ClusterID: cluster, Site: "seoul",
		Databases: func(name string) (Database, bool) { return w.db, name == database },
		Heartbeat: 20 * time.Millisecond, Silence: time.Second,
	}
	if change != nil {
		change(&c)
	}
	w.server = NewServer(c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.server.Serve(ctx, l) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(w.stop)
	if w.relay, err = faultnet.New(w.addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.relay.Close() })
	return w
}

// client is busan's, through the relay; change may adjust it.
func (w *world) client(change func(*ClientConfig)) *Client {
	w.t.Helper()
	_, client := w.ca.tls(w.t, "busan")
	c := ClientConfig{
		Address: w.relay.Addr(), Peer: "seoul", TLS: client, ClusterID: cluster, Site: "busan",
		Heartbeat: 20 * time.Millisecond, Silence: time.Second,
	}
	if change != nil {
		change(&c)
	}
	cl, err := NewClient(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { cl.Close() })
	return cl
}

func openCopy(t testing.TB, dir string) *CopyWriter {
	t.Helper()
	cp, err := OpenCopy(CopyConfig{Dir: dir, Journal: journal.Options{SegmentBytes: 300 << 10}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cp.Close() })
	return cp
}

// following starts Follow; stop ends it and returns its error.
type running struct {
	cancel context.CancelFunc
	ended  chan struct{}
	err    error
}

func follow(t testing.TB, c *Client, sink Sink) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cancel: cancel, ended: make(chan struct{})}
	go func() {
		r.err = c.Follow(ctx, database, sink)
		close(r.ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.ended
	})
	return r
}

// wait waits for the end of Follow.
func (r *running) wait(t testing.TB) error {
	t.Helper()
	select {
	case <-r.ended:
		return r.err
	case <-time.After(20 * time.Second):
		buf := make([]byte, 1<<20)
		t.Fatalf("timed out waiting for the end of Follow; what runs:\n%s", buf[:runtime.Stack(buf, true)])
		return nil
	}
}

func (r *running) stop(t testing.TB) error {
	t.Helper()
	r.cancel()
	return r.wait(t)
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("timed out waiting for: " + what)
		}
	}
}

// history makes transactions and appends them to a journal.
type history struct {
	j    *journal.Journal
	rnd  *rand.Rand
	rels []*wal.Relation
	at   wal.LSN
}

func newHistory(j *journal.Journal, seed uint64) *history {
	h := &history{j: j, rnd: rand.New(rand.NewPCG(seed, 1)), at: j.End()}
	for i := range 3 {
		h.rels = append(h.rels, (&wal.Relation{
			OID: uint32(16384 + i), Namespace: "public", Name: fmt.Sprintf("t%d", i), Identity: wal.IdentityDefault,
			Columns: []wal.Column{{Name: "id", TypeOID: 23, TypeMod: -1, Key: true}, {Name: "v", TypeOID: 25, TypeMod: -1}},
		}).Seal())
	}
	return h
}

// txn is the next transaction, of n changes with values of about size bytes.
func (h *history) txn(n, size int) *wal.Txn {
	t := &wal.Txn{Origin: h.j.Header().Site, XID: h.rnd.Uint32(), CommitLSN: h.at + 8, EndLSN: h.at + 40, CommitTime: wal.Time(h.at)}
	t.VersionTime = t.CommitTime
	for range n {
		v := make([]byte, size)
		for i := range v {
			v[i] = byte('a' + h.rnd.IntN(26))
		}
		id := fmt.Appendf(nil, "%d", h.rnd.IntN(1000))
		t.Changes = append(t.Changes, wal.Change{
			Op: wal.Insert, Relation: h.rels[h.rnd.IntN(len(h.rels))],
			New: wal.Tuple{{Kind: wal.Text, Data: id}, {Kind: wal.Text, Data: v}},
		})
	}
	h.at = t.EndLSN
	return t
}

// add appends a record, mostly transactions, sometimes large, sometimes a position without one.
func (h *history) add() error {
	if h.rnd.IntN(10) == 0 {
		h.at += 16
		return h.j.AppendPosition(h.at, nil, wal.Time(h.at))
	}
	n, size := 1+h.rnd.IntN(5), h.rnd.IntN(200)
	if h.rnd.IntN(50) == 0 {
		n, size = 20, 20<<10
	}
	return h.j.AppendTxn(h.txn(n, size))
}

// fill appends n records and flushes.
func (h *history) fill(t testing.TB, n int) {
	t.Helper()
	for range n {
		if err := h.add(); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.j.Flush(); err != nil {
		t.Fatal(err)
	}
}

// records reads all records beyond from up to the journal's end.
func records(t testing.TB, j *journal.Journal, from wal.LSN) []journal.Record {
	t.Helper()
	r, err := j.NewReader(from)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var list []journal.Record
	for {
		rec, ok, err := r.TryNext()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return list
		}
		list = append(list, rec)
	}
}

// expectEqual compares a copy with the origin's journal, record by record.
func expectEqual(t testing.TB, origin *journal.Journal, cp *CopyWriter) {
	t.Helper()
	j, err := cp.Journal()
	if err != nil {
		t.Fatal(err)
	}
	from := j.Header().From
	want, got := records(t, origin, from), records(t, j, from)
	if len(want) == 0 || len(want) != len(got) {
		t.Fatalf("copy holds %d records, the origin %d", len(got), len(want))
	}
	for i := range want {
		if !reflect.DeepEqual(want[i], got[i]) { // cmp alone takes minutes for large values
			t.Fatalf("record %d of %d differs:\n%s", i, len(want), cmp.Diff(want[i], got[i]))
		}
	}
	if a, b := origin.State(), j.State(); a.Chain != b.Chain || a.End != b.End {
		t.Errorf("copy ends at %s with chain %s, the origin at %s with %s", b.End, b.Chain, a.End, a.Chain)
	}
}

func TestCopyBecomesEqualAndIsAcknowledged(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 1)
	h.fill(t, 300)
	cp := openCopy(t, t.TempDir())
	f := follow(t, w.client(nil), cp)
	<-cp.Created()
	h.fill(t, 300)
	end := w.db.j.End()
	waitFor(t, "the durable end to be acknowledged", func() bool { return w.db.last("busan").Durable == end })
	if a := w.db.last("busan"); a.Received != end || a.Applied != 0 {
		t.Errorf("acknowledged %+v, want received %s and applied 0", a, end)
	}
	cp.SetApplied(end)
	waitFor(t, "the applied end to be acknowledged", func() bool { return w.db.last("busan").Applied == end })
	list := w.server.Followers()
	if len(list) != 1 || list[0].Site != "busan" || list[0].Database != database || list[0].Sent != end {
		t.Errorf("followers %+v, want busan with everything sent", list)
	}
	waitFor(t, "a heartbeat with the end", func() bool { b, _ := cp.Heard(); return b.End == end && b.Heard > 0 })
	if err := f.stop(t); !errors.Is(err, context.Canceled) {
		t.Errorf("Follow ended with %v, want the context's error", err)
	}
	waitFor(t, "the server to notice", func() bool { return len(w.server.Followers()) == 0 })
	expectEqual(t, w.db.j, cp)
	w.db.mu.Lock()
	defer w.db.mu.Unlock()
	for i, a := range w.db.acks["busan"] {
		if i > 0 && (a.Received < w.db.acks["busan"][i-1].Received || a.Durable < w.db.acks["busan"][i-1].Durable) {
			t.Errorf("acknowledgement %d goes back: %+v", i, w.db.acks["busan"])
		}
	}
}

func TestCopyEqualAfterFaultsAtRandomMoments(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("DURI_LINK_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (DURI_LINK_SEED repeats it)", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	short := 150 * time.Millisecond
	w := newWorld(t, func(c *ServerConfig) { c.Silence, c.Window = short, 256<<10 })
	cl := w.client(func(c *ClientConfig) { c.Silence = short })
	dir := t.TempDir()
	cp := openCopy(t, dir)

	const total = 4000
	appended := make(chan error, 1)
	progress := make(chan struct{}) // each value lets the appender write some more
	go func() {
		defer close(appended)
		h := newHistory(w.db.j, seed)
		for i := range total {
			if i%200 == 0 {
				<-progress
			}
			if err := errors.Join(h.add(), w.db.j.Flush()); err != nil {
				appended <- err
				return
			}
		}
	}()
	faults := map[string]int{}
	for round := range total / 200 {
		// What the last round's stream left in the relay flows after healing: it must neither reach this round's mark nor
		// let a reset come before this round's connection is there.
		waitFor(t, "the end of the last connection", func() bool { return w.relay.Connections() == 0 })
		mark := w.relay.Passed(faultnet.ToClient) + 1 + rnd.Int64N(60<<10)
		f := follow(t, cl, cp)
		progress <- struct{}{}
		// The fault comes when a random number of bytes of this round has passed.
		waitFor(t, "the moment of the fault", func() bool {
			select {
			case <-f.ended:
				return true // the last fault may have hit this stream too
			default:
			}
			return w.relay.Passed(faultnet.ToClient) >= mark
		})
		kind := []string{"cut", "deaf", "mute", "reset", "end", "reopen"}[rnd.IntN(6)]
		faults[kind]++
		switch kind {
		case "cut":
			w.relay.Cut()
		case "deaf":
			w.relay.Drop(faultnet.ToTarget)
		case "mute":
			w.relay.Drop(faultnet.ToClient)
		case "reset":
			w.relay.Reset()
		default:
			f.cancel()
		}
		err := f.wait(t)
		if !Retry(err) {
			t.Fatalf("round %d, %s: %v, want an error that a retry heals (seed %d)", round, kind, err, seed)
		}
		w.relay.Heal()
		if kind == "reopen" {
			if err := cp.Close(); err != nil {
				t.Fatal(err)
			}
			cp = openCopy(t, dir)
		}
	}
	t.Logf("faults %v", faults)
	if err := <-appended; err != nil {
		t.Fatal(err)
	}
	end := w.db.j.End()
	for cp.Ack().Durable < end { // what the last fault broke may take another attempt
		f := follow(t, cl, cp)
		waitFor(t, "the copy to be complete", func() bool {
			select {
			case <-f.ended:
				return true
			default:
			}
			return cp.Ack().Durable == end
		})
		if err := f.stop(t); !Retry(err) {
			t.Fatalf("%v (seed %d)", err, seed)
		}
	}
	expectEqual(t, w.db.j, cp)
}

func TestNewCopyBeginsWhereTheJournalIsNeeded(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 3).fill(t, 2000) // several files
	if w.db.j.State().Segments < 3 {
		t.Fatalf("the journal has %d files, want several", w.db.j.State().Segments)
	}
	need := w.db.j.End() - 100
	cp, err := OpenCopy(CopyConfig{Dir: t.TempDir(), From: need})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	f := follow(t, w.client(nil), cp)
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	j, _ := cp.Journal()
	if from := j.Header().From; from > need || from == w.db.j.Start() {
		t.Errorf("copy begins at %s, want a later file than the first, at or before %s", from, need)
	}
	expectEqual(t, w.db.j, cp)
}

func TestBigTransactionArrivesWhole(t *testing.T) {
	w := newWorld(t, func(c *ServerConfig) { c.Window = 3 << 20 })
	h := newHistory(w.db.j, 4)
	h.fill(t, 10)
	if err := w.db.j.AppendTxn(h.txn(500, 100<<10)); err != nil { // 50 MB
		t.Fatal(err)
	}
	h.fill(t, 10)
	if n := w.db.j.State().Bytes; n < 50e6 {
		t.Fatalf("the journal holds %d bytes, want 50 MB", n)
	}
	cp := openCopy(t, t.TempDir())
	f := follow(t, w.client(nil), cp)
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	expectEqual(t, w.db.j, cp)
}

func TestTPCBIsCompressed(t *testing.T) {
	w := newWorld(t, nil)
	tpcb := newTPCB()
	for i := range 20000 {
		if err := w.db.j.AppendTxn(tpcb.at(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.db.j.Flush(); err != nil {
		t.Fatal(err)
	}
	cp := openCopy(t, t.TempDir())
	f := follow(t, w.client(nil), cp)
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	passed, bytes := w.relay.Passed(faultnet.ToClient), int64(w.db.j.State().Bytes)
	t.Logf("%d bytes of transactions, %d on the wire: ratio %.2f", bytes, passed, float64(bytes)/float64(passed))
	if passed*2 > bytes {
		t.Errorf("%d bytes passed for %d bytes of transactions, want less than half", passed, bytes)
	}
	expectEqual(t, w.db.j, cp)
}

// gate is a Sink whose Frames waits until it is opened.
type gate struct {
	*CopyWriter
	open  chan struct{}
	beats chan Heartbeat
}

func (g *gate) Frames(data []byte, from, to wal.LSN) error {
	<-g.open
	return g.CopyWriter.Frames(data, from, to)
}

func (g *gate) Heartbeat(h Heartbeat) {
	select {
	case g.beats <- h:
	default:
	}
}

func TestSlowReceiverBoundsWhatIsUnderWay(t *testing.T) {
	const window = 256 << 10
	silence := time.Second
	w := newWorld(t, func(c *ServerConfig) { c.Window, c.Silence = window, silence })
	h := newHistory(w.db.j, 5)
	for range 250 { // random letters: more than 2 MB on the wire
		if err := w.db.j.AppendTxn(h.txn(1, 16<<10)); err != nil {
			t.Fatal(err)
		}
	}
	h.fill(t, 1)
	g := &gate{openCopy(t, t.TempDir()), make(chan struct{}), make(chan Heartbeat)}
	release := sync.OnceFunc(func() { close(g.open) })
	t.Cleanup(release) // Follow waits for its sink, also when this fails
	f := follow(t, w.client(func(c *ClientConfig) { c.Silence = silence }), g)
	peak := int64(0)
	look := func() int64 {
		for _, x := range w.server.Followers() {
			peak = max(peak, x.Underway)
			return x.Underway
		}
		return 0
	}
	waitFor(t, "the window to fill", func() bool { return look() > window/2 })
	// The sink stands still for longer than the silence that would end the stream: heartbeats go on both ways.
	for start := time.Now(); time.Since(start) < 2*silence; look() {
		select {
		case <-g.beats:
		case <-f.ended:
			t.Fatalf("stream ended with %v while the sink was slow", f.err)
		case <-time.After(5 * silence):
			t.Fatal("no heartbeat came while the sink was slow")
		}
	}
	if a := w.db.last("busan"); a.Received != header().From {
		t.Errorf("acknowledged %+v although the sink took nothing", a)
	}
	if passed := w.relay.Passed(faultnet.ToClient); passed > window+window/8 {
		t.Errorf("%d bytes passed to a receiver that takes nothing, the window is %d", passed, window)
	}
	release()
	waitFor(t, "the copy to be complete", func() bool { look(); return g.Ack().Durable == w.db.j.End() })
	f.stop(t)
	if peak > window {
		t.Errorf("%d bytes were under way, the window is %d", peak, window)
	}
	expectEqual(t, w.db.j, g.CopyWriter)
}

func TestOneWayCutIsNoticedAtBothEnds(t *testing.T) {
	for name, d := range map[string]faultnet.Direction{"to the origin": faultnet.ToTarget, "to the receiver": faultnet.ToClient} {
		t.Run(name, func(t *testing.T) {
			short := 200 * time.Millisecond
			w := newWorld(t, func(c *ServerConfig) { c.Silence = short })
			newHistory(w.db.j, 6).fill(t, 10)
			cp := openCopy(t, t.TempDir())
			f := follow(t, w.client(func(c *ClientConfig) { c.Silence = short }), cp)
			waitFor(t, "the copy to be complete", func() bool { return w.db.last("busan").Durable == w.db.j.End() })
			w.relay.Drop(d)
			if err := f.wait(t); !errors.Is(err, ErrSilent) || !Retry(err) {
				t.Errorf("receiver ended with %v, want silence", err)
			}
			waitFor(t, "the origin to notice", func() bool { return len(w.server.Followers()) == 0 })
		})
	}
}

func TestDeadConnectionIsReplacedSoonAfterItHeals(t *testing.T) {
	w := newWorld(t, func(c *ServerConfig) {
		c.Silence, c.Heartbeat = DefaultSilence, DefaultHeartbeat
		c.Status = func(context.Context) ([]byte, error) { return []byte("{}"), nil }
	})
	cl := w.client(func(c *ClientConfig) { c.Silence, c.Heartbeat = DefaultSilence, DefaultHeartbeat })
	if _, err := cl.Status(context.Background()); err != nil {
		t.Fatal(err)
	}
	w.relay.Cut()
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := cl.Status(ctx); !errors.Is(err, ErrBroken) && !errors.Is(err, ErrUnreachable) {
		t.Errorf("call through a cut: %v, want the connection to break", err)
	}
	if d := time.Since(start); d > DefaultSilence+2*time.Second {
		t.Errorf("the dead connection was noticed after %s", d)
	}
	w.relay.Heal()
	waitFor(t, "a call to succeed", func() bool { _, err := cl.Status(ctx); return err == nil })
}

func TestPlannedStopIsTold(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 7).fill(t, 10)
	cp := openCopy(t, t.TempDir())
	f := follow(t, w.client(nil), cp)
	waitFor(t, "the copy to be complete", func() bool { return w.db.last("busan").Durable == w.db.j.End() })
	w.stop()
	if err := f.wait(t); !errors.Is(err, ErrStopping) || !Retry(err) || !strings.Contains(err.Error(), "site seoul") {
		t.Errorf("Follow ended with %v, want that seoul stops", err)
	}
}

func TestNewerStreamTakesOver(t *testing.T) {
	w := newWorld(t, nil)
	newHistory(w.db.j, 8).fill(t, 10)
	one, two := openCopy(t, t.TempDir()), openCopy(t, t.TempDir())
	f1 := follow(t, w.client(nil), one)
	waitFor(t, "the first copy to be complete", func() bool { return one.Ack().Durable == w.db.j.End() })
	f2 := follow(t, w.client(nil), two)
	if err := f1.wait(t); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the older stream ended with %v", err)
	}
	waitFor(t, "the second copy to be complete", func() bool { return two.Ack().Durable == w.db.j.End() })
	if n := len(w.server.Followers()); n != 1 {
		t.Errorf("%d streams, want 1", n)
	}
	f2.stop(t)
}

func TestClocksAreCompared(t *testing.T) {
	const ahead = 300 * time.Millisecond
	w := newWorld(t, func(c *ServerConfig) { c.Now = func() wal.Time { return systemNow().Add(ahead) } })
	cl := w.client(nil)
	if _, ok := cl.Clock(); ok {
		t.Error("an estimate before the first exchange")
	}
	follow(t, cl, openCopy(t, t.TempDir()))
	check := func(what string, want time.Duration, estimate func() (Clock, bool)) {
		waitFor(t, what, func() bool { c, ok := estimate(); return ok && c.Samples == clockSamples })
		// The clock under both is the same one, so the bound of the estimate must hold, but for rounding.
		if c, _ := estimate(); (c.Offset - want).Abs() > c.RTT/2+10*time.Microsecond {
			t.Errorf("%s: %s with round trip %s, want %s", what, c.Offset, c.RTT, want)
		}
	}
	check("busan's estimate of seoul", ahead, cl.Clock)
	check("seoul's estimate of busan", -ahead, func() (Clock, bool) { return w.server.Clock("busan") })
	if _, ok := w.server.Clock("daegu"); ok {
		t.Error("an estimate of a site that never followed")
	}
}

// TestCopyBeginsAnewBehindWhatIsPruned: the copy's next position is gone at the origin. Follow says so, with what is there, and
// the copy goes on from that.
func TestCopyBeginsAnewBehindWhatIsPruned(t *testing.T) {
	w := newWorld(t, nil)
	h := newHistory(w.db.j, 3)
	h.fill(t, 100)
	dir := t.TempDir()
	cp := openCopy(t, dir)
	client := w.client(nil)
	f := follow(t, client, cp)
	waitFor(t, "the copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	had := cp.Ack().Durable
	h.fill(t, 2000)
	_, to, ok := w.db.j.Oldest()
	if err := w.db.j.Prune(to); !ok || err != nil {
		t.Fatal(ok, err)
	}
	var pruned *Error
	if err := follow(t, client, cp).wait(t); !errors.Is(err, ErrPruned) || !errors.As(err, &pruned) || pruned.Start != to {
		t.Fatalf("got %v, want that it begins at %s", err, to)
	}
	old, err := cp.Journal()
	if err != nil {
		t.Fatal(err)
	}
	r, err := old.NewReader(had)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := r.Next(context.Background())
		ended <- errors.Join(err, r.Close())
	}()
	cp.Freeze()
	if err := cp.BeginAnew(pruned.Start); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, journal.ErrClosed) {
		t.Errorf("a reader of the old copy got %v", err)
	}
	if _, have, at := cp.Position(); have || at != to || cp.Ack() != (Ack{}) {
		t.Errorf("begun anew: %t, %s, %+v", have, at, cp.Ack())
	}
	cp.Thaw()
	f = follow(t, client, cp)
	waitFor(t, "the new copy to be complete", func() bool { return cp.Ack().Durable == w.db.j.End() })
	f.stop(t)
	if j, err := cp.Journal(); err != nil || j.Start() != to {
		t.Errorf("the new copy begins at %s, want %s, %v", j.Start(), to, err)
	}
	expectEqual(t, w.db.j, cp)
	if err := cp.Close(); err != nil {
		t.Fatal(err)
	}
	if again := openCopy(t, dir); again.Ack().Durable != w.db.j.End() {
		t.Errorf("opened again it ends at %s", again.Ack().Durable)
	}
}

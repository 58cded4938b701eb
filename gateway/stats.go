package gateway

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/duri-io/duri/pgwire"
)

// Counts are what clients did, since the Server began.
type Counts struct {
	Transactions uint64 `json:"transactions"`
	Queries      uint64 `json:"queries"`        // a pipeline up to its Sync is one
	Received     uint64 `json:"received_bytes"` // from clients
	Sent         uint64 `json:"sent_bytes"`     // to clients
	// Moves are transactions that ran at another site than the session's transaction before.
	Moves uint64 `json:"moves"`
	// ReadsAway are transactions that were reads and ran at another site than the session's home (Config.Reads); they are no Moves.
	ReadsAway uint64 `json:"reads_away"`
	// In seconds: of transactions, from the first message of each to its end; of queries; and that clients waited for a
	// connection to a server.
	TransactionS float64 `json:"transaction_s"`
	QueryS       float64 `json:"query_s"`
	WaitS        float64 `json:"wait_s"`
}

func (c *Counts) add(o Counts) {
	c.Transactions += o.Transactions
	c.Queries += o.Queries
	c.Received += o.Received
	c.Sent += o.Sent
	c.Moves += o.Moves
	c.ReadsAway += o.ReadsAway
	c.TransactionS += o.TransactionS
	c.QueryS += o.QueryS
	c.WaitS += o.WaitS
}

// minus gives what was added since.
func (c Counts) minus(o Counts) Counts {
	return Counts{
		c.Transactions - o.Transactions, c.Queries - o.Queries, c.Received - o.Received, c.Sent - o.Sent, c.Moves - o.Moves, c.ReadsAway - o.ReadsAway,
		c.TransactionS - o.TransactionS, c.QueryS - o.QueryS, c.WaitS - o.WaitS,
	}
}

// tallying is what a session counts. Nothing of it costs more than a plain addition where the session's mu is held anyway;
// a pool gathers it when the transaction ends.
type tallying struct {
	since time.Time // when it connected

	// Guarded by mu.
	site      string    // of its latest transaction
	asked     time.Time // when the query under way was sent, or the latest
	began     time.Time // its transaction
	waitingAt time.Time // since when it waits for a server; zero: it does not
	received  uint64    // that was counted, of what its reader has received
	heard     uint64    // in SessionMode: what its reader has received

	counting *tally // in SessionMode
	told1st  bool   // it has had its first transaction
}

// start notes that a client begins to send. The session's mu is held.
func (s *session) start(b *backend) {
	if !b.line.empty() {
		return
	}
	s.asked = time.Now()
	if b.status != pgwire.Idle {
		return
	}
	s.began = s.asked
	if b == s.roamer {
		return
	}
	if s.site != b.target.Site {
		if s.told1st {
			b.counts.Moves++
		}
		s.site = b.target.Site
	}
	s.told1st = true
}

// took counts what the client has sent until now. The session's mu is held, by its own goroutine.
func (s *session) took(b *backend) {
	n := s.client.Received()
	b.counts.Received += n - s.received
	s.received = n
}

// tally counts a ReadyForQuery. The session's mu is held, by the backend's goroutine.
func (b *backend) tally(s *session, status byte) {
	now := time.Now()
	b.counts.Queries++
	b.counts.QueryS += now.Sub(s.asked).Seconds()
	s.asked = now // of the next in a pipeline
	if status == pgwire.Idle {
		b.counts.Transactions++
		if b == s.roamer {
			b.counts.ReadsAway++
		}
		b.counts.TransactionS += now.Sub(s.began).Seconds()
		s.began = now
	}
	n := b.r.Received()
	b.counts.Sent += n - b.received
	b.received = n
}

// waits notes that a session waits for a server, and gives what ends that, with the backend that it got, if any. No lock is
// held. Who waits already goes on to do so.
func (s *session) waits() (done func(b *backend)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.waitingAt.IsZero() {
		return func(*backend) {}
	}
	now := time.Now()
	s.waitingAt = now
	return func(b *backend) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.waitingAt = time.Time{}
		if b != nil {
			b.counts.WaitS += time.Since(now).Seconds()
		}
	}
}

// gather takes over what a backend has counted. Its owner's mu is held, or it has none.
func (p *pool) gather(b *backend) {
	p.counts.add(b.counts)
	b.counts = Counts{}
}

// tallyKey is what is counted apart.
type tallyKey struct{ database, user, site string }

// tally is what sessions with a backend of their own have counted.
type tally struct {
	mu sync.Mutex // guards Counts
	Counts
}

// keep adds to what is kept of pools that are gone. g.mu is held.
func (g *Server) keep(p *pool) {
	c := g.kept[p.tally]
	c.add(p.counts)
	g.kept[p.tally] = c
}

// alone gives the tally of sessions in SessionMode.
func (g *Server) alone(who *Login, site string) *tally {
	key := tallyKey{who.Database, who.User, site}
	g.mu.Lock()
	defer g.mu.Unlock()
	t := g.tallies[key]
	if t == nil {
		t = &tally{}
		g.tallies[key] = t
	}
	return t
}

// aloneAnswered counts a ReadyForQuery of a session with a backend of its own.
func (s *session) aloneAnswered(b *backend, t *tally) {
	body, err := b.r.Peek(1)
	if err != nil || len(body) == 0 {
		return
	}
	now, out := time.Now(), b.r.Received()
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.heard
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Queries++
	t.Received += in - s.received
	t.Sent += out - b.received
	s.received, b.received = in, out
	if !s.asked.IsZero() {
		t.QueryS += now.Sub(s.asked).Seconds()
	}
	if body[0] == pgwire.Idle {
		t.Transactions++
		if !s.began.IsZero() {
			t.TransactionS += now.Sub(s.began).Seconds()
		}
		s.began = time.Time{}
	}
	s.asked = time.Time{}
}

// aloneAsked notes what a client with a backend of its own has sent.
func (s *session) aloneAsked() {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = s.r.Received()
	if s.asked.IsZero() {
		s.asked = now
	}
	if s.began.IsZero() {
		s.began = now
	}
}

// Tally is what clients of a user did in a database, at one site.
type Tally struct {
	Database string `json:"database"`
	User     string `json:"user"`
	Site     string `json:"site"`
	Counts
}

// Tallies gives what was counted, sorted. Figures only grow; a transaction counts when it has ended.
func (g *Server) Tallies() []Tally {
	sums := map[tallyKey]Counts{}
	g.mu.Lock()
	maps.Copy(sums, g.kept)
	for _, p := range g.pools {
		p.mu.Lock()
		c := sums[p.tally]
		c.add(p.counts)
		sums[p.tally] = c
		p.mu.Unlock()
	}
	for key, t := range g.tallies {
		t.mu.Lock()
		c := sums[key]
		c.add(t.Counts)
		sums[key] = c
		t.mu.Unlock()
	}
	g.mu.Unlock()
	all := make([]Tally, 0, len(sums))
	for key, c := range sums {
		all = append(all, Tally{key.database, key.user, key.site, c})
	}
	slices.SortFunc(all, func(a, b Tally) int {
		return strings.Compare(a.Database+"\x00"+a.User+"\x00"+a.Site, b.Database+"\x00"+b.User+"\x00"+b.Site)
	})
	return all
}

// byDatabase sums up per database.
func byDatabase(all []Tally) map[string]Counts {
	sums := map[string]Counts{}
	for _, t := range all {
		c := sums[t.Database]
		c.add(t.Counts)
		sums[t.Database] = c
	}
	return sums
}

// periodS is how long averages are over, in seconds.
const periodS = 60

// periods are the sums per database at the ends of the last two periods.
type periods struct {
	mu       sync.Mutex // guards the rest
	old, now map[string]Counts
	oldAt    time.Time
	nowAt    time.Time
}

// turn ends a period if it is time.
func (p *periods) turn(at time.Time, sums func() map[string]Counts) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at.Sub(p.nowAt) < periodS*time.Second {
		return
	}
	p.old, p.oldAt = p.now, p.nowAt
	p.now, p.nowAt = sums(), at
}

// last gives what was counted for a database in the period that ended last, and how many seconds that was; 0: none has.
func (p *periods) last(database string) (Counts, float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.oldAt.IsZero() {
		return Counts{}, 0
	}
	return p.now[database].minus(p.old[database]), p.nowAt.Sub(p.oldAt).Seconds()
}

// counter counts things by a name that comes from a short list.
type counter struct {
	mu sync.Mutex // guards n
	n  map[string]uint64
}

func (c *counter) count(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == nil {
		c.n = map[string]uint64{}
	}
	c.n[name]++
}

func (c *counter) all() map[string]uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n)
}

// counted is a Sites that counts what it says of transactions in doubt.
type counted struct {
	Sites
	fates *counter
}

// fateNames are how fates are called in statistics.
var fateNames = map[Fate]string{Unknown: "unknown", Committed: "committed", Aborted: "aborted"}

func (c counted) Fate(ctx context.Context, d Doubt) (Fate, error) {
	f, err := c.Sites.Fate(ctx, d)
	if err != nil {
		f = Unknown
	}
	c.fates.count(fateNames[f])
	return f, err
}

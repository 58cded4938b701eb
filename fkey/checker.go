package fkey

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// Settler tells whether a row that looks like an orphan may still be one whose parent is on its way.
type Settler interface {
	// Settled reports whether everything that this site knew to be committed, at any site, when it was called has been
	// applied here, in all directions. It may wait for that until ctx ends; false then means: ask again later.
	Settled(ctx context.Context) (bool, error)
}

// Defaults of Config.
const (
	DefaultDelay = 2 * time.Second
	DefaultEvery = 10 * time.Minute
)

// Bounds of the checker.
const (
	pageRows = 10_000
	// restFactor is how many times as long as a page took the checker rests after it: it uses at most 2 % of one core.
	restFactor = 49
	// settleMax bounds one call of Settled, so that one that cannot be answered does not hold up other constraints for long.
	settleMax = 10 * time.Second
	// recordedMax bounds the rows of duri.orphan, and with them the events, of one constraint. Whoever has more has one
	// cause for them all.
	recordedMax = 10_000
)

// Config of a Checker.
type Config struct {
	// Connect opens a session for the checker alone, as a client has one: without a replication origin, with
	// session_replication_role origin. What is written in it replicates.
	Connect func(ctx context.Context) (*pgconn.PgConn, error)
	// Policies is the effective set (policy.Merge). It is asked at the start of each look at a constraint.
	Policies func(ctx context.Context) (policy.Set, error)
	Schemas  []string // of child tables; empty: all user schemas
	Settler  Settler
	// Elected reports whether this site makes the compensations: the one with the lowest id of the cluster. At the others
	// their effects arrive by replication.
	Elected func() bool

	Delay  time.Duration // between a touch and the look at it; 0: DefaultDelay
	Every  time.Duration // between looks at everything; 0: DefaultEvery
	Logger *slog.Logger  // nil: none
	// Now and After are the clock; nil: the system's.
	Now   func() time.Time
	After func(time.Duration) <-chan time.Time
}

// Status is what a Checker knows. Fields are only added (docs/reference/json.md).
type Status struct {
	Orphans     int                `json:"orphans"`              // recorded in duri.orphan
	Constraints []ConstraintStatus `json:"constraints"`          // those with orphans
	Checked     int                `json:"checked"`              // constraints that are looked at
	CheckedAt   time.Time          `json:"checked_at"`           // when a look at all of them last ended; zero: not yet
	LastError   string             `json:"last_error,omitempty"` // why one of them cannot be checked just now
}

// ConstraintStatus is a foreign key with orphans.
type ConstraintStatus struct {
	Name    string         `json:"constraint"`
	Child   string         `json:"table"`
	Parent  string         `json:"references"`
	Policy  policy.Orphans `json:"policy"`
	Orphans int            `json:"orphans"` // recorded
	Waiting int            `json:"waiting"` // seen at the last look, but not settled yet, or left to the elected site
}

// Checker finds orphans and follows their policies. Touched and Status may be called from any goroutine, Run once.
type Checker struct {
	cfg  Config
	db   store
	wake chan struct{}               // one slot: something was touched
	fks  atomic.Pointer[tableFilter] // tables that foreign keys are about; nil: not known yet

	mu      sync.Mutex // guards the rest
	touched map[string]bool
	status  Status
	counts  map[string]ConstraintStatus // by constraint
	faults  map[string]string           // likewise: why it could not be checked
}

// tableFilter has the tables, as schema.table, and their partitions.
type tableFilter map[string]bool

// store is what the checker does in the database; a struct with functions stands for it in tests. Errors concern the
// constraint at hand, or the connection, which is then opened anew.
type store interface {
	constraints(ctx context.Context) ([]*Constraint, error)
	known(ctx context.Context, c *Constraint) (map[string]bool, error)
	page(ctx context.Context, c *Constraint, after []string) (found []Orphan, end []string, err error)
	among(ctx context.Context, c *Constraint, keys [][]string) ([]Orphan, error)
	handle(ctx context.Context, c *Constraint, o Orphan, p policy.Orphans) (Outcome, error)
	close()
}

// New makes a Checker; Run starts it.
func New(cfg Config) *Checker {
	if cfg.Delay <= 0 {
		cfg.Delay = DefaultDelay
	}
	if cfg.Every <= 0 {
		cfg.Every = DefaultEvery
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.After == nil {
		cfg.After = time.After
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Checker{
		cfg: cfg, db: &session{cfg: cfg}, wake: make(chan struct{}, 1), touched: map[string]bool{}, counts: map[string]ConstraintStatus{}, faults: map[string]string{},
		status: Status{Constraints: []ConstraintStatus{}},
	}
}

// Touched notes that applied changes wrote a table, given as wal.Relation.String has it. It never blocks, and costs a map
// look-up for a table that no foreign key is about.
func (k *Checker) Touched(table string) {
	if f := k.fks.Load(); f != nil && !(*f)[table] {
		return
	}
	k.mu.Lock()
	k.touched[table] = true
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Status is what is known now. It does not ask the database.
func (k *Checker) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.status
	s.Orphans, s.Constraints = 0, []ConstraintStatus{}
	for _, id := range slices.Sorted(maps.Keys(k.counts)) {
		c := k.counts[id]
		s.Orphans += c.Orphans
		if c.Orphans+c.Waiting > 0 {
			s.Constraints = append(s.Constraints, c)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(k.faults)) {
		s.LastError = k.faults[id]
		break
	}
	return s
}

// action is what an orphan asks for.
type action int

const (
	wait    action = iota // it may not be one: look again later
	leave                 // another site acts
	actOnIt               // follow the policy
)

// decide chooses what to do about a row that looked like an orphan. again: it did so a second time; settled: by then
// everything known at the first look had been applied; elected: this site makes compensations. It is pure.
func decide(p policy.Orphans, again, settled, elected bool) action {
	switch {
	case !again || !settled:
		return wait
	case p == policy.Report || elected:
		return actOnIt
	}
	return leave
}

// job is a look at one constraint: page by page, or at some rows only.
type job struct {
	c      *Constraint
	full   bool       // of a round over everything
	keys   [][]string // rows to look at; nil: all
	begun  bool
	policy policy.Orphans
	after  []string        // last key looked at
	known  map[string]bool // recorded orphans, by key
	retry  [][]string      // rows that could not be judged or handled yet
	left   int             // orphans that the elected site is to handle
}

func (c *Constraint) id() string { return c.Child.SQL() + " " + c.Name }

// agenda is what is to be looked at, and when. Jobs take turns page by page, so that a large table does not hold up a
// small one. It is pure: the clock is an argument.
type agenda struct {
	all      []*Constraint
	due      map[string]due // constraints to look at
	jobs     []*job
	nextFull time.Time
	fullLeft map[string]bool // constraints whose look in the round over everything has not ended
	stale    bool            // the constraints are to be read again
}

// due says when to look at a constraint, and at which rows.
type due struct {
	at   time.Time
	keys [][]string // nil: all
}

// touch makes the constraints of a table due.
func (a *agenda) touch(table string, at time.Time) {
	for _, c := range a.all {
		for _, n := range slices.Concat(c.ChildStores, c.ParentStores) {
			if n.Schema+"."+n.Table == table {
				a.again(c, at, nil)
				break
			}
		}
	}
}

// again makes rows of a constraint due, or with nil all of them. What was due before stays so: the earlier time counts,
// and all rows where either asks for them.
func (a *agenda) again(c *Constraint, at time.Time, keys [][]string) {
	d := due{at, keys}
	if was, ok := a.due[c.id()]; ok {
		if was.at.Before(at) {
			d.at = was.at
		}
		if d.keys = slices.Concat(was.keys, keys); was.keys == nil || keys == nil || len(d.keys) > pageRows {
			d.keys = nil
		}
	}
	a.due[c.id()] = d
}

// start makes jobs of what is due. A constraint that is being looked at stays due: the job may have passed what was
// touched.
func (a *agenda) start(now time.Time) {
	for _, c := range a.all {
		d, ok := a.due[c.id()]
		busy := slices.ContainsFunc(a.jobs, func(j *job) bool { return j.c.id() == c.id() })
		if ok && !busy && !now.Before(d.at) {
			delete(a.due, c.id())
			a.jobs = append(a.jobs, &job{c: c, keys: d.keys, full: d.keys == nil && a.fullLeft[c.id()]})
		}
	}
}

// round begins a look at everything.
func (a *agenda) round(now time.Time, every time.Duration) {
	a.nextFull, a.fullLeft = now.Add(every), map[string]bool{}
	for _, c := range a.all {
		a.fullLeft[c.id()] = true
		a.again(c, now, nil)
	}
}

// replace takes over newly read constraints. Looks that had begun begin anew, with the constraints of now.
func (a *agenda) replace(all []*Constraint, now time.Time) {
	had, left, jobs := a.due, a.fullLeft, a.jobs
	a.all, a.due, a.fullLeft, a.jobs, a.stale = all, map[string]due{}, map[string]bool{}, nil, false
	for _, c := range all {
		if d, ok := had[c.id()]; ok {
			a.due[c.id()] = d
		}
		if left[c.id()] {
			a.fullLeft[c.id()] = true
		}
		if slices.ContainsFunc(jobs, func(j *job) bool { return j.c.id() == c.id() }) {
			a.again(c, now, nil)
		}
	}
}

// next is how long there is nothing to do. While a round is under way, its end decides when the next one begins.
func (a *agenda) next(now time.Time) time.Duration {
	var at time.Time
	if len(a.fullLeft) == 0 {
		at = a.nextFull
	}
	for _, d := range a.due {
		if at.IsZero() || d.at.Before(at) {
			at = d.at
		}
	}
	return max(at.Sub(now), 0)
}

// Run looks for orphans until ctx ends, and returns its error. Whatever fails is in the status and tried again.
func (k *Checker) Run(ctx context.Context) error {
	defer k.db.close()
	a := &agenda{due: map[string]due{}}
	for {
		rest, idle := k.turn(ctx, a)
		var woken <-chan struct{}
		if idle {
			woken = k.wake // a rest after work, or after an error, is not cut short: the turn after it sees the touch
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-woken:
		case <-k.cfg.After(rest):
		}
	}
}

// turn does one step and tells how long to rest after it. idle says that there was nothing to do.
func (k *Checker) turn(ctx context.Context, a *agenda) (rest time.Duration, idle bool) {
	now := k.cfg.Now()
	round := !now.Before(a.nextFull) && len(a.fullLeft) == 0
	if round || a.stale {
		all, err := k.db.constraints(ctx)
		if err != nil {
			return k.failed(ctx, "", "read foreign keys", err), false
		}
		k.learn(all)
		a.replace(all, now)
	}
	if round {
		a.round(now, k.cfg.Every)
	}
	for _, table := range k.takeTouched() {
		a.touch(table, now.Add(k.cfg.Delay))
	}
	a.start(now)
	if len(a.jobs) == 0 {
		return a.next(now), true
	}
	j := a.jobs[0]
	a.jobs = a.jobs[1:]
	took, done, err := k.step(ctx, j)
	switch {
	case err != nil:
		// Its table may be gone or changed. It must not hold up the round over everything, but is looked at again.
		a.stale = true
		delete(a.fullLeft, j.c.id())
		a.again(j.c, k.cfg.Now().Add(k.cfg.Delay), nil)
		return k.failed(ctx, j.c.id(), "check "+j.c.String(), err), false
	case done:
		k.finished(a, j)
	default:
		a.jobs = append(a.jobs, j)
	}
	return took * restFactor, false
}

// failed keeps an error for the status, and tells how long to rest after it. id is the constraint that it is about, or
// empty.
func (k *Checker) failed(ctx context.Context, id, what string, err error) time.Duration {
	if ctx.Err() != nil {
		return 0
	}
	text := what + ": " + err.Error()
	k.mu.Lock()
	news := k.faults[id] != text
	k.faults[id] = text
	k.mu.Unlock()
	if news {
		k.cfg.Logger.Warn(text)
	}
	return k.cfg.Delay
}

// learn takes over which tables foreign keys are about.
func (k *Checker) learn(all []*Constraint) {
	f := tableFilter{}
	ids := map[string]bool{}
	for _, c := range all {
		ids[c.id()] = true
		for _, n := range slices.Concat(c.ChildStores, c.ParentStores) {
			f[n.Schema+"."+n.Table] = true
		}
	}
	k.fks.Store(&f)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.status.Checked = len(all)
	maps.DeleteFunc(k.counts, func(id string, _ ConstraintStatus) bool { return !ids[id] })
	maps.DeleteFunc(k.faults, func(id string, _ string) bool { return !ids[id] })
}

func (k *Checker) takeTouched() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := slices.Sorted(maps.Keys(k.touched))
	clear(k.touched)
	return out
}

// finished notes the end of a look.
func (k *Checker) finished(a *agenda, j *job) {
	now := k.cfg.Now()
	if len(j.retry) > 0 {
		a.again(j.c, now.Add(k.cfg.Delay), j.retry)
	}
	all := false
	if j.full {
		delete(a.fullLeft, j.c.id())
		all = len(a.fullLeft) == 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.faults, j.c.id())
	if all {
		k.status.CheckedAt = now
	}
	k.counts[j.c.id()] = ConstraintStatus{j.c.Name, j.c.Child.String(), j.c.Parent.String(), j.policy, len(j.known), len(j.retry) + j.left}
}

// step looks at one page of a job. took is the time that reading took; waiting for others does not count.
func (k *Checker) step(ctx context.Context, j *job) (took time.Duration, done bool, err error) {
	began := k.cfg.Now()
	if !j.begun {
		if err := k.begin(ctx, j); err != nil {
			return 0, false, err
		}
	}
	found, end, err := k.look(ctx, j)
	took = k.cfg.Now().Sub(began)
	if err != nil {
		return took, false, err
	}
	if err := k.consider(ctx, j, found); err != nil {
		return took, false, err
	}
	j.after = end
	return took, end == nil, nil
}

// look is the first look at rows.
func (k *Checker) look(ctx context.Context, j *job) (found []Orphan, end []string, err error) {
	if j.keys == nil {
		return k.db.page(ctx, j.c, j.after)
	}
	found, err = k.db.among(ctx, j.c, j.keys)
	return found, nil, err
}

// begin reads what a job needs.
func (k *Checker) begin(ctx context.Context, j *job) error {
	set, err := k.cfg.Policies(ctx)
	if err != nil {
		return err
	}
	j.policy = set.Of(j.c.Child.Schema, j.c.Child.Table).Orphans(j.c.Name)
	if !j.c.Replicated {
		j.policy = policy.Report
	}
	j.known, err = k.db.known(ctx, j.c)
	j.begun = err == nil
	return err
}

// consider looks a second time at what looked like orphans, and acts.
func (k *Checker) consider(ctx context.Context, j *job, found []Orphan) error {
	elected := k.cfg.Elected()
	found = slices.DeleteFunc(found, func(o Orphan) bool { return j.skip(o, elected) })
	if len(found) == 0 {
		return nil
	}
	settled, err := k.settled(ctx)
	if err != nil {
		return err
	}
	keys := make([][]string, len(found))
	for i, o := range found {
		keys[i] = o.Key
	}
	if !settled {
		j.retry = append(j.retry, keys...)
		return nil
	}
	again, err := k.db.among(ctx, j.c, keys)
	if err != nil {
		return err
	}
	for _, o := range again {
		if err := k.act(ctx, j, o, decide(j.policy, true, settled, elected)); err != nil {
			return err
		}
	}
	return nil
}

// skip tells orphans that are recorded already and need nothing more: what could not be compensated is tried again in the
// rounds over everything.
func (j *job) skip(o Orphan, elected bool) bool {
	recorded := j.known[j.c.keyJSON(o)]
	if recorded {
		return j.policy == policy.Report || !elected || !j.full
	}
	return j.policy == policy.Report && len(j.known) >= recordedMax
}

func (k *Checker) settled(ctx context.Context) (bool, error) {
	within, cancel := context.WithTimeout(ctx, settleMax)
	defer cancel()
	ok, err := k.cfg.Settler.Settled(within)
	if err != nil && within.Err() != nil && ctx.Err() == nil {
		return false, nil
	}
	return ok, err
}

// act does what was decided for one orphan.
func (k *Checker) act(ctx context.Context, j *job, o Orphan, what action) error {
	switch what {
	case wait:
		j.retry = append(j.retry, o.Key)
		return nil
	case leave:
		j.left++
		return nil
	}
	out, err := k.db.handle(ctx, j.c, o, j.policy)
	if _, stays := lasting(err); stays || pg.IsConnectionError(err) || ctx.Err() != nil {
		return err
	}
	if err != nil { // a lock, a deadlock
		k.cfg.Logger.Debug("handle an orphan", "constraint", j.c.String(), "error", err)
		j.retry = append(j.retry, o.Key)
		return nil
	}
	switch key := j.c.keyJSON(o); out {
	case Recorded:
		j.known[key] = true
	case Removed, Resurrected, Gone:
		delete(j.known, key)
	}
	return nil
}

// session is the store in PostgreSQL. It connects when there is something to do and keeps the session.
type session struct {
	cfg  Config
	conn *pgconn.PgConn
}

// with lends the session and drops it after an error of the connection.
func (s *session) with(ctx context.Context, f func(conn *pgconn.PgConn) error) error {
	if s.conn == nil || s.conn.IsClosed() {
		conn, err := s.cfg.Connect(ctx)
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		s.conn = conn
	}
	err := f(s.conn)
	if err != nil && (pg.IsConnectionError(err) || s.conn.IsClosed()) {
		s.close()
	}
	return err
}

func (s *session) close() {
	pg.Close(s.conn)
	s.conn = nil
}

func (s *session) constraints(ctx context.Context) (out []*Constraint, err error) {
	err = s.with(ctx, func(conn *pgconn.PgConn) error {
		if out, err = Constraints(ctx, conn, s.cfg.Schemas); err != nil {
			return err
		}
		return forgetOthers(ctx, conn, out)
	})
	return out, err
}

func (s *session) known(ctx context.Context, c *Constraint) (out map[string]bool, err error) {
	err = s.with(ctx, func(conn *pgconn.PgConn) error {
		out, err = known(ctx, conn, c)
		return err
	})
	return out, err
}

func (s *session) page(ctx context.Context, c *Constraint, after []string) (found []Orphan, end []string, err error) {
	err = s.with(ctx, func(conn *pgconn.PgConn) error {
		found, end, err = page(ctx, conn, c, after, pageRows)
		return err
	})
	return found, end, err
}

func (s *session) among(ctx context.Context, c *Constraint, keys [][]string) (out []Orphan, err error) {
	err = s.with(ctx, func(conn *pgconn.PgConn) error {
		out, err = OrphansAmong(ctx, conn, c, keys)
		return err
	})
	return out, err
}

func (s *session) handle(ctx context.Context, c *Constraint, o Orphan, p policy.Orphans) (out Outcome, err error) {
	err = s.with(ctx, func(conn *pgconn.PgConn) error {
		out, err = handle(ctx, conn, c, o, p)
		return err
	})
	return out, err
}

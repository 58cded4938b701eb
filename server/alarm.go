package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/link"
)

// Levels of what is bounded by a budget, worst last.
const (
	LevelOK       = "ok"
	LevelWarning  = "warning"  // 70 %
	LevelCritical = "critical" // 85 %
	LevelFull     = "full"     // 95 %: journal.full says what happens
)

// levels are where each begins, in percent of the budget, worst first.
var levels = []struct {
	name string
	from int64
}{{LevelFull, 95}, {LevelCritical, 85}, {LevelWarning, 70}, {LevelOK, 0}}

// levelSlack is how many percent below its beginning a level ends, so that it does not come and go.
const levelSlack = 5

// levelOf is the level of what is used of a budget, after it was was.
func levelOf(was string, used, budget int64) string {
	for _, l := range levels {
		from := l.from
		if l.name == was {
			from -= levelSlack
		}
		if used*100 >= from*max(budget, 1) {
			return l.name
		}
	}
	return LevelOK
}

// fullIn is how long it takes until a budget is used up when it goes on like this; 0: it does not grow, or has grown beyond
// it.
func fullIn(used, budget int64, bytesPerSecond float64) time.Duration {
	if bytesPerSecond <= 0 || used >= budget {
		return 0
	}
	const longest = 100 * 24 * 365 * time.Hour
	seconds := float64(budget-used) / bytesPerSecond
	return time.Duration(min(seconds, longest.Seconds()) * float64(time.Second))
}

// BudgetStatus tells how much of a budget is used. Sizes are bytes, durations seconds.
type BudgetStatus struct {
	Level  string  `json:"level"`
	Used   int64   `json:"used"`
	Budget int64   `json:"budget"`
	Growth float64 `json:"growth"`    // bytes a second, over the last minute
	FullIn float64 `json:"full_in_s"` // at that growth; 0: it does not grow
	// Holds says what is kept, and why, the largest part first.
	Holds []string `json:"holds,omitempty"`
}

// growthWindow is the time over which growth is measured.
const growthWindow = time.Minute

// usage follows what is used of a budget. It is used by one goroutine; what it gives may be read by others.
type usage struct {
	samples []sample // at most one a second, over growthWindow
	level   string
}

type sample struct {
	at   time.Time
	used int64
}

// see takes a measurement; news says that the level has changed.
func (u *usage) see(at time.Time, used, budget int64) (s BudgetStatus, news bool) {
	if n := len(u.samples); n == 0 || at.Sub(u.samples[n-1].at) >= time.Second {
		u.samples = append(u.samples, sample{at, used})
	}
	for len(u.samples) > 1 && at.Sub(u.samples[0].at) > growthWindow {
		u.samples = u.samples[1:]
	}
	first := u.samples[0]
	growth := 0.0
	if d := at.Sub(first.at).Seconds(); d >= 1 {
		growth = float64(used-first.used) / d
	}
	was := u.level
	if was == "" {
		was = LevelOK
	}
	u.level = levelOf(was, used, budget)
	return BudgetStatus{Level: u.level, Used: used, Budget: budget, Growth: growth, FullIn: fullIn(used, budget, growth).Seconds()}, u.level != was
}

// Sentence tells of a level; what names what is bounded.
func (s BudgetStatus) Sentence(what string) string {
	text := fmt.Sprintf("%s: %d %% of %s used", what, 100*s.Used/max(s.Budget, 1), term.Size(s.Budget))
	if s.FullIn > 0 && s.Level != LevelOK {
		text += fmt.Sprintf(", full in %s at the present rate", time.Duration(s.FullIn*float64(time.Second)).Round(time.Second))
	}
	if len(s.Holds) > 0 {
		text += "; " + strings.Join(s.Holds, "; ")
	}
	return text
}

// measure looks how much of the budget the journals use, the own one's size first, and tells when that has reached another
// level.
func (n *node) measure(now time.Time, c *captured, sizes []int64) {
	total := int64(0)
	for _, s := range sizes {
		total += s
	}
	status, news := n.used.see(now, total, n.share())
	if status.Level != LevelOK {
		status.Holds = n.holders(now, c, sizes)
	}
	n.room.Store(&status)
	if news {
		n.alarm("journal_budget", status, JournalsUsed)
	}
}

// What is bounded, for BudgetStatus.Sentence.
const (
	JournalsUsed = "journal.budget"
	WALUsed      = "max_slot_wal_keep_size, by the WAL that is not decoded yet"
)

// alarm makes a change of level known.
func (n *node) alarm(kind string, s BudgetStatus, what string) {
	text := s.Sentence(what) + " (" + s.Level + ")"
	switch s.Level {
	case LevelOK:
		n.log.Info(text, "database", n.database.Name)
	case LevelWarning:
		n.log.Warn(text, "database", n.database.Name)
	default:
		n.log.Error(text, "database", n.database.Name)
	}
	n.event(kind, text)
}

// holders says what keeps the journals from being pruned, the largest first.
func (n *node) holders(now time.Time, c *captured, sizes []int64) []string {
	type hold struct {
		bytes int64
		text  string
	}
	var all []hold
	if p := n.slowest(c); p != nil {
		text := fmt.Sprintf("%s of this site's own journal are kept for %s", term.Size(sizes[0]), p.standing(now))
		p.mu.Lock()
		if p.kept != "" {
			text += ", and not freed: " + p.kept
		}
		p.mu.Unlock()
		all = append(all, hold{sizes[0], text})
	}
	for i, p := range n.peers {
		why := "its changes are applied late here"
		if in := p.live.Load(); in != nil {
			switch st := in.worker.Status(); {
			case st.LastError != "":
				why = st.LastError
			case st.Blocker != "":
				why = "apply waits for the locks of " + st.Blocker
			}
		}
		all = append(all, hold{sizes[i+1], fmt.Sprintf("%s of %s's journal: %s", term.Size(sizes[i+1]), p.site.Name, why)})
	}
	slices.SortStableFunc(all, func(x, y hold) int { return cmp.Compare(y.bytes, x.bytes) })
	var out []string
	for _, h := range all {
		if h.bytes >= n.share()/4 {
			out = append(out, h.text)
		}
	}
	return out
}

// slowest is the peer that keeps the own journal from being pruned; nil when none does.
func (n *node) slowest(c *captured) (slowest *peer) {
	end := c.journal.End()
	for _, p := range n.peers {
		if at := min(p.acked().Durable, p.seen()); at < end {
			slowest, end = p, at
		}
	}
	return slowest
}

// standing says in a few words how a peer is.
func (p *peer) standing(now time.Time) string {
	in := p.live.Load()
	if in == nil {
		return p.site.Name
	}
	switch _, at := in.copy.Heard(); {
	case at.IsZero():
		return p.site.Name + ", which has not been heard since this agent started"
	case now.Sub(at) >= link.DefaultSilence:
		return fmt.Sprintf("%s, which is away since %s", p.site.Name, at.Local().Format("2006-01-02 15:04:05"))
	}
	return p.site.Name + ", which is behind"
}

// slotSQL gives how much WAL the slot holds, and how much it may; no row where nothing bounds it.
const slotSQL = `SELECT pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), s.restart_lsn)::int8, c.setting::int8 * 1048576
FROM pg_catalog.pg_replication_slots s, pg_catalog.pg_settings c
WHERE s.slot_name = $1 AND c.name = 'max_slot_wal_keep_size' AND c.setting <> '-1' AND s.restart_lsn IS NOT NULL`

// measureWAL looks how much WAL the slot holds of what it may: beyond that, PostgreSQL drops WAL that is not decoded yet. It
// tells when that has reached another level.
func (n *node) measureWAL(ctx context.Context, c *pgconn.PgConn) (news bool, err error) {
	rows, err := pg.Query(ctx, c, slotSQL, Slot(n.database.Name))
	if err != nil || len(rows) == 0 {
		n.walRoom.Store(nil)
		return false, err
	}
	var used, budget int64
	if _, err := fmt.Sscan(rows[0][0]+" "+rows[0][1], &used, &budget); err != nil {
		return false, fmt.Errorf("read what the slot holds: %w", err)
	}
	status, news := n.walUsed.see(time.Now(), used, budget)
	if why := n.gate.reason(); why != nil && status.Level != LevelOK {
		status.Holds = []string{why.Error()}
	}
	n.walRoom.Store(&status)
	return news, nil
}

package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
)

// permit lets one user run while it is given. The zero permit is not.
type permit struct {
	mu    sync.Mutex // guards the rest
	given bool
	news  chan struct{} // closed when given changes
	stop  context.CancelFunc
}

// wait returns when the permit is given, with a context that ends with ctx, when the permit is withdrawn, or by the
// function that is returned.
func (p *permit) wait(ctx context.Context) (context.Context, context.CancelFunc, error) {
	for {
		p.mu.Lock()
		if p.given {
			inner, stop := context.WithCancel(ctx)
			p.stop = stop
			p.mu.Unlock()
			return inner, stop, nil
		}
		if p.news == nil {
			p.news = make(chan struct{})
		}
		news := p.news
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-news:
		}
	}
}

// set gives or withdraws the permit.
func (p *permit) set(given bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.given == given {
		return
	}
	p.given = given
	if !given && p.stop != nil {
		p.stop()
	}
	if p.news != nil {
		close(p.news)
		p.news = nil
	}
}

const (
	// surveyEvery is how often it is looked whether the declarations of policies have changed here.
	surveyEvery = 5 * time.Second
	// askEvery is how often a peer is asked what is declared there, askAgain how often while that is not known, and
	// askMax how long an answer may take.
	askEvery = 2 * time.Second
	askAgain = 250 * time.Millisecond
	askMax   = 3 * time.Second
)

// policiesOf is the key of duri.meta under which the last answer of a peer is kept: what was received of a site that is
// lost must be applied after a restart too.
func policiesOf(site string) string { return "policies of " + site }

// readPolicies reads the effective set.
func (n *node) readPolicies(ctx context.Context) (effective policy.Set, err error) {
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		sql, err := catalog.Policies(ctx, c)
		effective, _ = policy.Merge(n.database.Policies(), sql)
		return err
	})
	return effective, err
}

// openPolicies reads what is declared here, and what each peer last said; before the histories are rebuilt.
func (n *node) openPolicies(ctx context.Context) error {
	set, err := n.readPolicies(ctx)
	if err != nil {
		return err
	}
	n.policyMu.Lock()
	defer n.policyMu.Unlock()
	n.keys.SetPolicies(set)
	n.policies.Store(&set)
	for _, p := range n.peers {
		if err := p.recallPolicies(ctx); err != nil {
			return err
		}
		p.compare()
	}
	return nil
}

// policyOf is what is declared for a table. It changes only while no worker runs.
func (n *node) policyOf(schema, table string) policy.Table {
	return n.policies.Load().Of(schema, table)
}

// surveyLoop follows what is declared here, and counts what is parked.
func (n *node) surveyLoop(ctx context.Context) error {
	t := time.NewTicker(surveyEvery)
	defer t.Stop()
	for {
		if err := n.survey(ctx); err != nil && ctx.Err() == nil {
			n.log.Debug("look at policies and parked rows", "database", n.database.Name, "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

func (n *node) survey(ctx context.Context) error {
	set, err := n.readPolicies(ctx)
	if err == nil {
		n.adopt(set)
	}
	return errors.Join(err, n.countParked(ctx))
}

// adopt puts a set in force. Workers do not run meanwhile: each run has one set from its start to its end.
func (n *node) adopt(set policy.Set) {
	was := n.policies.Load()
	if reflect.DeepEqual(*was, set) { // partitions count too
		return
	}
	again := n.haltWorkers()
	n.keys.SetPolicies(set)
	n.policies.Store(&set)
	again()
	if policy.Fingerprint(*was) != policy.Fingerprint(set) {
		text := "the table policies have changed: " + changes(*was, set)
		n.log.Info(text, "database", n.database.Name)
		n.event("policy", text)
	}
}

// haltWorkers ends the runs of all workers and lets none begin until again is called.
func (n *node) haltWorkers() (again func()) {
	n.policyMu.Lock()
	for _, p := range n.peers {
		p.permit.set(false)
	}
	for _, p := range n.peers {
		p.running.Lock()
	}
	return func() {
		for _, p := range n.peers {
			p.running.Unlock()
			p.compare()
		}
		n.policyMu.Unlock()
	}
}

// changes tells what differs between two sets, table by table.
func changes(was, now policy.Set) string {
	var out []string
	tables := append(was.Tables(), now.Tables()...)
	told := map[policy.Name]bool{}
	for _, t := range tables {
		a, b := was.Of(t.Schema, t.Table).String(), now.Of(t.Schema, t.Table).String()
		if a != b && !told[t] {
			told[t] = true
			out = append(out, fmt.Sprintf("%s is %s, was %s", t, b, a))
		}
	}
	return strings.Join(out, "; ")
}

// recallPolicies reads the peer's last answer that was kept.
func (p *peer) recallPolicies(ctx context.Context) error {
	return p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		doc, ok, err := catalog.Meta(ctx, c, policiesOf(p.site.Name))
		if err != nil || !ok {
			return err
		}
		var set policy.Set
		if json.Unmarshal([]byte(doc), &set) == nil { // else it is asked again, as if it had never been
			p.theirs = &set
		}
		return nil
	})
}

// compare decides whether the peer's changes may be applied: when both sites are known to decide alike. The node's
// policyMu is held.
func (p *peer) compare() {
	own := p.n.policies.Load()
	if own == nil {
		return
	}
	var held fault
	if p.theirs != nil {
		if err := policy.Difference(p.n.self.Name, p.site.Name, *own, *p.theirs); err != nil {
			held = newFault("apply "+p.site.Name, err)
		}
	}
	p.mu.Lock()
	news := held.Text != p.held.Text
	if news {
		p.held = held
	}
	p.unasked = p.theirs == nil
	p.mu.Unlock()
	p.permit.set(p.theirs != nil && held.Text == "")
	switch {
	case !news:
	case held.Text != "":
		p.log.Warn(held.Text, "hint", held.Hint)
	default:
		p.log.Info("the table policies agree again")
	}
}

// askLoop follows what is declared at the peer. One that cannot be asked stands by its last answer.
func (p *peer) askLoop(ctx context.Context) error {
	for {
		pause := askEvery
		set, err := p.ask(ctx)
		if err == nil {
			err = p.heardPolicies(ctx, set)
		}
		if err != nil && ctx.Err() == nil {
			p.log.Debug("ask for table policies", "error", err)
		}
		p.mu.Lock()
		if p.unasked {
			pause = askAgain
		}
		p.mu.Unlock()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// ask asks the peer's agent.
func (p *peer) ask(ctx context.Context) (policy.Set, error) {
	ctx, cancel := context.WithTimeout(ctx, askMax)
	defer cancel()
	doc, err := p.client.Status(ctx)
	if err != nil {
		return policy.Set{}, err
	}
	return declaredIn(doc, p.n.database.Name)
}

// declaredIn finds a database's policies in a status document. An agent that does not know of policies has none.
func declaredIn(doc []byte, database string) (policy.Set, error) {
	var s struct {
		Databases []struct {
			Name     string      `json:"name"`
			State    string      `json:"state"`
			Policies *policy.Set `json:"policies"`
		} `json:"databases"`
	}
	if err := json.Unmarshal(doc, &s); err != nil {
		return policy.Set{}, fmt.Errorf("read the status of a peer: %w", err)
	}
	for _, d := range s.Databases {
		switch {
		case d.Name != database:
		case d.Policies != nil:
			return *d.Policies, nil
		case d.State == stateReady:
			return policy.Set{}, nil
		}
	}
	return policy.Set{}, errors.New("its database is not open yet")
}

// heardPolicies takes the peer's answer, and keeps it.
func (p *peer) heardPolicies(ctx context.Context, set policy.Set) error {
	n := p.n
	n.policyMu.Lock()
	was := p.theirs
	p.theirs = &set
	p.compare()
	n.policyMu.Unlock()
	if was != nil && policy.Fingerprint(*was) == policy.Fingerprint(set) {
		return nil
	}
	doc, err := json.Marshal(set)
	if err != nil {
		return err
	}
	return n.withSQL(ctx, func(c *pgconn.PgConn) error {
		return catalog.SetMeta(ctx, c, policiesOf(p.site.Name), string(doc))
	})
}

// ParkedTable is a table with rows that are set aside, because newer rows have unique values of theirs (rule 11).
type ParkedTable struct {
	Table string `json:"table"`
	Rows  int    `json:"rows"`
}

// countParked counts the parked rows for the status.
func (n *node) countParked(ctx context.Context) error {
	var all []ParkedTable
	began := time.Now().UTC()
	err := n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT table_schema, table_name, count(*) FROM duri.parked GROUP BY 1, 2 ORDER BY 1, 2")
		if err != nil {
			return fmt.Errorf("count parked rows: %w", err)
		}
		all = nil
		for _, r := range rows {
			t := ParkedTable{Table: policy.Name{Schema: r[0], Table: r[1]}.String()}
			if _, err := fmt.Sscan(r[2], &t.Rows); err != nil {
				return fmt.Errorf("count parked rows: %w", err)
			}
			all = append(all, t)
		}
		return nil
	})
	if err == nil {
		n.mu.Lock()
		n.parked, n.parkedAt = all, began
		n.mu.Unlock()
	}
	return err
}

// heldProblem is the fault of a direction in which single rows wait.
func heldProblem(s apply.Status) *fault {
	rows := "the changes of 1 row wait"
	if s.Held != 1 {
		rows = fmt.Sprintf("the changes of %d rows wait", s.Held)
	}
	f := &fault{Text: rows + " for locks of this site's clients; the others are applied", Hint: "end or commit the session that holds the locks; they go on by themselves"}
	if s.Blocker != "" {
		f.Text += "; held by " + s.Blocker
	}
	return f
}

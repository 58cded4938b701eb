package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/grants"
	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/policy"
)

func TestAPermitIsWaitedForAndEndsItsUser(t *testing.T) {
	var p permit
	type got struct {
		ctx   context.Context
		leave context.CancelFunc
		err   error
	}
	ask := func(ctx context.Context) <-chan got {
		out := make(chan got, 1)
		go func() {
			inner, leave, err := p.wait(ctx)
			out <- got{inner, leave, err}
		}()
		return out
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if g := <-ask(ended); g.err == nil {
		t.Error("a permit was given to one who has gone")
	}
	waiting := ask(t.Context())
	select {
	case <-waiting:
		t.Fatal("a permit that was not given was had")
	default:
	}
	p.set(true)
	g := <-waiting
	if g.err != nil || g.ctx.Err() != nil {
		t.Fatal(g.err)
	}
	p.set(true)
	if g.ctx.Err() != nil {
		t.Error("giving it again ends its user")
	}
	p.set(false)
	if g.ctx.Err() == nil {
		t.Error("withdrawing it does not end its user")
	}
	g.leave()
	again := ask(t.Context())
	p.set(true)
	if g := <-again; g.err != nil || g.ctx.Err() != nil {
		t.Error("it is not had again")
	} else {
		g.leave()
	}
}

func TestThePoliciesOfAPeerAreInItsStatus(t *testing.T) {
	column := policy.NewSet(map[policy.Name]policy.Table{{Schema: "public", Table: "t"}: {Mode: policy.ModeColumn}}, nil)
	doc := func(databases ...DatabaseStatus) []byte {
		b, err := json.Marshal(SiteStatus{Databases: databases})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		name  string
		doc   []byte
		known bool
		want  policy.Set
	}{
		{"declared", doc(DatabaseStatus{Name: "other", State: stateReady}, DatabaseStatus{Name: "app", Policies: &column}), true, column},
		{"nothing declared", doc(DatabaseStatus{Name: "app", State: stateReady, Policies: &policy.Set{}}), true, policy.Set{}},
		{"an agent that knows of none", doc(DatabaseStatus{Name: "app", State: stateReady}), true, policy.Set{}},
		{"not open yet", doc(DatabaseStatus{Name: "app", State: stateJoining}), false, policy.Set{}},
		{"another database", doc(DatabaseStatus{Name: "other", Policies: &column}), false, policy.Set{}},
		{"no document", []byte("{"), false, policy.Set{}},
		{"a table without a name", []byte(`{"databases": [{"name": "app", "policies": {"t": {}}}]}`), false, policy.Set{}},
	} {
		got, err := declaredIn(c.doc, "app")
		if (err == nil) != c.known || policy.Fingerprint(got) != policy.Fingerprint(c.want) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
}

// TestADirectionRunsWhenBothSitesAreKnownToDeclareTheSame goes through what may be heard of a peer.
func TestADirectionRunsWhenBothSitesAreKnownToDeclareTheSame(t *testing.T) {
	name := policy.Name{Schema: "public", Table: "t"}
	delta := policy.NewSet(map[policy.Name]policy.Table{name: {Delta: []string{"n"}}}, nil)
	n := &node{self: config.Site{Name: "a"}}
	p := &peer{n: n, site: config.Site{Name: "b"}, log: slog.New(slog.DiscardHandler)}
	n.policies.Store(&delta)
	for _, c := range []struct {
		name   string
		theirs *policy.Set
		runs   bool
		fault  string
	}{
		{"never asked", nil, false, ""},
		{"it declares nothing", &policy.Set{}, false, "apply b: table public.t has another policy at b (default) than at a (mode row, delta n)"},
		{"it declares the same", &delta, true, ""},
	} {
		p.theirs = c.theirs
		p.compare()
		if p.permit.given != c.runs || p.held.Text != c.fault || p.unasked != (c.theirs == nil) || (c.fault == "") != (p.held.Hint == "") {
			t.Errorf("%s: runs %v, unasked %v, %+v", c.name, p.permit.given, p.unasked, p.held)
		}
	}
}

func TestAChangeOfPoliciesIsToldTableByTable(t *testing.T) {
	a, b, c := policy.Name{Schema: "s", Table: "a"}, policy.Name{Schema: "s", Table: "b"}, policy.Name{Schema: "s", Table: "c"}
	was := policy.NewSet(map[policy.Name]policy.Table{a: {Mode: policy.ModeColumn}, b: {Delta: []string{"n"}}}, nil)
	now := policy.NewSet(map[policy.Name]policy.Table{b: {Delta: []string{"n"}}, c: {Mode: policy.ModeColumn}}, nil)
	const want = "s.a is default, was mode column; s.c is mode column, was default"
	if got := changes(was, now); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// TestWhatIsDeclaredIsFollowedAndWhatAPeerSaidIsKept has a database without an agent around it.
func TestWhatIsDeclaredIsFollowedAndWhatAPeerSaidIsKept(t *testing.T) {
	c := pgtest.New(t, pgtest.WithSetting("wal_level", "logical"), pgtest.WithSetting("track_commit_timestamp", "on"))
	pgtest.DB(t, c, "shop")
	pgtest.Exec(t, c, "shop", "CREATE TABLE t (id int PRIMARY KEY, n int); ALTER TABLE t REPLICA IDENTITY FULL")
	pgtest.Exec(t, c, "shop", grants.SQL(grants.Spec{}))
	n := &node{
		cfg: &config.Config{Postgres: config.Postgres{DSN: c.DSN("shop", "duri")}}, database: config.Database{Name: "shop"},
		self: config.Site{Name: "a"}, log: slog.New(slog.DiscardHandler), keys: apply.NewKeys(c.DSN("shop", "duri"), "shop"),
	}
	n.newSessions()
	t.Cleanup(n.sql.close)
	t.Cleanup(n.keys.Close)
	join := func() *peer {
		p := &peer{n: n, site: config.Site{Name: "b"}, log: n.log}
		n.peers = []*peer{p}
		if err := n.openPolicies(t.Context()); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := n.withSQL(t.Context(), func(conn *pgconn.PgConn) error { return catalog.Migrate(t.Context(), conn) }); err != nil {
		t.Fatal(err)
	}
	p := join()
	if p.permit.given || !p.unasked {
		t.Error("changes of a peer that was never asked are applied")
	}
	if err := p.heardPolicies(t.Context(), policy.Set{}); err != nil {
		t.Fatal(err)
	}
	if !p.permit.given {
		t.Error("changes of a peer that declares the same are held")
	}
	run, leave, err := p.permit.wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer leave()

	pgtest.Exec(t, c, "shop", `SELECT duri.set_policy('t', '{"delta": ["n"]}');
		INSERT INTO duri.parked VALUES ('public', 't', '', '{}', 1, now(), '0/0', '{}', 'u', '')`)
	if err := n.survey(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := n.policyOf("public", "t").Delta; len(d) != 1 || d[0] != "n" {
		t.Errorf("delta columns: %v", d)
	}
	if run.Err() == nil || p.permit.given || p.held.Text == "" {
		t.Errorf("the worker goes on with another policy than its peer: %+v", p.held)
	}
	if got := n.parked; len(got) != 1 || got[0] != (ParkedTable{"public.t", 1}) {
		t.Errorf("parked: %v", got)
	}
	if err := n.survey(t.Context()); err != nil {
		t.Fatal(err)
	}
	if events := pgtest.Query(t, c, "shop", "SELECT text FROM duri.event WHERE kind = 'policy'"); len(events) != 1 || events[0][0] != "the table policies have changed: public.t is mode row, delta n, was default" {
		t.Errorf("events: %v", events)
	}
	if err := p.heardPolicies(t.Context(), *n.policies.Load()); err != nil || !p.permit.given || p.held.Text != "" {
		t.Errorf("it does not go on when the sites agree: %v, %+v", err, p.held)
	}
	if p := join(); !p.permit.given || p.unasked {
		t.Error("the last answer does not count after a restart")
	}
}

func TestHeldRowsDegradeALink(t *testing.T) {
	l := LinkStatus{From: "b", Health: HealthOK, Connected: true, Apply: apply.Status{Held: 2, Blocker: "pid 7"}}
	l.judge(time.Second, fault{})
	if l.Health != HealthDegraded || l.Problem == nil || !strings.Contains(l.Problem.Text, "2 rows wait") || !strings.Contains(l.Problem.Text, "pid 7") || l.Problem.Hint == "" {
		t.Errorf("%s, %+v", l.Health, l.Problem)
	}
	l = LinkStatus{From: "b", Health: HealthOK, Connected: true}
	l.judge(time.Second, fault{})
	if l.Health != HealthOK || l.Problem != nil {
		t.Errorf("%s, %+v", l.Health, l.Problem)
	}
}

func TestTheSiteWithTheLowestNumberIsElected(t *testing.T) {
	sites := []config.Site{{ID: 5, Name: "x"}, {ID: 2, Name: "y"}, {ID: 9, Name: "z"}}
	for i, want := range []bool{false, true, false} {
		n := &node{cfg: &config.Config{Sites: sites}, self: sites[i]}
		if n.elected() != want {
			t.Errorf("%s: %v", sites[i].Name, !want)
		}
	}
}

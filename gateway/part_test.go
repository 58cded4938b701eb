package gateway

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/duri-io/duri/internal/pgtest"
	"github.com/duri-io/duri/pgwire"
)

func TestErrands(t *testing.T) {
	all := orders{handing: true, emptied: map[string]bool{"a": true}}
	emptied := orders{emptied: map[string]bool{"a": true}}
	for name, c := range map[string]struct {
		footing
		orders
		want errand
		why  string
	}{
		"nothing is ordered":                     {footing{site: "a", keeps: "LISTEN"}, orders{}, noErrand, ""},
		"a site is emptied: pinned there":        {footing{site: "a", keeps: "LISTEN"}, emptied, askedOut, "LISTEN"},
		"a site is emptied: pinned elsewhere":    {footing{site: "b", keeps: "LISTEN"}, emptied, noErrand, ""},
		"a site is emptied: not pinned":          {footing{}, emptied, noErrand, ""},
		"a site is emptied: TLS does not matter": {footing{fixed: fixedTLS}, emptied, noErrand, ""},
		"a site is emptied: in a transaction":    {footing{site: "a", keeps: "LISTEN", busy: true}, emptied, noErrand, ""},
		"a site is emptied: it is being asked":   {footing{site: "a", keeps: "LISTEN", heard: true}, emptied, noErrand, ""},
		"handed over: idle":                      {footing{}, orders{handing: true}, handOver, ""},
		"handed over: busy":                      {footing{busy: true}, orders{handing: true}, noErrand, ""},
		"handed over: half a message":            {footing{heard: true}, orders{handing: true}, noErrand, ""},
		"handed over: TLS":                       {footing{fixed: fixedTLS}, orders{handing: true}, askedOut, fixedTLS},
		"handed over: TLS, busy":                 {footing{fixed: fixedTLS, busy: true}, orders{handing: true}, noErrand, ""},
		"handed over: pinned":                    {footing{site: "b", keeps: "LISTEN"}, orders{handing: true}, askedOut, "LISTEN"},
		"handed over: pinned and TLS":            {footing{site: "b", keeps: "LISTEN", fixed: fixedTLS}, orders{handing: true}, askedOut, "LISTEN"},
		"handed over: session mode, busy":        {footing{site: "b", keeps: keepsAlone, busy: true}, orders{handing: true}, noErrand, ""},
		"both: idle":                             {footing{}, all, handOver, ""},
		"both: pinned there":                     {footing{site: "a", keeps: "LISTEN"}, all, askedOut, "LISTEN"},
	} {
		if got, why := c.errand(c.orders); got != c.want || why != c.why {
			t.Errorf("%s: %d %q, want %d %q", name, got, why, c.want, c.why)
		}
	}
}

// TestAloneIsIdle: letters are messages of a client, with a small r for a ReadyForQuery outside a transaction, t for one within.
func TestAloneIsIdle(t *testing.T) {
	for messages, want := range map[string]bool{
		"": true, "Q": false, "Qr": true, "Qt": false, "QtQr": true, "QQr": false, "QQrr": true,
		"P": false, "PBDE": false, "PBDESr": true, "PBDEH": false, "PBDESPBDESr": false, "PBDESPBDESrr": true,
		"Qdcr": true, "Qdc": false, "Qdfr": true,
		"PBESdcSr": true,  // the first Sync is ignored in a COPY
		"PBESdcS":  false, // and the second one answered
		"PBESdc":   false, "PBEHdcSr": true,
		"QPBESdcSr": false, // it cannot be told
		"F":         false, "Fr": true,
	} {
		var a asked1
		for _, m := range messages {
			switch m {
			case 'r':
				a.ready(pgwire.Idle)
			case 't':
				a.ready(pgwire.InBlock)
			default:
				a.send(byte(m))
			}
		}
		if a.idle() != want {
			t.Errorf("%q: idle %v, want %v", messages, a.idle(), want)
		}
	}
}

// lastWords waits for the end of a client's session, which it has not asked for.
func lastWords(t *testing.T, c *pgx.Conn) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	err := c.PgConn().WaitForNotification(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the session was not ended")
	}
	return err
}

// goesOn checks that a client is served.
func goesOn(t *testing.T, what string, c *pgx.Conn) {
	t.Helper()
	if err := c.QueryRow(t.Context(), "SELECT 1").Scan(new(int)); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// TestSessionsThatKeepAConnectionAreAskedToLeave: between two transactions they end with the reason; in one they do not, and others
// not at all.
func TestSessionsThatKeepAConnectionAreAskedToLeave(t *testing.T) {
	c := site(t, "")
	for mode, pin := range map[Mode]string{TransactionMode: "LISTEN", SessionMode: keepsAlone} {
		g, addr := serve(t, Config{Mode: mode, Router: byApplication{"there": target(c, "a"), "free": target(c, "b")}}, c)
		open := func(application string) *pgx.Conn { return open1(t, dsn(addr, "application_name="+application)) }
		free, idle, busy, late := open("free"), open("there"), open("there"), open("there")
		for _, conn := range []*pgx.Conn{idle, busy} {
			exec1(t, conn, "LISTEN x")
		}
		exec1(t, busy, "BEGIN")
		exec1(t, late, "BEGIN")
		want := map[string]int{pin: 2, "a transaction is under way": 1}
		if mode == SessionMode {
			want = map[string]int{pin: 3}
		}
		until(t, "all is known of the sessions", func() bool { return cmp.Equal(g.Staying("a"), want) })
		g.AskToLeave("c", true)
		goesOn(t, "another site", idle)
		g.AskToLeave("a", true)
		e := wantCode(t, "idle", lastWords(t, idle), "57P01", "site a is drained")
		if !strings.Contains(e.Detail, pin) || e.Hint != "connect again" || e.Severity != "FATAL" {
			t.Errorf("%+v", e)
		}
		goesOn(t, "in a transaction", busy)
		exec1(t, busy, "CREATE TABLE IF NOT EXISTS left_at_last(v int)")
		// It is asked at the end of its transaction, of which it has the answer.
		exec1(t, busy, "COMMIT")
		wantCode(t, "busy", lastWords(t, busy), "57P01", "site a is drained")
		if pgtest.Query(t, c, "shop", "SELECT count(*) FROM left_at_last")[0][0] != "0" {
			t.Error("the transaction was not committed")
		}
		// And one that begins to keep its connection now.
		exec1(t, late, "LISTEN x")
		exec1(t, late, "COMMIT")
		wantCode(t, "late", lastWords(t, late), "57P01", pin)
		goesOn(t, "not concerned", free)
		until(t, "the sessions are gone", func() bool { return len(g.Staying("a")) == 0 })
		g.AskToLeave("a", false)
		back := open("there")
		exec1(t, back, "LISTEN x")
		for range 3 {
			goesOn(t, "the site is not drained any more", back)
		}
	}
}

// TestACopyIsNotEndedInItsMiddle: of a client with a connection of its own.
func TestACopyIsNotEndedInItsMiddle(t *testing.T) {
	c := site(t, "")
	g, addr := serve(t, Config{Mode: SessionMode}, c)
	conn := open1(t, dsn(addr, ""))
	exec1(t, conn, "CREATE TABLE t(v int)")
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := conn.PgConn().CopyFrom(t.Context(), r, "COPY t FROM STDIN")
		done <- err
	}()
	half := strings.Repeat("1\n", 50_000)
	if _, err := io.WriteString(w, half); err != nil {
		t.Fatal(err)
	}
	g.AskToLeave("a", true)
	if _, err := io.WriteString(w, half); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantCode(t, "after it", lastWords(t, conn), "57P01", "session mode")
	if n := pgtest.Query(t, c, "shop", "SELECT count(*) FROM t")[0][0]; n != "100000" {
		t.Errorf("%s rows", n)
	}
}

// byApplication routes sessions by what they call themselves.
type byApplication map[string]Target

func (r byApplication) Route(l *Login, _ Wish) (Target, error) {
	for _, p := range l.Params {
		if p.Name == "application_name" {
			return r[p.Value], nil
		}
	}
	return Target{}, errors.New("nobody")
}

// TestSessionsThatMayGoNowhereElseAreAskedToLeave: they keep no connection, but would come back to the drained site again and again.
func TestSessionsThatMayGoNowhereElseAreAskedToLeave(t *testing.T) {
	c := site(t, "")
	there, other := target(c, "a"), target(c, "b")
	g, addr := serve(t, Config{Mode: TransactionMode, Router: byApplication{"stuck": there, "new": there, "free": other}}, c)
	stuck, fresh, free := open1(t, dsn(addr, "application_name=stuck")), open1(t, dsn(addr, "application_name=new")), open1(t, dsn(addr, "application_name=free"))
	for _, conn := range []*pgx.Conn{stuck, free} {
		goesOn(t, "before", conn)
	}
	until(t, "it is known who stays", func() bool { return cmp.Equal(g.Staying("a"), map[string]int{keepsDiffers: 1}) })
	g.AskToLeave("a", true)
	wantCode(t, "stuck", lastWords(t, stuck), "57P01", keepsDiffers)
	goesOn(t, "elsewhere", free)
	exec1(t, fresh, "SELECT 1", pgx.QueryExecModeSimpleProtocol) // its first transaction
	wantCode(t, "after its first transaction", lastWords(t, fresh), "57P01", keepsDiffers)
	goesOn(t, "elsewhere", free)
}

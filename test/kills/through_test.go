package kills

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

func TestOnlyErrorsOfTheContractEndASession(t *testing.T) {
	told := func(severity, code string) error {
		return fmt.Errorf("x: %w", &pgconn.PgError{Severity: severity, Code: code})
	}
	for _, c := range []struct {
		name   string
		errs   []error
		faults int
		want   string
	}{
		{"nothing", nil, 1, ""},
		{"one transaction rolled back", []error{told("ERROR", "40001")}, 1, ""},
		{"two by one fault", []error{told("ERROR", "40001"), told("ERROR", "40001")}, 1, "had 2 transactions rolled back by 1 faults"},
		{"an error of PostgreSQL", []error{told("ERROR", "40P01")}, 1, ""},
		{"the contract, with two faults", []error{told("FATAL", "08007"), told("FATAL", "57P03")}, 2, ""},
		{"the contract, with one: no site", []error{told("FATAL", "57P03")}, 1, "lost its connection"},
		{"the contract, with one: unknown fate", []error{told("FATAL", "08007")}, 1, "lost its connection"},
		{"a FATAL of something else", []error{told("FATAL", "08006")}, 2, "lost its connection"},
		{"the connection breaks", []error{io.ErrUnexpectedEOF}, 2, "lost its connection"},
	} {
		cl := &client{gateway: true}
		for _, err := range c.errs {
			cl.notice("COMMIT", err)
		}
		got := strings.Join(unfit([]*client{cl}, c.faults), "\n")
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	direct := &client{}
	direct.notice("COMMIT", io.ErrUnexpectedEOF)
	if v := unfit([]*client{direct}, 1); len(v) > 0 {
		t.Errorf("a client that goes to its site's door is held to what gateways promise: %q", v)
	}
}

// TestASessionThatSeesLessIsNoticed: than it was told, or has seen of what was acknowledged.
func TestASessionThatSeesLessIsNoticed(t *testing.T) {
	for _, c := range []struct {
		name       string
		told, saw  int
		last       int
		wrong      string
		sawnWanted int
	}{
		{"what it was told", 5, 0, 5, "", 5},
		{"more: one without an answer that was committed", 5, 0, 6, "", 0},
		{"less than it was told", 5, 0, 4, "told of transaction 5", 0},
		{"less than it has seen", 0, 5, 4, "has seen transaction 5", 5},
		{"nothing yet", 0, 0, 0, "", 0},
	} {
		b := lookback{told: c.told, saw: c.saw}
		got := b.check(c.last, func(seq int) bool { return seq == 5 })
		if (got == "") != (c.wrong == "") || !strings.Contains(got, c.wrong) || b.saw != c.sawnWanted || b.n != 1 {
			t.Errorf("%s: %q, %+v", c.name, got, b)
		}
	}
}

func TestLongestWaitIsFromTheFirstAttemptToTheAnswer(t *testing.T) {
	t0 := time.Unix(1000, 0)
	at := func(client string, begun, ended int, o outcome) attempt {
		return attempt{client: client, begun: t0.Add(time.Duration(begun) * time.Millisecond), ended: t0.Add(time.Duration(ended) * time.Millisecond), outcome: o}
	}
	got := longestWaits([]attempt{
		at("a", -900, -1, acked), // before it
		at("a", -50, 200, refused), at("b", -10, 30, acked), at("a", 210, 250, acked), at("a", 260, 300, acked),
		at("b", 40, 45, acked), at("c", 10, 5000, unknown),
	}, t0)
	if want := []time.Duration{40 * time.Millisecond, 300 * time.Millisecond}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

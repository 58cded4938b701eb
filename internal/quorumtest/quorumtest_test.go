package quorumtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/duri-io/duri/quorum"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func renewed(t *testing.T, old quorum.Register, by string) quorum.Register {
	t.Helper()
	next, err := quorum.Renew(old, quorum.Note{By: by})
	if err != nil {
		t.Fatal(err)
	}
	return next
}

func TestClientsShareOneValue(t *testing.T) {
	r := New()
	a, b := r.Client(), r.Client()
	if _, err := a.Get(t.Context()); !errors.Is(err, quorum.ErrAbsent) {
		t.Errorf("got %v", err)
	}
	changes := b.Watch(t.Context())
	first := quorum.Initial([]string{"a", "b"}, "a", time.Time{})
	if _, err := a.Swap(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	if got := <-changes; !got.Equal(first) {
		t.Errorf("delivered %+v", got)
	}
	second := renewed(t, first, "b")
	if got, err := b.Swap(t.Context(), second); err != nil || !got.Equal(second) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := a.Swap(t.Context(), renewed(t, first, "a")); !errors.Is(err, quorum.ErrChanged) || !got.Equal(second) {
		t.Errorf("%+v, %v", got, err)
	}
	if got := <-changes; !got.Equal(second) {
		t.Errorf("delivered %+v", got)
	}
}

func TestFaults(t *testing.T) {
	r := New()
	a, b := r.Client(), r.Client()
	value := quorum.Initial([]string{"a", "b"}, "a", time.Time{})

	a.LoseAnswer()
	if _, err := a.Swap(t.Context(), value); !errors.Is(err, quorum.ErrUnknown) {
		t.Errorf("got %v", err)
	}
	if got, err := a.Get(t.Context()); err != nil || !got.Equal(value) {
		t.Errorf("the swap did not arrive: %+v, %v", got, err)
	}

	a.Hold()
	late := renewed(t, value, "a")
	if _, err := a.Swap(t.Context(), late); !errors.Is(err, quorum.ErrUnknown) {
		t.Errorf("got %v", err)
	}
	if got, err := a.Get(t.Context()); err != nil || !got.Equal(value) {
		t.Errorf("a held swap arrived: %+v, %v", got, err)
	}
	a.Release()
	if got, err := b.Get(t.Context()); err != nil || !got.Equal(late) {
		t.Errorf("a released swap did not arrive: %+v, %v", got, err)
	}

	b.Cut()
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := b.Get(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if _, err := b.Swap(short, renewed(t, late, "b")); !errors.Is(err, quorum.ErrUnknown) {
		t.Errorf("got %v", err)
	}
	time.AfterFunc(10*time.Millisecond, b.Heal)
	if got, err := b.Get(t.Context()); err != nil || !got.Equal(late) {
		t.Errorf("healed: %+v, %v", got, err)
	}
}

package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// verifiers asks the function that duri grants makes, over one connection. Whoever comes while a question is under way is in the next
// one together with all others who have come: a storm of logins costs few. Safe for concurrent use.
type verifiers struct {
	config *pgconn.Config

	mu      sync.Mutex // guards waiting and asking
	waiting []*wanted
	asking  bool // somebody asks for all who wait
	wg      sync.WaitGroup

	// Of who asks.
	conn     *pgconn.PgConn
	prepared bool
}

// wanted is a role whose verifier somebody waits for.
type wanted struct {
	role string
	text string // empty: there is none
	err  error
	done chan struct{}
}

const (
	// nameMax is PostgreSQL's, in bytes.
	nameMax = 63
	// verifierTimeoutMax bounds one question.
	verifierTimeoutMax = 5 * time.Second
	// verifiersSQL gives a row for each role of an array, in its order.
	verifiersSQL       = `SELECT duri.verifier(x.role::name) FROM pg_catalog.unnest($1::text[]) WITH ORDINALITY AS x(role, i) ORDER BY x.i`
	verifiersStatement = "duri_verifiers"
)

// read gives the text of a role's verifier; empty: there is none.
func (v *verifiers) read(ctx context.Context, role string) (string, error) {
	if len(role) > nameMax {
		return "", nil // PostgreSQL would cut it, and find somebody else.
	}
	w := &wanted{role: role, done: make(chan struct{})}
	v.mu.Lock()
	v.waiting = append(v.waiting, w)
	if !v.asking {
		v.asking = true
		v.wg.Go(v.answer)
	}
	v.mu.Unlock()
	select {
	case <-w.done:
	case <-ctx.Done():
		return "", fmt.Errorf("read SCRAM verifiers: %w", ctx.Err())
	}
	if told, ok := errors.AsType[*pgconn.PgError](w.err); ok && (told.Code == "42883" || told.Code == "42501") {
		return "", &hinted{"read SCRAM verifiers: " + told.Message, "run `duri grants --gateway` and its SQL as superuser once more"}
	}
	if w.err != nil {
		return "", fmt.Errorf("read SCRAM verifiers: %w", w.err)
	}
	return w.text, nil
}

// answer asks until nobody waits.
func (v *verifiers) answer() {
	for {
		v.mu.Lock()
		all := v.waiting
		v.waiting = nil
		if v.asking = len(all) > 0; !v.asking {
			v.mu.Unlock()
			return
		}
		v.mu.Unlock()
		v.askFor(all)
	}
}

// askFor answers all with one question. A name that PostgreSQL does not take, in its encoding, spoils nobody else's.
func (v *verifiers) askFor(all []*wanted) {
	ctx, cancel := context.WithTimeout(context.Background(), verifierTimeoutMax)
	defer cancel()
	err := v.ask(ctx, all)
	if _, told := errors.AsType[*pgconn.PgError](err); told && len(all) > 1 {
		for _, w := range all {
			v.askFor([]*wanted{w})
		}
		return
	}
	for _, w := range all {
		w.err = err
		close(w.done)
	}
}

// ask tries once more when the connection had broken since the last question.
func (v *verifiers) ask(ctx context.Context, all []*wanted) (err error) {
	for range 2 {
		fresh := v.conn == nil || v.conn.IsClosed()
		if fresh {
			if v.conn, err = pgconn.ConnectConfig(ctx, v.config); err != nil {
				return err
			}
			v.prepared = false
		}
		err = v.query(ctx, all)
		if err == nil || fresh || !v.conn.IsClosed() {
			return err
		}
	}
	return err
}

func (v *verifiers) query(ctx context.Context, all []*wanted) error {
	if !v.prepared {
		if _, err := v.conn.Prepare(ctx, verifiersStatement, verifiersSQL, nil); err != nil {
			return err
		}
		v.prepared = true
	}
	roles := make([]string, len(all))
	for i, w := range all {
		roles[i] = w.role
	}
	res := v.conn.ExecPrepared(ctx, verifiersStatement, [][]byte{[]byte(pg.TextArray(roles))}, nil, nil).Read()
	if res.Err == nil && len(res.Rows) != len(all) {
		return fmt.Errorf("%d rows for %d roles", len(res.Rows), len(all))
	}
	for i, row := range res.Rows {
		all[i].text = string(row[0])
	}
	return res.Err
}

// close ends the connection, when nobody asks any more.
func (v *verifiers) close() {
	v.wg.Wait()
	if v.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), verifierTimeoutMax)
		defer cancel()
		_ = v.conn.Close(ctx) // the server may have ended it already
	}
}

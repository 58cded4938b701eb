package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/pgwire"
)

// verifiers asks the function that duri grants makes. It keeps one connection, as a login asks for one row.
type verifiers struct {
	config *pgconn.Config

	mu   sync.Mutex // guards conn, and orders questions
	conn *pgconn.PgConn
}

// verifierTimeoutMax bounds one question.
const verifierTimeoutMax = 5 * time.Second

// read gives the text of a role's verifier; empty: there is none.
func (v *verifiers) read(ctx context.Context, user string) (string, error) {
	if len(user) > pgwire.NameMax {
		return "", nil // PostgreSQL would cut it, and find somebody else.
	}
	ctx, cancel := context.WithTimeout(ctx, verifierTimeoutMax)
	defer cancel()
	v.mu.Lock()
	defer v.mu.Unlock()
	rows, err := v.ask(ctx, user)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && (pgErr.Code == "42883" || pgErr.Code == "42501") {
		return "", &hinted{"read SCRAM verifiers: " + pgErr.Message, "run `duri grants --gateway` and its SQL as superuser once more"}
	}
	if err != nil {
		return "", fmt.Errorf("read SCRAM verifiers: %w", err)
	}
	if len(rows) == 0 || len(rows[0]) == 0 {
		return "", nil
	}
	return rows[0][0], nil
}

// ask tries once more when the connection had broken since the last question.
func (v *verifiers) ask(ctx context.Context, user string) (rows [][]string, err error) {
	for range 2 {
		fresh := v.conn == nil || v.conn.IsClosed()
		if fresh {
			if v.conn, err = pgconn.ConnectConfig(ctx, v.config); err != nil {
				return nil, err
			}
		}
		rows, err = pg.Query(ctx, v.conn, "SELECT duri.verifier($1)", user)
		if err == nil || fresh || !v.conn.IsClosed() {
			return rows, err
		}
	}
	return nil, err
}

func (v *verifiers) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), verifierTimeoutMax)
		defer cancel()
		_ = v.conn.Close(ctx) // the server may have ended it already
	}
}

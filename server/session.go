package server

import (
	"context"
	"sync"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
)

// session is one connection to the local server, lent to one user at a time. It is opened when needed and dropped after
// an error of the connection.
type session struct {
	dsn, database string
	settings      map[string]string

	mu   sync.Mutex // held while it is lent; guards conn
	conn *pgconn.PgConn
}

// do lends the connection to f.
func (s *session) do(ctx context.Context, f func(*pgconn.PgConn) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil || s.conn.IsClosed() {
		conn, err := pg.Connect(ctx, s.dsn, s.database, s.settings)
		if err != nil {
			return err
		}
		s.conn = conn
	}
	err := f(s.conn)
	if err != nil && pg.IsConnectionError(err) {
		pg.Close(s.conn)
		s.conn = nil
	}
	return err
}

// close ends the connection; the next do opens another.
func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	pg.Close(s.conn)
	s.conn = nil
}

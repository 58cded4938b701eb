package apply

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// Keys finds the key columns of local tables, reading the catalog once per definition. Safe for concurrent use.
type Keys struct {
	dsn, database string
	policies      atomic.Pointer[policy.Set]

	mu    sync.Mutex // guards the rest
	conn  *pgconn.PgConn
	known map[wal.RelationID][]namedKey
}

// NewKeys returns a Keys that connects when it is first asked. The caller closes it.
func NewKeys(dsn, database string) *Keys {
	return &Keys{dsn: dsn, database: database, known: map[wal.RelationID][]namedKey{}}
}

// SetPolicies tells what is declared for the tables.
func (k *Keys) SetPolicies(s policy.Set) { k.policies.Store(&s) }

// columnMode reports whether changes of different columns of a table's rows both stand.
func (k *Keys) columnMode(rel *wal.Relation) bool {
	s := k.policies.Load()
	return s != nil && s.Of(rel.Namespace, rel.Name).Mode == policy.ModeColumn
}

// Close ends the connection.
func (k *Keys) Close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	pg.Close(k.conn)
	k.conn = nil
}

// of returns a relation's key columns, none for a table without a key or one that is gone.
func (k *Keys) of(rel *wal.Relation) ([]namedKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if names, ok := k.known[rel.ID]; ok {
		return names, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if k.conn == nil || k.conn.IsClosed() {
		conn, err := pg.Connect(ctx, k.dsn, k.database, map[string]string{"application_name": "duri_keys"})
		if err != nil {
			return nil, err
		}
		k.conn = conn
	}
	t, err := loadTable(ctx, k.conn, rel.Namespace, rel.Name)
	var gone *TableError
	if err != nil && !errors.As(err, &gone) {
		return nil, err
	}
	var names []namedKey
	for _, i := range t.keyOrNil() {
		names = append(names, namedKey{t.columns[i].name, t.columns[i].norm})
	}
	k.known[rel.ID] = names
	return names, nil
}

func (t *table) keyOrNil() []int {
	if t == nil {
		return nil
	}
	return t.key
}

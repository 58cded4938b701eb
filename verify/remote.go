package verify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/duri-io/duri/wal"
)

// request is what a Remote sends. Fields that Op does not need are empty.
type request struct {
	Op    string     `json:"op"` // tables, bounds, hash, rows; mark, reach; parked; versions, mend; hold, release
	Table *Table     `json:"table,omitempty"`
	Range *Range     `json:"range,omitempty"`
	N     int        `json:"n,omitempty"` // rows of Bounds, limit of Hash and Rows
	Marks []wal.Seen `json:"marks,omitempty"`
	Fixes []Fix      `json:"fixes,omitempty"`
	Hold  string     `json:"hold,omitempty"` // what to release
}

// reply answers a request.
type reply struct {
	Tables []Table     `json:"tables,omitempty"`
	Bounds []Key       `json:"bounds,omitempty"`
	Sum    *Sum        `json:"sum,omitempty"`
	Rows   []Row       `json:"rows,omitempty"`
	Error  *replyError `json:"error,omitempty"`

	Marks    []wal.Seen     `json:"marks,omitempty"`
	Versions []VersionedRow `json:"versions,omitempty"`
	Outcomes []Outcome      `json:"outcomes,omitempty"`
	Hold     string         `json:"hold,omitempty"` // by what it is released
	Parked   int            `json:"parked,omitempty"`
}

// replyError carries an error with its hint. Table is set for a *TableError.
type replyError struct {
	Side   string `json:"side,omitempty"`
	Table  string `json:"table,omitempty"`
	Reason string `json:"reason"`
	Hint   string `json:"hint,omitempty"`
}

// requestRowsMax bounds what a peer may ask for in one call.
const requestRowsMax = 1 << 20

// Serve answers a request of a Remote, encoded as JSON, from a Side, which is the DB of this site. Errors of the Side
// travel inside the reply; the error returned says that there is no reply, as ctx has ended.
func Serve(ctx context.Context, s Side, req []byte) ([]byte, error) {
	rep, err := serve(ctx, s, req)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		rep = reply{Error: toReply(err)}
	}
	return json.Marshal(rep)
}

func toReply(err error) *replyError {
	if te, ok := errors.AsType[*TableError](err); ok {
		return &replyError{te.Side, te.Table, te.Reason, te.Hint}
	}
	return &replyError{Reason: err.Error(), Hint: hintOf(err)}
}

func serve(ctx context.Context, s Side, b []byte) (rep reply, err error) {
	var req request
	if err := json.Unmarshal(b, &req); err != nil {
		return rep, fmt.Errorf("read comparison request: %w", err)
	}
	switch req.Op {
	case "tables":
		rep.Tables, err = s.Tables(ctx)
		return rep, err
	case "bounds", "hash", "rows":
	default:
		return serveMore(ctx, s, req)
	}
	if req.Table == nil || req.Range == nil || req.N < 1 || req.N > requestRowsMax {
		return rep, fmt.Errorf("read comparison request: %q lacks table, range or a number in bounds", req.Op)
	}
	switch req.Op {
	case "bounds":
		rep.Bounds, err = s.Bounds(ctx, *req.Table, *req.Range, req.N)
	case "hash":
		var sum Sum
		sum, err = s.Hash(ctx, *req.Table, *req.Range, req.N)
		rep.Sum = &sum
	case "rows":
		rep.Rows, err = s.Rows(ctx, *req.Table, *req.Range, req.N)
	}
	return rep, err
}

// Remote is a Side at another site, asked through its agent.
type Remote struct {
	name string
	call func(context.Context, []byte) ([]byte, error)
}

var (
	_ Mender  = (*Remote)(nil)
	_ Settler = (*Remote)(nil)
)

// NewRemote gives the Side of the site name. call carries a request to that site, where Serve answers it; it may be
// called from several goroutines.
func NewRemote(name string, call func(context.Context, []byte) ([]byte, error)) *Remote {
	return &Remote{name, call}
}

// Name is the site's name.
func (r *Remote) Name() string { return r.name }

// do exchanges a request for its reply.
func (r *Remote) do(ctx context.Context, req request) (reply, error) {
	var rep reply
	b, err := json.Marshal(req)
	if err != nil {
		return rep, fmt.Errorf("write comparison request: %w", err)
	}
	answer, err := r.call(ctx, b)
	if err != nil {
		return rep, fmt.Errorf("ask %s to compare: %w", r.name, err)
	}
	if err := json.Unmarshal(answer, &rep); err != nil {
		return rep, fmt.Errorf("read comparison reply of %s: %w", r.name, err)
	}
	if e := rep.Error; e != nil {
		if e.Table != "" {
			return rep, &TableError{e.Side, e.Table, e.Reason, e.Hint}
		}
		return rep, withHint(fmt.Errorf("%s answered: %s", r.name, e.Reason), e.Hint)
	}
	return rep, nil
}

// Tables is Side.Tables.
func (r *Remote) Tables(ctx context.Context) ([]Table, error) {
	rep, err := r.do(ctx, request{Op: "tables"})
	return rep.Tables, err
}

// Bounds is Side.Bounds.
func (r *Remote) Bounds(ctx context.Context, t Table, rg Range, rows int) ([]Key, error) {
	rep, err := r.do(ctx, request{Op: "bounds", Table: &t, Range: &rg, N: rows})
	return rep.Bounds, err
}

// Hash is Side.Hash.
func (r *Remote) Hash(ctx context.Context, t Table, rg Range, limit int) (Sum, error) {
	rep, err := r.do(ctx, request{Op: "hash", Table: &t, Range: &rg, N: limit})
	if err == nil && rep.Sum == nil {
		err = fmt.Errorf("reply of %s holds no digest", r.name)
	}
	if err != nil {
		return Sum{}, err
	}
	return *rep.Sum, nil
}

// Rows is Side.Rows.
func (r *Remote) Rows(ctx context.Context, t Table, rg Range, limit int) ([]Row, error) {
	rep, err := r.do(ctx, request{Op: "rows", Table: &t, Range: &rg, N: limit})
	return rep.Rows, err
}

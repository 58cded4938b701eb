package cut

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// app is what an application does with a driver, as a script: transactions that it tries again when they fail by 40001, as
// applications do.
type app struct {
	mode  pgx.QueryExecMode
	units []unit
}

// unit is one of its transactions.
type unit struct {
	seqs []int // of the ledger, that it writes
	do   func(ctx context.Context, c *pgx.Conn, number string) error
	may  bool // fail by 40001
	ends bool // may be in doubt, and end the session by 08007
}

// apps is the part of the corpus that uses pgx.
func apps() []*script {
	const ins = "INSERT INTO ledger VALUES ($1::bigint, $2::int)"
	exec := func(seq int) unit {
		return unit{seqs: []int{seq}, do: func(ctx context.Context, c *pgx.Conn, number string) error {
			_, err := c.Exec(ctx, ins, number, seq)
			return err
		}}
	}
	returning := unit{seqs: []int{2, 3}, do: func(ctx context.Context, c *pgx.Conn, number string) error {
		rows, err := c.Query(ctx, "INSERT INTO ledger VALUES ($1::bigint, 2), ($1::bigint, 3) RETURNING seq", number)
		if err != nil {
			return err
		}
		got, err := pgx.CollectRows(rows, pgx.RowTo[int])
		if err == nil && !slices.Equal(got, []int{2, 3}) {
			err = fmt.Errorf("RETURNING gave %v", got)
		}
		return err
	}}
	block := unit{seqs: []int{4, 5}, may: true, do: func(ctx context.Context, c *pgx.Conn, number string) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, ins, number, 4); err != nil {
				return err
			}
			var amount int
			if err := tx.QueryRow(ctx, "SELECT amount FROM account WHERE client = $1::bigint FOR UPDATE", number).Scan(&amount); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, ins, number, 5)
			return err
		})
	}}
	errUndo := errors.New("this part is taken back")
	nested := unit{seqs: []int{6, 8}, may: true, do: func(ctx context.Context, c *pgx.Conn, number string) error {
		return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, ins, number, 6); err != nil {
				return err
			}
			err := pgx.BeginFunc(ctx, tx, func(inner pgx.Tx) error {
				if _, err := inner.Exec(ctx, ins, number, 7); err != nil {
					return err
				}
				return errUndo
			})
			if !errors.Is(err, errUndo) {
				return err
			}
			_, err = tx.Exec(ctx, ins, number, 8)
			return err
		})
	}}
	batch := unit{seqs: []int{10, 11, 12, 13, 14}, do: func(ctx context.Context, c *pgx.Conn, number string) error {
		b := &pgx.Batch{}
		for i := range 5 {
			b.Queue(ins, number, 10+i)
		}
		return c.SendBatch(ctx, b).Close()
	}}
	copies := unit{seqs: []int{20, 21}, may: true, ends: true, do: func(ctx context.Context, c *pgx.Conn, number string) error {
		var n int64
		if _, err := fmt.Sscan(number, &n); err != nil {
			return err
		}
		_, err := c.CopyFrom(ctx, pgx.Identifier{"ledger"}, []string{"client", "seq"}, pgx.CopyFromRows([][]any{{n, 20}, {n, 21}}))
		return err
	}}
	reads := unit{do: func(ctx context.Context, c *pgx.Conn, number string) error {
		var amount int
		return c.QueryRow(ctx, "SELECT amount FROM account WHERE client = $1::bigint", number).Scan(&amount)
	}}
	return []*script{
		{name: "pgx-cache", app: &app{pgx.QueryExecModeCacheStatement, []unit{exec(1), reads, returning, exec(9), reads}}},
		{name: "pgx-describe", app: &app{pgx.QueryExecModeCacheDescribe, []unit{exec(1), reads, returning, exec(9)}}},
		{name: "pgx-exec", app: &app{pgx.QueryExecModeExec, []unit{exec(1), reads, returning}}},
		{name: "pgx-simple", app: &app{pgx.QueryExecModeSimpleProtocol, []unit{exec(1), reads, returning, block}}},
		{name: "pgx-block", app: &app{pgx.QueryExecModeCacheStatement, []unit{block, nested, reads}}},
		{name: "pgx-batch", app: &app{pgx.QueryExecModeCacheStatement, []unit{batch, exec(1)}}},
		{name: "pgx-copy", app: &app{pgx.QueryExecModeCacheStatement, []unit{copies, exec(1)}}},
	}
}

// deed is what became of a unit.
type deed struct {
	tries int
	err   error
	ended bool // its connection
}

// triesMax is how often an application tries a transaction; one case has one cut.
const triesMax = 3

// use runs the app's units, as far as the connection lives.
func (a *app) use(ctx context.Context, addr, name, number string) (deeds []deed, err error) {
	config, err := pgx.ParseConfig(fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable&application_name=%s", appUser, addr, database, name))
	if err != nil {
		return nil, err
	}
	config.Password, config.DefaultQueryExecMode = appPassword, a.mode
	c, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close(ctx) }()
	if _, err := c.Exec(ctx, "SELECT set_config('app.user_id', $1, false)", number); err != nil {
		return []deed{{tries: 1, err: err, ended: c.IsClosed()}}, nil
	}
	units := append(slices.Clone(a.units), unit{do: func(ctx context.Context, c *pgx.Conn, _ string) error {
		var secret string
		if err := c.QueryRow(ctx, "SELECT v FROM secret").Scan(&secret); err != nil {
			return err
		}
		if secret != "mine" {
			return fmt.Errorf("row security shows %q", secret)
		}
		return nil
	}})
	deeds = append(deeds, deed{tries: 1}) // the setting
	for _, u := range units {
		d := deed{}
		for d.tries < triesMax {
			d.tries++
			d.err = u.do(ctx, c, number)
			// A driver may not tell that ROLLBACK TO has failed; then the next statement does.
			if code := codeOf(d.err); code != failed && code != inFailed {
				break
			}
		}
		d.ended = c.IsClosed()
		deeds = append(deeds, d)
		if d.err != nil {
			break
		}
	}
	return deeds, nil
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code
	}
	return ""
}

// judgeApp looks at what became of an app's units. It is pure.
func judgeApp(c contract, s *script, deeds []deed, ledger []int) verdict {
	v := verdict{outcome: uncut}
	units := slices.Concat([]unit{{}}, s.app.units, []unit{{}})
	var must, may []int
	for i, d := range deeds {
		u := units[i]
		if d.err == nil {
			must = append(must, u.seqs...)
			if d.tries > 1 {
				v.outcome = failed
				if !c.sites || !u.may {
					v.violate("unit %d: 40001, which may not be", i)
				}
			}
			continue
		}
		code := codeOf(d.err)
		v.outcome = code
		switch {
		case !d.ended:
			v.violate("unit %d: an error in a session that lives on: %v", i, d.err)
		case code == "" && c.sites:
			v.violate("unit %d: the connection ended without a word: %v", i, d.err)
		case code == "":
			v.outcome = pinned
		case c.sites && code == unknown && u.ends, c.sites && strings.Contains(d.err.Error(), "was committed"):
		case c.sites || code != pinned:
			v.violate("unit %d: the session ends by %s, which may not be: %v", i, code, d.err)
		}
		may = u.seqs
	}
	if len(deeds) < len(units) && v.outcome == uncut {
		v.violate("only %d units of %d were done", len(deeds), len(units))
	}
	slices.Sort(must)
	all := slices.Sorted(slices.Values(slices.Concat(must, may)))
	if !slices.Equal(ledger, must) && !slices.Equal(ledger, all) {
		v.violate("the ledger has %v, want %v or %v", ledger, must, all)
	}
	return v
}

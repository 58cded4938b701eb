package clients

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Case is one thing that `make prove CASE=clients` runs. It says what it has found, or what is wrong.
type Case struct {
	Name string
	Run  func(ctx context.Context) (string, error)
}

// Cases are all of them.
func Cases(testdata string) (all []Case) {
	for _, p := range append(append([]Program{}, Short...), Long...) {
		all = append(all, Case{"program " + p.Name, func(ctx context.Context) (string, error) {
			dirs := Dirs{Testdata: testdata}
			var err error
			if dirs.Node, err = InstallNode(ctx, testdata); err != nil {
				return "", err
			}
			var res Result
			err = with(ctx, false, func(s *Sites) (err error) {
				res, err = s.Run(ctx, p, dirs)
				return err
			})
			return fmt.Sprintf("direct %.1f s, through the gateway %.1f s, %d + %d transactions", res.Took[0].Seconds(), res.Took[1].Seconds(), res.Routed["a"], res.Routed["b"]), err
		}})
	}
	for _, su := range Suites {
		all = append(all, Case{"suite " + su.Name, func(ctx context.Context) (string, error) {
			var res SuiteResult
			err := with(ctx, false, func(s *Sites) (err error) {
				res, err = s.RunSuite(ctx, su)
				return err
			})
			if err == nil && len(res.Problems) > 0 {
				err = errors.New(strings.Join(res.Problems, "\n"))
			}
			return fmt.Sprintf("%d tests pass directly, %d of them through the gateway, %d are excluded", res.Direct, res.Through, res.Excluded), err
		}})
	}
	all = append(all,
		Case{"copy of 1 GB", func(ctx context.Context) (string, error) { return Copy(ctx, 1000, Dirs{Testdata: testdata}) }},
		Case{"two servers", TwoServers},
		Case{"5000 idle clients", func(ctx context.Context) (string, error) { return Idle(ctx, 5000, false) }},
		Case{"PgBouncer beside it", func(ctx context.Context) (string, error) {
			dirs := Dirs{Testdata: testdata}
			var err error
			if dirs.Node, err = InstallNode(ctx, testdata); err != nil {
				return "", err
			}
			return Bouncer(ctx, dirs)
		}},
		Case{"check_postgres", Monitor},
		Case{"5000 idle clients, TLS", func(ctx context.Context) (string, error) { return Idle(ctx, 5000, true) }},
	)
	return all
}

// with runs f between the start and the end of sites.
func with(ctx context.Context, two bool, f func(s *Sites) error) (err error) {
	s, err := Start(ctx, two, 0, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	return f(s)
}

// TwoServers runs pgbench while every transaction goes to the other one of two servers that know nothing of each other. Each must
// have had about half of them, and be consistent in itself.
func TwoServers(ctx context.Context) (said string, err error) {
	err = with(ctx, true, func(s *Sites) error {
		if err := s.Database(ctx, "two"); err != nil {
			return err
		}
		load := Program{Name: "pgbench", Command: `pgbench -i -q -s 1 >"$TMP/log" 2>&1 || { cat "$TMP/log"; exit 1; }`}
		for _, c := range s.Servers {
			if out, err := s.run(ctx, load, way{"direct", "127.0.0.1", strconv.Itoa(c.Port())}, "two", Dirs{}); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		bench := Program{Name: "pgbench", Command: `for m in simple extended prepared; do pgbench -n -M $m -c 6 -j 2 -t 200 2>&1 | grep -E 'failed|actually'; done`}
		out, err := s.run(ctx, bench, s.ways()[1], "two", Dirs{})
		if err != nil || strings.Count(out, "1200/1200") != 3 || strings.Count(out, "failed transactions: 0 ") != 3 {
			return fmt.Errorf("pgbench: %w: %s", err, out)
		}
		total := 0
		for _, c := range s.Servers {
			rows, err := c.QueryText(ctx, "two", `SELECT count(*), sum(delta) = (SELECT sum(abalance) FROM pgbench_accounts) AND sum(delta) = (SELECT sum(bbalance) FROM pgbench_branches)
				AND sum(delta) = (SELECT sum(tbalance) FROM pgbench_tellers) FROM pgbench_history`)
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(rows[0][0])
			if err != nil {
				return err
			}
			total += n
			if n < 1200 || rows[0][1] != "t" {
				return fmt.Errorf("a server has %d transactions, and its sums are equal: %s", n, rows[0][1])
			}
		}
		if total != 3600 {
			return fmt.Errorf("the servers have %d transactions together, of 3600", total)
		}
		said = "pgbench in three protocols, 3600 transactions, all of them at one server or the other"
		return nil
	})
	return said, err
}

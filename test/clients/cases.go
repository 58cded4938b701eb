package clients

import (
	"context"
	"errors"
	"fmt"
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

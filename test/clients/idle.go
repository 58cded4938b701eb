package clients

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// What an idle client may cost the gateway, in bytes of its process.
const (
	idleMost    = 20 << 10
	idleTLSMost = 60 << 10
)

// Idle opens n clients that do nothing, tells what each costs the gateway's process, and uses some of them.
func Idle(ctx context.Context, n int, withTLS bool) (said string, err error) {
	if err := descriptors(n + 200); err != nil {
		return "", err
	}
	s, err := Start(ctx, false, n+100, withTLS)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.Database(ctx, "idle"); err != nil {
		return "", err
	}
	host, port, err := net.SplitHostPort(s.Gateway.Address)
	if err != nil {
		return "", err
	}
	mode := "disable"
	if withTLS {
		mode = "require"
	}
	cfg, err := pgconn.ParseConfig(fmt.Sprintf("host=%s port=%s dbname=idle user=%s password=%s sslmode=%s", host, port, appRole, quoted(password), mode))
	if err != nil {
		return "", err
	}
	if withTLS {
		cfg.TLSConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // the gateway's certificate was made for the purpose
	}
	conns := make([]*pgconn.PgConn, n)
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close(context.WithoutCancel(ctx)) // the gateway's end tells if something is left
			}
		}
	}()
	open := func(from, to int) error {
		var wg sync.WaitGroup
		errs := make([]error, 16)
		for w := range errs {
			wg.Go(func() {
				for i := from + w; i < to && errs[w] == nil; i += len(errs) {
					conns[i], errs[w] = pgconn.ConnectConfig(ctx, cfg)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
	const warm = 100 // what the first ones need is no client's
	if err := open(0, warm); err != nil {
		return "", err
	}
	before, err := s.Gateway.Stats()
	if err != nil {
		return "", err
	}
	begin := time.Now()
	if err := open(warm, n); err != nil {
		return "", err
	}
	took := time.Since(begin)
	after, err := s.Gateway.Stats()
	if err != nil {
		return "", err
	}
	each := (after.RSS - before.RSS) / int64(n-warm)
	for _, i := range []int{0, n / 2, n - 1} {
		if res := conns[i].ExecParams(ctx, "SELECT $1", [][]byte{[]byte("works")}, nil, nil, nil).Read(); res.Err != nil || string(res.Rows[0][0]) != "works" {
			return "", fmt.Errorf("client %d of %d does not work: %w", i, n, res.Err)
		}
	}
	said = fmt.Sprintf("%d clients, opened at %.0f a second, cost %d bytes of the gateway's memory each, %.2f goroutines; the process has %d MB", n,
		float64(n-warm)/took.Seconds(), each, float64(after.Goroutines-before.Goroutines)/float64(n-warm), after.RSS>>20)
	most := int64(idleMost)
	if withTLS {
		most = idleTLSMost
	}
	if each > most {
		err = fmt.Errorf("%s, where %d are the most", said, most)
	}
	return said, err
}

// descriptors sees to it that this process, and those that it starts, may open n files.
func descriptors(n int) error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	need := uint64(n)
	if l.Cur >= need {
		return nil
	}
	want := syscall.Rlimit{Cur: need, Max: max(l.Max, need)} // more than Max takes the rights of root
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &want); err != nil {
		return fmt.Errorf("%d open files are needed and %d are allowed; hint: ulimit -n %d", n, l.Max, n)
	}
	return nil
}

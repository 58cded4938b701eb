package cut

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"strconv"
	"time"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/pgwire"
)

// Logins are cut as well: that of a client at the gateway, with and without TLS, and those of the gateway at the server, for a new
// session and in the midst of one.

// inLogins are the scripts with which it is done: their statements are cut elsewhere.
var inLogins = []string{"read-simple", "write-simple", "block-simple", "settings"}

// The limits of a worker's gateway. A login that is stalled is given up after loginMax, so that no client waits for longer than that and
// holdMax together.
const (
	loginMax = 1500 * time.Millisecond
	holdMax  = 5 * time.Second
	poolMax  = 3
	// lateMax is what a busy machine may add.
	lateMax = 3 * time.Second
)

// noSite is the code of an error that says that no server may be used now.
const noSite = "57P03"

// logins adds the cuts of logins to the cases of a script.
func (r *run) logins(ctx context.Context, b *bench, c Case) (cases []Case, err error) {
	if !slices.Contains(inLogins, c.Script) || r.o.Double || !r.o.Sites {
		return nil, nil
	}
	for _, place := range []Place{LoginAtServer, LoginAtClient, LoginByTLS} {
		if place.front() && c.Routing == Alternate {
			continue
		}
		c.Place = place
		number, err := b.begin(ctx, c)
		if err != nil {
			return nil, err
		}
		cl, err := b.enter(ctx, c)
		if err != nil {
			return nil, err
		}
		numbers := b.front.wire.ofLogins() // of TLS it is not known when the client is in, but here
		err = cl.run(&transcript{}, r.scripts[c.Script].all(), number)
		cl.close()
		if err != nil {
			return nil, err
		}
		if !place.front() {
			numbers = b.wire.ofLogins()
		}
		b.release()
		if left, err := b.sessions(ctx); err != nil || left != nil {
			return nil, errors.Join(err, fmt.Errorf("uncut: %s", left))
		}
		for dir, ks := range numbers {
			for _, k := range ks {
				for _, kind := range loginKinds {
					if !place.front() || kind != SiteReset && kind != SiteResetEnd {
						cases = append(cases, Case{c.Script, c.Routing, place, Direction(dir), k, kind})
					}
				}
			}
		}
	}
	return cases, nil
}

// enter is the login of a case's client.
func (b *bench) enter(ctx context.Context, c Case) (*client, error) {
	addr := b.addr
	if c.Place.front() {
		addr = b.front.addr()
	}
	if c.Place != LoginByTLS {
		return connect(ctx, addr, b.p.keys, b.name)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline)
	secured, err := secure(ctx, conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return begin(ctx, secured, b.p.keys, b.name)
}

// secure asks for TLS. Who answers does not matter: it is a relay's other end.
func secure(ctx context.Context, conn net.Conn) (net.Conn, error) {
	if _, err := conn.Write(pgwire.AppendSSLRequest(nil)); err != nil {
		return nil, err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, err
	}
	if answer[0] != 'S' {
		return nil, fmt.Errorf("asked for TLS: %q", answer)
	}
	t := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"postgresql"}}) //nolint:gosec // see above
	return t, t.HandshakeContext(ctx)
}

// selfSigned is a certificate for gateways.
func selfSigned() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gateway"}, NotAfter: time.Now().Add(24 * time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, about, about, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}, nil
}

// oneLogin runs a case in which a login is cut, and judges it: either the client is in, and its session is like one that was not cut, or
// it got one error of the contract and then the end; in time; and nothing is left behind.
func (r *run) oneLogin(ctx context.Context, b *bench, c Case) error {
	s := r.scripts[c.Script]
	base, err := r.oracle.expect(ctx, b, s, variant{})
	if err != nil {
		return err
	}
	number, err := b.begin(ctx, c)
	if err != nil {
		return err
	}
	most := loginMax + holdMax + lateMax
	if c.Place.front() && c.Kind == Stall {
		most = loginMax + time.Second // It is its own connection: the client gives up when the gateway has.
	}
	clientCtx, done := context.WithTimeout(ctx, most)
	defer done()
	o, v := seen{transcript: &transcript{}}, verdict{}
	begun := time.Now()
	cl, refused := b.enter(clientCtx, c)
	took := time.Since(begun)
	if refused == nil {
		if err := cl.run(o.transcript, s.all(), number); err != nil {
			return err
		}
		took = time.Since(begun)
		cl.close()
	}
	struck, pids := b.wire.hit()
	if c.Place.front() {
		struck, _ = b.front.wire.hit()
	}
	var left []string
	if !c.Place.front() || c.Dir == ToServer { // before the relay lets go: the gateway must have seen to it, but for a client that is in
		if left, err = b.sessions(ctx); err != nil {
			return err
		}
	}
	b.release()
	more, err := b.sessions(ctx)
	if err != nil {
		return err
	}
	v.wrong = append(append(v.wrong, left...), more...)
	if o.ledger, err = b.ledger(ctx, number); err != nil {
		return err
	}
	switch {
	case refused != nil:
		v.refused(c, refused, o.ledger)
	case c.Place.front() && struck:
		v.outcome = gone // before the gateway knew, or after the client did
		v.wrong = append(v.wrong, judgeGone(s, base, o).wrong...)
	default:
		best, err := r.judge(ctx, b, Case{Script: c.Script, Routing: c.Routing, Place: AtServer}, base, o)
		if err != nil {
			return err
		}
		v.outcome, v.wrong = best.outcome, append(v.wrong, best.wrong...)
	}
	if took >= most && !c.Place.front() {
		v.violate("it took %v, which is too long", took)
	}
	wrong, err := b.unharmed(ctx, pids)
	if err != nil {
		return err
	}
	if v.wrong = append(v.wrong, wrong...); len(v.wrong) > 0 {
		v.outcome, b.spoilt = other, true
	}
	trace := append(b.wire.history(), b.front.wire.history()...)
	slices.SortStableFunc(trace, func(a, b event) int { return a.at.Compare(b.at) })
	r.record(c, struck, v, number, trace)
	return nil
}

// refused judges the error of a login. It is pure.
func (v *verdict) refused(c Case, err error, ledger []int) {
	e, told := errors.AsType[*pgwire.Error](err)
	switch {
	case len(ledger) > 0:
		v.violate("a client that did not come in has left %v in the ledger", ledger)
	case told && e.Code != noSite && e.Code != pinned:
		v.violate("the login fails by %s: %v", e.Code, err)
	case told && e.Severity != "FATAL":
		v.violate("the login fails, and the error is no FATAL: %v", err)
	case told:
		v.outcome = e.Code
		return
	case !c.Place.front():
		v.violate("the login fails without a word: %v", err)
	}
	v.outcome = gone
}

// unharmed looks whether the gateway is as before: all places of its pools can be had, and when they are given back and it is told to
// close them, the server has nothing of it any more.
func (b *bench) unharmed(ctx context.Context, pids []uint32) (wrong []string, err error) {
	ctx, done := context.WithTimeout(ctx, holdMax-time.Second)
	defer done()
	var all []*client
	defer func() {
		for _, cl := range all {
			cl.close()
		}
	}()
	for i := range 2 * poolMax { // so many at each site
		b.router.next(Sticky)
		b.router.sites[i%2].refuse.Store(true) // then the other one takes it
		cl, err := connect(ctx, b.addr, b.p.keys, b.name)
		if err == nil {
			all = append(all, cl)
			t := &transcript{}
			if err = cl.run(t, queries("BEGIN", "SELECT 1"), "0"); err == nil && (!t.alive() || t.complete() != 2) {
				err = errors.New(t.last())
			}
		}
		if err != nil {
			return []string{fmt.Sprintf("afterwards, client %d of %d that shall be in a transaction at once: %v", i+1, 2*poolMax, err)}, nil
		}
	}
	b.router.next(Sticky)
	for _, cl := range all {
		cl.close()
	}
	if left, err := b.sessions(ctx); err != nil || left != nil {
		return left, err
	}
	deadline := time.Now().Add(leftMax)
	for {
		b.gateway.Retire("a")
		b.gateway.Retire("b")
		rows, err := pg.Query(ctx, b.admin, "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", b.name)
		if err != nil {
			return nil, err
		}
		if rows[0][0] == "0" {
			break
		}
		if time.Now().After(deadline) {
			n, _ := strconv.Atoi(rows[0][0])
			return []string{fmt.Sprintf("%d connections are left at the server; cut off were %v", n, pids)}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil, nil
}

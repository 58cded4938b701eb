package clients

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/pgwire/scram"
)

// envGateway tells a program of this package that it is to be a gateway; its value is a gatewayOptions.
const envGateway = "DURI_CLIENTS_GATEWAY"

// gatewayOptions is what the process of a gateway is told.
type gatewayOptions struct {
	Servers []string // network addresses, each a site of its own
	Admin   string   // connection string by which verifiers are read
	TLS     bool     // for clients, with a certificate made for the purpose
	Clients int      // how many there may be; 0: as the gateway's default
}

// Stats is what the process of a gateway tells of itself.
type Stats struct {
	Routed     map[string]map[string]int // transactions, and logins, by database and site
	Pins       map[string]int
	Goroutines int
	RSS        int64 // bytes, after a garbage collection
	Peak       int64 // the highest RSS since the process began or was last asked, bytes
}

// Gateway is a gateway in a process of its own, so that its memory can be told from that of those who ask.
type Gateway struct {
	Address string

	cmd *exec.Cmd
	mu  sync.Mutex // guards the rest
	in  io.WriteCloser
	out *bufio.Reader
}

// ServeIfAsked never returns in a process that StartGateway has started. Every program that uses StartGateway calls it first.
func ServeIfAsked() {
	text, asked := os.LookupEnv(envGateway)
	if !asked {
		return
	}
	if err := serve(text); err != nil {
		fmt.Fprintln(os.Stderr, "gateway:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startGateway starts this program anew as a gateway. It ends with this process, or by Close.
func startGateway(o gatewayOptions) (*Gateway, error) {
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	g := &Gateway{cmd: exec.Command(self)}
	g.cmd.Env = append(os.Environ(), envGateway+"="+string(text))
	g.cmd.Stderr = os.Stderr
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	g.out = bufio.NewReader(out)
	line, err := g.out.ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the gateway did not start: %w", err), g.Close())
	}
	g.Address = strings.TrimSpace(line)
	return g, nil
}

// Stats asks the process.
func (g *Gateway) Stats() (s Stats, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, err := io.WriteString(g.in, "stats\n"); err != nil {
		return s, err
	}
	line, err := g.out.ReadString('\n')
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(line), &s)
}

// Close ends the process and waits for its end; an error tells that it did not end in order.
func (g *Gateway) Close() error {
	_ = g.in.Close() // it may have ended by itself
	kill := time.AfterFunc(30*time.Second, func() { _ = g.cmd.Process.Kill() })
	defer kill.Stop()
	if err := g.cmd.Wait(); err != nil {
		return fmt.Errorf("the gateway ended badly: %w", err)
	}
	return nil
}

// serve is the process of a gateway.
func serve(text string) error {
	var o gatewayOptions
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	r := &alternating{routed: map[string]map[string]int{}}
	for i, address := range o.Servers {
		// Sites differ by name and are reached by it, also when they are one server.
		r.targets = append(r.targets, gateway.Target{Site: string(rune('a' + i)), Network: "tcp", Address: string(rune('a'+i)) + ":" + address})
	}
	cfg := gateway.Config{
		Mode: gateway.TransactionMode, Router: r, Verifiers: &authid{dsn: o.Admin}, Sites: alive{}, ClientsMax: o.Clients, LoginRate: 1 << 20, Admins: []string{bossRole},
		Dial: func(ctx context.Context, t gateway.Target) (net.Conn, error) {
			_, address, _ := strings.Cut(t.Address, ":")
			return new(net.Dialer).DialContext(ctx, t.Network, address)
		},
	}
	if o.TLS {
		cert, err := certificate()
		if err != nil {
			return err
		}
		cfg.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	}
	g, err := gateway.NewServer(cfg)
	if err != nil {
		return err
	}
	g.Open()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- g.Serve(ctx, l) }()
	fmt.Println(l.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		b, err := json.Marshal(stats(g, r))
		if err != nil {
			return err
		}
		fmt.Println(string(b))
	}
	cancel()
	return <-done
}

func stats(g *gateway.Server, r *alternating) Stats {
	peak := status("VmHWM")
	debug.FreeOSMemory()
	s := Stats{Pins: g.Pins(), Goroutines: runtime.NumGoroutine(), RSS: status("VmRSS"), Peak: peak, Routed: map[string]map[string]int{}}
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // the peak begins anew (proc(5)); without it, it is since the start
	r.mu.Lock()
	defer r.mu.Unlock()
	for database, sites := range r.routed {
		s.Routed[database] = maps.Clone(sites)
	}
	return s
}

// status reads a size of this process, in bytes.
func status(name string) int64 {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return n << 10
		}
	}
	return 0
}

// alternating sends each transaction to another site than the one before it, whoever's it is, and a session's to another
// than its last if it says which that was.
type alternating struct {
	targets []gateway.Target

	mu     sync.Mutex // guards the rest
	next   int
	routed map[string]map[string]int
}

func (r *alternating) Route(l *gateway.Login, w gateway.Wish) (gateway.Target, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.next++
	t := r.targets[r.next%len(r.targets)]
	if t.Site == w.Last {
		r.next++
		t = r.targets[r.next%len(r.targets)]
	}
	if r.routed[l.Database] == nil {
		r.routed[l.Database] = map[string]int{}
	}
	r.routed[l.Database][t.Site]++
	return t, nil
}

// alive answers for sites of which none is lost. With it the gateway marks transactions and lets writes commit apart from their
// results, as it does in a cluster.
type alive struct{}

func (alive) Fate(context.Context, gateway.Doubt) (gateway.Fate, error) {
	return gateway.Unknown, errors.New("no site was to be lost")
}

func (alive) End(context.Context, gateway.Doubt) {}

func (alive) CatchUp(context.Context, string, string, string) error { return nil }

// authid reads verifiers as a superuser. They are kept: the tests' roles do not change.
type authid struct {
	dsn string

	mu   sync.Mutex // guards known, and is held while a new one is read
	seen map[string]*scram.Verifier
}

func (a *authid) Verifier(ctx context.Context, user string) (*scram.Verifier, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if v := a.seen[user]; v != nil {
		return v, nil
	}
	conn, err := pgx.Connect(ctx, a.dsn)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var text *string
	err = conn.QueryRow(ctx, "SELECT rolpassword FROM pg_authid WHERE rolcanlogin AND rolname = $1", user).Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && text == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v, err := scram.ParseVerifier(*text)
	if err != nil {
		return nil, err
	}
	if a.seen == nil {
		a.seen = map[string]*scram.Verifier{}
	}
	a.seen[user] = v
	return v, nil
}

// certificate makes one for 127.0.0.1.
func certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "127.0.0.1"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

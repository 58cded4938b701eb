package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	"github.com/duri-io/duri/internal/alive"
	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

const (
	// gRPC probes an idle connection after keepaliveTime and gives it up keepaliveTimeout later.
	keepaliveTime    = time.Second
	keepaliveTimeout = 2 * time.Second
	handshakeMax     = 5 * time.Second
	// stopMax is how long Serve waits for handlers when it ends, before it cuts the connections.
	stopMax = 3 * time.Second
)

// ServerConfig is what a Server needs. TLS, ClusterID, Site and Databases are required.
type ServerConfig struct {
	TLS       *tls.Config // the server's one of pki.TLS
	ClusterID string
	Site      string                             // the own name
	Databases func(name string) (Database, bool) // what is replicated here
	// Status gives the site's status document; nil: the request is refused.
	Status func(ctx context.Context) ([]byte, error)

	// Facts gives what must be the same at two sites for an open session to go on; nil: the request is refused.
	Facts func(ctx context.Context) ([]byte, error)
	// Gateways answers gateways; nil: they are refused. Drain is asked by another site to take no new transactions of clients
	// or to take them again, and tells what is left; nil likewise.
	Gateways Gateways
	Drain    func(ctx context.Context, o DrainOrder) (DrainState, error)

	// Unfit says why this site cannot do its part in durability, empty when it can; nil: it always can. It must not block.
	Unfit func() string

	Now    func() wal.Time // the site's clock; default the system's
	Logger *slog.Logger    // default none
	// Versions, Window, Silence and Heartbeat replace the constants of the package, for tests.
	Versions  Versions
	Window    int64
	Silence   time.Duration
	Heartbeat time.Duration
}

func (c ServerConfig) withDefaults() ServerConfig {
	c.Versions = c.Versions.withDefaults()
	if c.Now == nil {
		c.Now = systemNow
	}
	if c.Unfit == nil {
		c.Unfit = func() string { return "" }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.Window, DefaultWindow)
	setDefault(&c.Silence, DefaultSilence)
	setDefault(&c.Heartbeat, DefaultHeartbeat)
	return c
}

func systemNow() wal.Time { return wal.TimeOf(time.Now()) }

func setDefault[T ~int64](p *T, v T) {
	if *p <= 0 {
		*p = v
	}
}

// Server answers the other agents. Its methods may be called at any time.
type Server struct {
	linkpb.UnimplementedLinkServer
	c    ServerConfig
	grpc *grpc.Server

	alive    *alive.Watcher  // of tunnels
	stopping chan struct{}   // closed when Serve ends
	wg       sync.WaitGroup  // goroutines of streams
	base     context.Context // ends with Serve; the server is its own parent
	end      context.CancelFunc

	mu        sync.Mutex // guards the rest
	served    bool
	followers map[followKey]*follower
	clocks    map[string]*estimator // by site
	tunnels   map[*tls.Conn]struct{}
}

// NewServer makes a server that does not listen yet.
func NewServer(c ServerConfig) *Server {
	s := &Server{
		c: c.withDefaults(), alive: alive.New(DefaultSilence), stopping: make(chan struct{}),
		followers: map[followKey]*follower{}, clocks: map[string]*estimator{}, tunnels: map[*tls.Conn]struct{}{},
	}
	s.base, s.end = context.WithCancel(context.Background())
	s.grpc = grpc.NewServer(
		grpc.Creds(newDivided(s.c.TLS, map[string]func(*tls.Conn){followProtocol: s.follow, sqlProtocol: s.tunnel, certProtocol: s.tunnel})),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime, PermitWithoutStream: true}),
		grpc.ConnectionTimeout(handshakeMax), grpc.WaitForHandlers(true),
		grpc.MaxRecvMsgSize(messageBytes), grpc.MaxSendMsgSize(messageBytes),
	)
	linkpb.RegisterLinkServer(s.grpc, s)
	linkpb.RegisterGatewaysServer(s.grpc, gatewayServer{s: s})
	return s
}

// Serve answers on l, which it closes, until ctx is done; then it tells the streams that this site is stopping, and
// returns when all that it started has ended. It may be called once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	again := s.served
	s.served = true
	s.mu.Unlock()
	if again {
		return errors.Join(errors.New("serve links: the server has been used already"), l.Close())
	}
	ended := make(chan error, 1)
	go func() { ended <- s.grpc.Serve(l) }()
	var err error
	select {
	case err = <-ended: // the listener failed
		s.stop()
		s.grpc.Stop()
	case <-ctx.Done():
		s.stop()
		s.stopGracefully()
		err = <-ended
	}
	s.wg.Wait()
	if err != nil {
		return fmt.Errorf("serve links on %s: %w", l.Addr(), err)
	}
	return nil
}

// stopGracefully lets the handlers return their last word, and cuts what does not end.
func (s *Server) stopGracefully() {
	done := make(chan struct{})
	go func() {
		s.grpc.GracefulStop()
		close(done)
	}()
	timer := time.NewTimer(stopMax)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		s.grpc.Stop()
		<-done
	}
}

// Clock is the estimate of a peer's clock; false when the peer does not follow this site.
func (s *Server) Clock(site string) (Clock, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.clocks[site]
	if e == nil {
		return Clock{}, false
	}
	return e.best()
}

// Follower describes a stream from this site to a peer.
type Follower struct {
	Site     string    `json:"site"`
	Database string    `json:"database"`
	Origin   string    `json:"origin,omitempty"` // whose journal, when it is a copy of a third site's
	Since    wal.Time  `json:"since"`
	Ack      Ack       `json:"ack"`
	Sent     wal.LSN   `json:"sent"`     // frames up to here were handed to the network
	Underway int64     `json:"underway"` // bytes sent and not taken by the peer
	Heard    time.Time `json:"heard"`    // when the peer last gave a sign of life
}

// Followers lists the streams, by site and database.
func (s *Server) Followers() []Follower {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]Follower, 0, len(s.followers))
	for _, f := range s.followers {
		list = append(list, f.describe())
	}
	slices.SortFunc(list, func(a, b Follower) int {
		if c := strings.Compare(a.Site, b.Site); c != 0 {
			return c
		}
		return strings.Compare(a.Database, b.Database)
	})
	return list
}

// admit says who calls and which protocol version to speak, or refuses (see the package comment for the order).
func (s *Server) admit(site string, err error, h *linkpb.Hello) (string, uint32, error) {
	if err != nil {
		return "", 0, refuse(ErrSite, "", "%v", err)
	}
	version, err := s.judge(site, h)
	if err != nil {
		return "", 0, err
	}
	return site, version, nil
}

// judge decides on a caller whose name is proven.
func (s *Server) judge(site string, h *linkpb.Hello) (version uint32, err error) {
	if version, err = s.speak(h); err != nil {
		return 0, err
	}
	if site == s.c.Site {
		return 0, refuse(ErrSite, "see that each site has its own certificate, and that the address in the configuration is the peer's",
			"the caller has the certificate of site %s, which is this site", site)
	}
	return version, nil
}

// speak decides on a caller's cluster and version.
func (s *Server) speak(h *linkpb.Hello) (version uint32, err error) {
	if id := h.GetClusterId(); id != s.c.ClusterID {
		return 0, refuse(ErrCluster, "see that the agent at this address belongs to the cluster, and that both sites have the same cluster id",
			"site %s belongs to cluster %s, the caller asks for cluster %q", s.c.Site, s.c.ClusterID, id)
	}
	theirs := Versions{h.GetMinVersion(), h.GetMaxVersion()}
	version, ok := s.c.Versions.common(theirs)
	if !ok {
		return 0, refuse(ErrVersion, "bring duri at both sites to releases that are at most one apart",
			"site %s speaks link protocol %d to %d, the caller %d to %d", s.c.Site, s.c.Versions.Min, s.c.Versions.Max, theirs.Min, theirs.Max)
	}
	return version, nil
}

// caller is the site that the certificate of a call's connection names.
func caller(ctx context.Context) (string, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", errors.New("the call has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "", errors.New("the call did not come over TLS")
	}
	return pki.PeerSite(info.State)
}

// open admits a caller and finds the database.
func (s *Server) open(ctx context.Context, h *linkpb.Hello, name string) (Database, string, error) {
	site, err := caller(ctx)
	site, _, db, err := s.openFor(site, err, h, name)
	return db, site, err
}

// openFor is open for a caller that is known; unknown is why it is not.
func (s *Server) openFor(site string, unknown error, h *linkpb.Hello, name string) (_ string, version uint32, db Database, err error) {
	if site, version, err = s.admit(site, unknown, h); err != nil {
		return "", 0, nil, err
	}
	db, ok := s.c.Databases(name)
	if !ok {
		return "", 0, nil, refuse(ErrUnknownDatabase, "list the database in the configuration of every site",
			"site %s does not replicate database %q", s.c.Site, name)
	}
	return site, version, db, nil
}

// untilStop derives a context that also ends when the server stops.
func (s *Server) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	s.wg.Go(func() {
		select {
		case <-s.stopping:
			cancel()
		case <-ctx.Done():
		}
	})
	return ctx, cancel
}

// answer gives the error of a database's method the form that travels.
func (s *Server) answer(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-s.stopping:
		return s.stopped()
	default:
		return failure(ErrFailed, err)
	}
}

func (s *Server) stopped() *Error {
	return refuse(ErrStopping, "", "site %s stops its agent", s.c.Site)
}

// FetchRow serves the call of this name; see Database.
func (s *Server) FetchRow(ctx context.Context, r *linkpb.FetchRowRequest) (*linkpb.FetchRowReply, error) {
	db, _, err := s.open(ctx, r.GetHello(), r.GetDatabase())
	if err != nil {
		return nil, err
	}
	rel, err := wal.ParseRelation(r.GetRelation())
	if err != nil {
		return nil, refuse(ErrProtocol, "", "fetch a row: %v", err)
	}
	row, err := parseTuple(r.GetRow(), rel)
	if err == nil {
		err = checkKey(r.GetKey(), rel)
	}
	if err != nil {
		return nil, refuse(ErrProtocol, "", "fetch a row of %s: %v", rel, err)
	}
	ctx, cancel := s.untilStop(ctx)
	defer cancel()
	found, ok, err := db.FetchRow(ctx, rel, r.GetKey(), row)
	if err != nil {
		return nil, s.answer(err)
	}
	return &linkpb.FetchRowReply{Found: ok, Row: tuple(found)}, nil
}

// Compare serves the call of this name; see Database.
func (s *Server) Compare(ctx context.Context, r *linkpb.CompareRequest) (*linkpb.CompareReply, error) {
	db, _, err := s.open(ctx, r.GetHello(), r.GetDatabase())
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.untilStop(ctx)
	defer cancel()
	reply, err := db.Compare(ctx, r.GetRequest())
	if err != nil {
		return nil, s.answer(err)
	}
	return &linkpb.CompareReply{Reply: reply}, nil
}

// Status serves the call of this name; see ServerConfig.Status.
func (s *Server) Status(ctx context.Context, r *linkpb.StatusRequest) (*linkpb.StatusReply, error) {
	site, err := caller(ctx)
	if _, _, err := s.admit(site, err, r.GetHello()); err != nil {
		return nil, err
	}
	if s.c.Status == nil {
		return nil, refuse(ErrNotReady, "", "site %s has no status document yet", s.c.Site)
	}
	ctx, cancel := s.untilStop(ctx)
	defer cancel()
	doc, err := s.c.Status(ctx)
	if err != nil {
		return nil, s.answer(err)
	}
	return &linkpb.StatusReply{Status: doc}, nil
}

// Copy serves the call of this name; see Database.
func (s *Server) Copy(r *linkpb.CopyRequest, stream grpc.ServerStreamingServer[linkpb.CopyReply]) error {
	db, site, err := s.open(stream.Context(), r.GetHello(), r.GetDatabase())
	if err != nil {
		return err
	}
	pack, err := newPacker()
	if err != nil {
		return failure(ErrFailed, err)
	}
	ctx, cancel := s.untilStop(stream.Context())
	defer cancel()
	s.c.Logger.Info("copy of a database begins", "site", site, "database", r.GetDatabase())
	w := &contentWriter{ctx: ctx, pack: pack, send: stream.Send, buf: make([]byte, 0, copyBytes)}
	err = db.Copy(ctx, w)
	if err == nil {
		err = w.flush()
	}
	s.c.Logger.Info("copy of a database ended", "site", site, "database", r.GetDatabase(), "err", err)
	return s.answer(err)
}

// contentWriter collects what a database writes into messages.
type contentWriter struct {
	ctx  context.Context // of the call that the writer belongs to: an io.Writer has no other way to end
	pack *packer
	send func(*linkpb.CopyReply) error
	buf  []byte
}

// Write sends whole messages and keeps the rest.
func (w *contentWriter) Write(b []byte) (n int, err error) {
	for len(b) > 0 {
		k := min(len(b), copyBytes-len(w.buf))
		w.buf = append(w.buf, b[:k]...)
		b, n = b[k:], n+k
		if len(w.buf) == copyBytes {
			if err := w.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (w *contentWriter) flush() error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if len(w.buf) == 0 {
		return nil
	}
	data, packed := w.pack.pack(w.buf)
	// A message must not change once it is sent, so what goes unpacked takes the buffer with it.
	if packed {
		w.buf = w.buf[:0]
	} else {
		w.buf = make([]byte, 0, copyBytes)
	}
	return w.send(&linkpb.CopyReply{Data: data, Zstd: packed})
}

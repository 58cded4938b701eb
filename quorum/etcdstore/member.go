package etcdstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3compactor"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"github.com/duri-io/duri/internal/pki"
)

const (
	// A leader that is silent for this long is replaced. Voters in three places have some 10 ms between them.
	heartbeat = 100 * time.Millisecond
	election  = 500 * time.Millisecond

	// The register is one value of a few hundred bytes that changes a few times a day.
	quota       = 64 << 20
	maxRequest  = 256 << 10
	keepHistory = "1000" // revisions
	walSegment  = 4 << 20

	// leadCheck is how often a leader looks whether the preferred one could lead.
	leadCheck = time.Second
	leadAgain = 30 * time.Second
)

// etcd preallocates two log segments of 64 MB, and knows no setting for it.
func init() { wal.SegmentSizeBytes = walSegment }

// Voter is one of the voters as all know it.
type Voter struct {
	Name   string
	Peer   string // host:port for the other voters
	Client string // host:port for clients
}

// MemberConfig describes the voter that runs here.
type MemberConfig struct {
	ClusterID string
	Name      string
	DataDir   string // made when missing; a voter that has lost it comes back by Replace
	Voters    []Voter
	// ListenPeer and ListenClient are IP:port; empty: the port of the own address, on all interfaces.
	ListenPeer, ListenClient string
	TLS                      pki.Files
	// Prefer is the voter that leads when it can: the witness, so that the loss of a site costs no election on top of
	// its own detection. Empty: any.
	Prefer string
	// Join: this voter comes into a cluster that runs already (after Replace).
	Join bool
	Log  *slog.Logger
}

// Member is a running voter.
type Member struct {
	etcd   *embed.Etcd
	prefer Voter       // Name empty: none
	tls    *tls.Config // to ask it
	log    *slog.Logger
	stop   context.CancelFunc
	done   chan struct{} // closed when the voter has ended, whoever ended it
	wg     sync.WaitGroup

	mu     sync.Mutex
	closed bool
	err    error // why it ended by itself
}

// StartMember starts a voter. It does not wait for the others: see Ready. ctx bounds the start only; end the voter with
// Close.
//
// A voter whose data directory is empty although the others know it is refused (IsLost): an empty log must not vote as if
// it were the old one. Replace brings it back. etcd can only tell when it reaches one of the others at this moment, so
// whoever knows that the directory is lost uses Replace and does not try.
//
// etcd ends the whole process when it cannot write its log any more.
func StartMember(ctx context.Context, c MemberConfig) (*Member, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	cfg, err := c.embed()
	if err != nil {
		return nil, err
	}
	// This also finds files that do not belong together, with words that say so.
	_, client, err := pki.TLS(c.TLS, c.ClusterID, c.Name)
	if err != nil {
		return nil, err
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start voter %s of the register: %w", c.Name, explain(err))
	}
	if err := reserve(c.DataDir); err != nil { // it works all the same
		c.Log.Warn("a full disk would end this voter", "error", err.Error())
	}
	watch, stop := context.WithCancel(context.Background())
	m := &Member{etcd: e, tls: client, log: c.Log, stop: stop, done: make(chan struct{})}
	if at := slices.IndexFunc(c.Voters, func(v Voter) bool { return v.Name == c.Prefer }); at >= 0 {
		m.prefer = c.Voters[at]
	}
	m.wg.Go(func() { m.lead(watch) })
	m.wg.Go(m.watch)
	return m, nil
}

// explain adds what to do when etcd's own words do not say it.
func explain(err error) error {
	if strings.Contains(err.Error(), "has already been bootstrapped") {
		return fmt.Errorf("its data directory is empty, but the other voters know it: %w", err)
	}
	return err
}

// IsLost reports whether StartMember was refused because the data directory is lost: Replace, then start with Join.
func IsLost(err error) bool {
	return err != nil && strings.Contains(err.Error(), "has already been bootstrapped")
}

func (c MemberConfig) embed() (*embed.Config, error) {
	at := slices.IndexFunc(c.Voters, func(v Voter) bool { return v.Name == c.Name })
	if at < 0 {
		return nil, fmt.Errorf("start a voter of the register: %q is not one of the voters", c.Name)
	}
	self := c.Voters[at]
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = c.Name, c.DataDir
	cfg.InitialClusterToken = c.ClusterID
	if c.Join {
		cfg.ClusterState = embed.ClusterStateFlagExisting
	}
	var cluster []string
	for _, v := range c.Voters {
		cluster = append(cluster, v.Name+"=https://"+v.Peer)
	}
	cfg.InitialCluster = strings.Join(cluster, ",")
	var err error
	for _, u := range []struct {
		to      *[]url.URL
		address string
		listen  bool
	}{
		{&cfg.AdvertisePeerUrls, self.Peer, false},
		{&cfg.AdvertiseClientUrls, self.Client, false},
		{&cfg.ListenPeerUrls, orAll(c.ListenPeer, self.Peer), true},
		{&cfg.ListenClientUrls, orAll(c.ListenClient, self.Client), true},
	} {
		if _, _, e := net.SplitHostPort(u.address); e != nil {
			err = errors.Join(err, fmt.Errorf("start voter %s: %w", c.Name, e))
		}
		*u.to = []url.URL{{Scheme: "https", Host: u.address}}
	}
	if err != nil {
		return nil, err
	}
	// A certificate counts when the cluster's own authority signed it, which signs for nothing else, and it holds the
	// cluster's name: etcd compares names, of whoever connects and of whom it connects to, and takes no function of
	// ours that would read the URI. It must not compare the address that a connection comes from, which is not that of
	// the certificate behind NAT.
	info := transport.TLSInfo{
		CertFile: c.TLS.Cert, KeyFile: c.TLS.Key, TrustedCAFile: c.TLS.CA, ClientCertAuth: true,
		ServerName: pki.ClusterName(c.ClusterID), AllowedHostnames: []string{pki.ClusterName(c.ClusterID)},
		SkipClientSANVerify: true,
	}
	cfg.PeerTLSInfo, cfg.ClientTLSInfo = info, info
	cfg.TlsMinVersion = "TLS1.3"
	cfg.TickMs, cfg.ElectionMs = uint(heartbeat.Milliseconds()), uint(election.Milliseconds())
	cfg.PreVote = true
	cfg.StrictReconfigCheck = true
	cfg.QuotaBackendBytes, cfg.MaxRequestBytes = quota, maxRequest
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = v3compactor.ModeRevision, keepHistory
	cfg.EnableGRPCGateway = false
	cfg.GRPCKeepAliveMinTime = time.Second
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(c.Log))
	return cfg, nil
}

// orAll is the address to listen on: that given, or the port of the own address on all interfaces.
func orAll(listen, own string) string {
	if listen != "" {
		return listen
	}
	host, port, err := net.SplitHostPort(own)
	if err != nil {
		return own
	}
	if ip := net.ParseIP(host); ip != nil && ip.To4() == nil {
		return net.JoinHostPort("::", port)
	}
	return net.JoinHostPort("0.0.0.0", port)
}

// Ready is closed when the voter has found a majority and serves.
func (m *Member) Ready() <-chan struct{} { return m.etcd.Server.ReadyNotify() }

// Done is closed when the voter has ended, by Close or by itself; Err tells why then.
func (m *Member) Done() <-chan struct{} { return m.done }

// Err is why the voter ended by itself; nil while it runs and after Close.
func (m *Member) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Leads reports whether this voter is the leader now.
func (m *Member) Leads() bool { return m.etcd.Server.Leader() == m.etcd.Server.MemberID() }

// watch waits for the end, and notes one that Close did not ask for.
func (m *Member) watch() {
	defer close(m.done)
	var err error
	select {
	case <-m.etcd.Server.StopNotify():
	case err = <-m.etcd.Err():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.closed {
		m.err = fmt.Errorf("a voter of the register has stopped: %w", errors.Join(err, errors.New("see the log")))
	}
}

// lead hands leadership to the preferred voter when this one has it.
func (m *Member) lead(ctx context.Context) {
	if m.prefer.Name == "" {
		return
	}
	tick := time.NewTimer(leadCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Reset(m.handOver(ctx))
		}
	}
}

// handOver gives the time until the next look.
func (m *Member) handOver(ctx context.Context) time.Duration {
	s := m.etcd.Server
	if !m.Leads() {
		return leadCheck
	}
	for _, v := range s.Cluster().Members() {
		if v.Name != m.prefer.Name || v.ID == s.MemberID() || !m.follows(ctx) {
			continue
		}
		try, cancel := context.WithTimeout(ctx, election)
		err := s.MoveLeader(try, uint64(s.MemberID()), uint64(v.ID))
		cancel()
		if err != nil {
			// Meanwhile nothing could be written, so not again soon.
			m.log.Warn("leadership of the register's voters could not be handed over", "to", v.Name, "error", err)
			return leadAgain
		}
	}
	return leadCheck
}

// follows asks the preferred voter itself whether it is there and up to date: while a leader hands over, it writes
// nothing, and to one that does not answer it would try for the time of an election.
func (m *Member) follows(ctx context.Context) bool {
	c, err := clientv3.New(clientv3.Config{Context: ctx, Endpoints: []string{m.prefer.Client}, TLS: m.tls, Logger: newZap(nil)})
	if err != nil {
		return false
	}
	defer func() { _ = c.Close() }()
	try, cancel := context.WithTimeout(ctx, election)
	defer cancel()
	status, err := c.Status(try, m.prefer.Client)
	return err == nil && status.Leader == uint64(m.etcd.Server.MemberID()) && status.RaftAppliedIndex+10 > m.etcd.Server.AppliedIndex()
}

// Close ends the voter and waits for it. The others go on when they are a majority.
func (m *Member) Close() {
	m.mu.Lock()
	again := m.closed
	m.closed = true
	m.mu.Unlock()
	if again {
		<-m.done
		return
	}
	m.stop()
	select {
	case <-m.Ready():
	default:
		// embed waits for clients' listeners that would only begin when the voter is ready, so the server must stop first.
		m.etcd.Server.Stop()
	}
	m.etcd.Close()
	m.wg.Wait()
}

// Replace takes a voter whose data directory is lost out of the voters and adds it anew, through the others, a majority
// of which must be there. Afterwards StartMember with Join brings it in, empty; it learns everything from them.
func Replace(ctx context.Context, c Config, v Voter) error {
	s, err := Open(ctx, c)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	members, err := s.client.MemberList(ctx)
	if err != nil {
		return fmt.Errorf("replace voter %s: %w", v.Name, err)
	}
	peer := "https://" + v.Peer
	for _, old := range members.Members {
		// One that was added and never started has no name yet.
		if old.Name == v.Name || slices.Contains(old.PeerURLs, peer) {
			if err := s.remove(ctx, old.ID); err != nil {
				return fmt.Errorf("replace voter %s: %w", v.Name, err)
			}
		}
	}
	if err := s.add(ctx, peer); err != nil {
		return fmt.Errorf("replace voter %s: %w", v.Name, err)
	}
	return nil
}

// remove repeats while the voters refuse because they have not seen each other for long enough.
func (s *Store) remove(ctx context.Context, id uint64) error {
	for {
		_, err := s.client.MemberRemove(ctx, id)
		if !errors.Is(err, rpctypes.ErrUnhealthy) {
			return err
		}
		if !wait(ctx) {
			return ended(ctx, err)
		}
	}
}

// add repeats while the voters refuse because they have only just removed one.
func (s *Store) add(ctx context.Context, peer string) error {
	for {
		_, err := s.client.MemberAdd(ctx, []string{peer})
		if err == nil {
			return nil
		}
		if !wait(ctx) {
			return ended(ctx, err)
		}
	}
}

// ClientTLS reads the TLS files for an etcd that somebody else keeps: its authority, and our certificate there.
func ClientTLS(files pki.Files) (*tls.Config, error) {
	info := transport.TLSInfo{CertFile: files.Cert, KeyFile: files.Key, TrustedCAFile: files.CA}
	c, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read the TLS files of the external etcd: %w", err)
	}
	return c, nil
}

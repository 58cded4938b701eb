package link

import (
	"context"
	"errors"
	"maps"
	"math"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// What gateways ask agents (service Gateways of link.proto). An agent's own gateway asks it in the same words, without a
// connection between them.

// SiteState is what a gateway must know of a site.
type SiteState struct {
	Epoch    uint64   // of the register as the site knows it; 0: there is none
	Members  []string // likewise
	Refuses  string   // why it takes no clients; empty: it does
	Draining bool     // no new transactions, if another site takes them
	Leave    bool     // it is drained, and sessions that cannot be moved are to leave it
	Postgres bool     // it answers
	CaughtUp bool     // what the other sites have committed is visible there, all but a little
	Server   string   // which history its server writes; empty: not known
	// Databases are those that are replicated and open there.
	Databases []DatabaseState
}

// DatabaseState is how far a site is with what the others write into a database, and they with what it writes.
type DatabaseState struct {
	Database string
	Lags     []SiteLag // of each of the other sites
	// Backlog is how many bytes of its WAL the slowest of the sites that make progress has not applied.
	Backlog int64
}

// SiteLag is how old what a site has written is at the most that is not visible at another one.
type SiteLag struct {
	Site  string
	Known bool
	Lag   time.Duration
}

// Database finds what a site tells of one.
func (s *SiteState) Database(name string) (DatabaseState, bool) {
	for _, d := range s.Databases {
		if d.Database == name {
			return d, true
		}
	}
	return DatabaseState{}, false
}

// FateQuestion is about a transaction whose answer was lost.
type FateQuestion struct {
	Database, Site string
	Server         string // SiteState.Server of the site then; empty: not known
	Epoch          uint64 // of the register when its connection was opened
	PID            uint32
	Started        string // its backend_start in pg_stat_activity, in seconds since 1970; empty: not known
	XID            uint64
	LTXID          []byte
	Age            time.Duration // since it was told to commit, at least
	Forwarded      bool          // an agent asks, and the question is not handed on
}

// Outcome is what became of a transaction.
type Outcome int

// The outcomes.
const (
	OutcomeUnknown   Outcome = iota
	OutcomeCommitted         // by the word of its own server, or on record at another site once and for all
	OutcomeAborted           // likewise
)

// FateAnswer is what a site knows of a transaction. What follows from it the one who has asked decides.
type FateAnswer struct {
	Site    string // whose knowledge it is: the question may have been handed on
	Outcome Outcome
	Why     string // it is not known; empty: nothing to tell

	// The rest is of the transaction's own site only.
	Server      string
	HasRegister bool
	Member      bool   // the register counts it in
	MemberSince uint64 // epoch since which it does without a break, as far as it knows
	Waits       bool   // commits wait for other sites
	Proven      bool   // and what was committed when it was asked has what they wait for
}

// SitePosition is a position of a site's WAL.
type SitePosition struct {
	Site string
	LSN  wal.LSN
}

// Asked is what a gateway asks a site's agent. Client is it for another site; methods are safe for concurrent use and end with
// their ctx.
type Asked interface {
	// Watch calls tell with the site's state, at once, whenever it has changed, and at least every StateEvery. It ends with an
	// error of tell.
	Watch(ctx context.Context, tell func(SiteState) error) error
	// Verifier is the SCRAM verifier of a role that may log in; empty: there is none.
	Verifier(ctx context.Context, role string) (string, error)
	Fate(ctx context.Context, q FateQuestion) (FateAnswer, error)
	// End ends the backend that has a transaction which nobody will commit.
	End(ctx context.Context, q FateQuestion) error
	// Position is up to where, by site, all lies that can have been seen there until now.
	Position(ctx context.Context, database string) ([]SitePosition, error)
	// Facts are what must be the same at two sites for an open session to go on, as JSON.
	Facts(ctx context.Context) ([]byte, error)
	// Staying tells a site that is drained how many sessions of a gateway still have a connection there, by what for. gateway is
	// unique among all of them.
	Staying(ctx context.Context, gateway string, sessions map[string]int) error
	// Reach waits until that is visible here. Without positions, it waits for all that was received from the site gone.
	Reach(ctx context.Context, database string, positions []SitePosition, gone string) error
}

// Gateways is what a Server has for gateways.
type Gateways interface {
	Asked
	// Open connects to PostgreSQL for the gateway of a name, as a client with a certificate of role; empty: without one. cut ends what
	// the connection is for; it is called, and the connection closed, when this site may serve clients no more. release must be called
	// in the end. An Error of the kind ErrLogin says that there are no such logins.
	Open(ctx context.Context, gateway, role string, cut func()) (conn net.Conn, release func(), err error)
}

const (
	// StateEvery is the longest pause between two states of a site that are told.
	StateEvery = 500 * time.Millisecond
	// StateSilence is how long nothing may come before a site counts as unreachable.
	StateSilence = 2 * time.Second
)

// gatewayServer answers gateways.
type gatewayServer struct {
	linkpb.UnimplementedGatewaysServer
	s *Server
}

var errNoGateways = refuse(ErrFailed, "set gateway.mode to session or transaction in its duri.yaml", "the agent takes no connections of gateways")

// guest admits a caller that may be a gateway, and this site itself.
func (g gatewayServer) guest(ctx context.Context, h *linkpb.Hello) error {
	if err := g.known(ctx, h); err != nil {
		return err
	}
	if g.s.c.Gateways == nil {
		return errNoGateways
	}
	return nil
}

// known is guest without that the agent needs to have anything for gateways.
func (g gatewayServer) known(ctx context.Context, h *linkpb.Hello) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return refuse(ErrSite, "", "the call has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return refuse(ErrSite, "", "the call did not come over TLS")
	}
	if _, err := pki.Peer(info.State); err != nil {
		return refuse(ErrSite, "", "%v", err)
	}
	_, err := g.s.speak(h)
	return err
}

// Facts serves the call of this name; see ServerConfig.Facts.
func (g gatewayServer) Facts(ctx context.Context, r *linkpb.FactsRequest) (*linkpb.FactsReply, error) {
	if err := g.known(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	if g.s.c.Facts == nil {
		return nil, refuse(ErrFailed, "", "the agent tells no facts")
	}
	ctx, cancel := g.s.untilStop(ctx)
	defer cancel()
	b, err := g.s.c.Facts(ctx)
	if err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.FactsReply{Facts: b}, nil
}

// Facts asks for what must be the same at two sites for an open session to go on (package parity).
func (c *Client) Facts(ctx context.Context) ([]byte, error) {
	r, err := c.gateways.Facts(ctx, &linkpb.FactsRequest{Hello: c.hello()})
	if err != nil {
		return nil, c.fail(ctx, err)
	}
	return r.GetFacts(), nil
}

// Watch serves the call of this name; see Asked.
func (g gatewayServer) Watch(r *linkpb.WatchRequest, stream grpc.ServerStreamingServer[linkpb.SiteState]) error {
	if err := g.guest(stream.Context(), r.GetHello()); err != nil {
		return err
	}
	ctx, cancel := g.s.untilStop(stream.Context())
	defer cancel()
	return g.s.answer(g.s.c.Gateways.Watch(ctx, func(st SiteState) error {
		return stream.Send(&linkpb.SiteState{
			Epoch: st.Epoch, Members: st.Members, Refuses: st.Refuses, Draining: st.Draining, Postgres: st.Postgres, CaughtUp: st.CaughtUp, Server: st.Server,
			AsksToLeave: st.Leave, Databases: fromDatabases(st.Databases),
		})
	}))
}

// Verifier serves the call of this name; see Asked.
func (g gatewayServer) Verifier(ctx context.Context, r *linkpb.VerifierRequest) (*linkpb.VerifierReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	v, err := g.s.c.Gateways.Verifier(ctx, r.GetRole())
	if err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.VerifierReply{Verifier: v}, nil
}

func question(r *linkpb.FateRequest) FateQuestion {
	return FateQuestion{
		Database: r.GetDatabase(), Site: r.GetSite(), Server: r.GetServer(), Epoch: r.GetEpoch(), PID: r.GetPid(), Started: r.GetStarted(), XID: r.GetXid(), LTXID: r.GetLtxid(),
		Age: time.Duration(min(r.GetAgeMicros(), 1<<50)) * time.Microsecond, Forwarded: r.GetForwarded(),
	}
}

// Fate serves the call of this name; see Asked.
func (g gatewayServer) Fate(ctx context.Context, r *linkpb.FateRequest) (*linkpb.FateReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	ctx, cancel := g.s.untilStop(ctx)
	defer cancel()
	a, err := g.s.c.Gateways.Fate(ctx, question(r))
	if err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.FateReply{
		Site: a.Site, Outcome: linkpb.Outcome(a.Outcome), Why: a.Why, Server: a.Server, HasRegister: a.HasRegister, Member: a.Member, MemberSince: a.MemberSince,
		Waits: a.Waits, Proven: a.Proven,
	}, nil
}

// End serves the call of this name; see Asked.
func (g gatewayServer) End(ctx context.Context, r *linkpb.FateRequest) (*linkpb.EndReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	if err := g.s.c.Gateways.End(ctx, question(r)); err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.EndReply{}, nil
}

// Position serves the call of this name; see Asked.
func (g gatewayServer) Position(ctx context.Context, r *linkpb.PositionRequest) (*linkpb.PositionReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	ctx, cancel := g.s.untilStop(ctx)
	defer cancel()
	at, err := g.s.c.Gateways.Position(ctx, r.GetDatabase())
	if err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.PositionReply{Positions: fromPositions(at)}, nil
}

// Reach serves the call of this name; see Asked.
func (g gatewayServer) Reach(ctx context.Context, r *linkpb.ReachRequest) (*linkpb.ReachReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	ctx, cancel := g.s.untilStop(ctx)
	defer cancel()
	if err := g.s.c.Gateways.Reach(ctx, r.GetDatabase(), toPositions(r.GetPositions()), r.GetGone()); err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.ReachReply{}, nil
}

func fromDatabases(all []DatabaseState) (out []*linkpb.DatabaseState) {
	for _, d := range all {
		to := &linkpb.DatabaseState{Database: d.Database, BacklogBytes: uint64(max(0, d.Backlog))}
		for _, l := range d.Lags {
			to.Lags = append(to.Lags, &linkpb.SiteLag{Site: l.Site, LagMicros: uint64(max(0, l.Lag.Microseconds())), Unknown: !l.Known})
		}
		out = append(out, to)
	}
	return out
}

func toDatabases(all []*linkpb.DatabaseState) (out []DatabaseState) {
	for _, d := range all {
		to := DatabaseState{Database: d.GetDatabase(), Backlog: int64(min(d.GetBacklogBytes(), math.MaxInt64))}
		for _, l := range d.GetLags() {
			to.Lags = append(to.Lags, SiteLag{l.GetSite(), !l.GetUnknown(), time.Duration(min(l.GetLagMicros(), 1<<50)) * time.Microsecond})
		}
		out = append(out, to)
	}
	return out
}

func fromPositions(all []SitePosition) []*linkpb.SitePosition {
	out := make([]*linkpb.SitePosition, len(all))
	for i, p := range all {
		out[i] = &linkpb.SitePosition{Site: p.Site, Lsn: uint64(p.LSN)}
	}
	return out
}

func toPositions(all []*linkpb.SitePosition) []SitePosition {
	out := make([]SitePosition, len(all))
	for i, p := range all {
		out[i] = SitePosition{p.GetSite(), wal.LSN(p.GetLsn())}
	}
	return out
}

// DrainOrder asks a site to take no new transactions of clients, or to take them again.
type DrainOrder struct {
	Drain bool
	// Ask: sessions that cannot be moved are asked to leave once the site was drained for After.
	Ask   bool
	After time.Duration
}

// DrainState is what is left at a site that is drained.
type DrainState struct {
	Connections int            // of gateways to PostgreSQL
	Staying     map[string]int // sessions that have one, by what for
	All         bool           // all gateways that are known have told of theirs
	Asks        bool           // those that cannot be moved are asked to leave,
	In          time.Duration  // in this time; 0: they are
}

// Drain serves the call of this name; see ServerConfig.Drain.
func (s *Server) Drain(ctx context.Context, r *linkpb.DrainRequest) (*linkpb.DrainReply, error) {
	site, err := caller(ctx)
	if _, _, err := s.admit(site, err, r.GetHello()); err != nil {
		return nil, err
	}
	if s.c.Drain == nil {
		return nil, errNoGateways
	}
	st, err := s.c.Drain(ctx, DrainOrder{r.GetDrain(), r.GetAsk(), millis(r.GetAskAfterMillis())})
	if err != nil {
		return nil, s.answer(err)
	}
	return &linkpb.DrainReply{
		Connections: uint32(st.Connections), Staying: fromStaying(st.Staying), All: st.All, Asks: st.Asks, AsksInMillis: uint64(st.In.Milliseconds()),
	}, nil
}

// Drain gives the peer an order about transactions of clients, and tells what is left there.
func (c *Client) Drain(ctx context.Context, o DrainOrder) (DrainState, error) {
	r, err := c.rpc.Drain(ctx, &linkpb.DrainRequest{Hello: c.hello(), Drain: o.Drain, Ask: o.Ask, AskAfterMillis: uint64(max(0, o.After.Milliseconds()))})
	if err != nil {
		return DrainState{}, c.fail(ctx, err)
	}
	return DrainState{int(r.GetConnections()), toStaying(r.GetStaying()), r.GetAll(), r.GetAsks(), millis(r.GetAsksInMillis())}, nil
}

func millis(n uint64) time.Duration { return time.Duration(min(n, 1<<40)) * time.Millisecond }

// Staying serves the call of this name; see Asked.
func (g gatewayServer) Staying(ctx context.Context, r *linkpb.StayingRequest) (*linkpb.StayingReply, error) {
	if err := g.guest(ctx, r.GetHello()); err != nil {
		return nil, err
	}
	if err := g.s.c.Gateways.Staying(ctx, r.GetGateway(), toStaying(r.GetStaying())); err != nil {
		return nil, g.s.answer(err)
	}
	return &linkpb.StayingReply{}, nil
}

// Staying is that of Asked.
func (c *Client) Staying(ctx context.Context, gateway string, sessions map[string]int) error {
	_, err := c.gateways.Staying(ctx, &linkpb.StayingRequest{Hello: c.hello(), Gateway: gateway, Staying: fromStaying(sessions)})
	return c.fail(ctx, err)
}

func fromStaying(sessions map[string]int) (out []*linkpb.Staying) {
	for _, why := range slices.Sorted(maps.Keys(sessions)) {
		out = append(out, &linkpb.Staying{Why: why, Sessions: uint32(sessions[why])})
	}
	return out
}

func toStaying(all []*linkpb.Staying) map[string]int {
	sessions := map[string]int{}
	for _, s := range all {
		sessions[s.GetWhy()] += int(s.GetSessions())
	}
	return sessions
}

// Watch is that of Asked, and ends also when nothing came for StateSilence.
func (c *Client) Watch(ctx context.Context, tell func(SiteState) error) error {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := c.gateways.Watch(inner, &linkpb.WatchRequest{Hello: c.hello()})
	if err != nil {
		return c.fail(ctx, err)
	}
	silent := &Error{
		Kind: ErrSilent, Peer: c.c.Peer, Sentence: "its agent is silent for " + StateSilence.String(),
		Hint: "see whether the site and the network to it are up",
	}
	quiet := time.AfterFunc(StateSilence, func() { cancel(silent) })
	defer quiet.Stop()
	for {
		m, err := stream.Recv()
		if err != nil {
			if e, ok := errors.AsType[*Error](context.Cause(inner)); ok {
				return e
			}
			return c.fail(ctx, err)
		}
		quiet.Reset(StateSilence)
		st := SiteState{
			Epoch: m.GetEpoch(), Members: m.GetMembers(), Refuses: m.GetRefuses(), Draining: m.GetDraining(), Postgres: m.GetPostgres(),
			CaughtUp: m.GetCaughtUp(), Server: m.GetServer(), Leave: m.GetAsksToLeave(), Databases: toDatabases(m.GetDatabases()),
		}
		if err := tell(st); err != nil {
			return err
		}
	}
}

// Verifier is that of Asked.
func (c *Client) Verifier(ctx context.Context, role string) (string, error) {
	r, err := c.gateways.Verifier(ctx, &linkpb.VerifierRequest{Hello: c.hello(), Role: role})
	if err != nil {
		return "", c.fail(ctx, err)
	}
	return r.GetVerifier(), nil
}

func (c *Client) fateRequest(q FateQuestion) *linkpb.FateRequest {
	return &linkpb.FateRequest{
		Hello: c.hello(), Database: q.Database, Site: q.Site, Server: q.Server, Epoch: q.Epoch, Pid: q.PID, Started: q.Started, Xid: q.XID, Ltxid: q.LTXID,
		AgeMicros: uint64(max(0, q.Age.Microseconds())), Forwarded: q.Forwarded,
	}
}

// Fate is that of Asked.
func (c *Client) Fate(ctx context.Context, q FateQuestion) (FateAnswer, error) {
	r, err := c.gateways.Fate(ctx, c.fateRequest(q))
	if err != nil {
		return FateAnswer{}, c.fail(ctx, err)
	}
	a := FateAnswer{
		Site: r.GetSite(), Why: r.GetWhy(), Server: r.GetServer(), HasRegister: r.GetHasRegister(), Member: r.GetMember(), MemberSince: r.GetMemberSince(),
		Waits: r.GetWaits(), Proven: r.GetProven(),
	}
	switch r.GetOutcome() {
	case linkpb.Outcome_OUTCOME_COMMITTED:
		a.Outcome = OutcomeCommitted
	case linkpb.Outcome_OUTCOME_ABORTED:
		a.Outcome = OutcomeAborted
	case linkpb.Outcome_OUTCOME_UNKNOWN:
	}
	return a, nil
}

// End is that of Asked.
func (c *Client) End(ctx context.Context, q FateQuestion) error {
	_, err := c.gateways.End(ctx, c.fateRequest(q))
	return c.fail(ctx, err)
}

// Position is that of Asked.
func (c *Client) Position(ctx context.Context, database string) ([]SitePosition, error) {
	r, err := c.gateways.Position(ctx, &linkpb.PositionRequest{Hello: c.hello(), Database: database})
	if err != nil {
		return nil, c.fail(ctx, err)
	}
	return toPositions(r.GetPositions()), nil
}

// Reach is that of Asked.
func (c *Client) Reach(ctx context.Context, database string, positions []SitePosition, gone string) error {
	_, err := c.gateways.Reach(ctx, &linkpb.ReachRequest{Hello: c.hello(), Database: database, Positions: fromPositions(positions), Gone: gone})
	return c.fail(ctx, err)
}

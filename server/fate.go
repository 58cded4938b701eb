package server

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/gateway"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/wal"
)

// What became of a transaction whose answer was lost (design: gateway, section 8, RESOLVE). Agents tell what they know; what
// follows from it verdict says, at the gateway:
//
//	its own site    its server knows, as long as it is the one that it was, and the register has counted the site in all the
//	                time: what a site that was left out has committed may not count, whatever its server says
//	another site    it was applied, or is on record as decided against; where the register has left its own site out, that is
//	                decided now, once and for all

// verdict is what follows from a site's answer.
func verdict(d gateway.Doubt, a link.FateAnswer) gateway.Fate {
	switch {
	case a.Outcome == link.OutcomeUnknown:
		return gateway.Unknown
	case a.Site != d.Site:
		return fateOf(a.Outcome) // on record, once and for all
	case d.History == "" || a.Server != d.History:
		return gateway.Unknown // another server: the number of the transaction is another one's there
	case a.Outcome == link.OutcomeAborted:
		return gateway.Aborted // it has not reached any other site, and never will
	case a.HasRegister && (!a.Member || d.Epoch < a.MemberSince):
		return gateway.Unknown // it may be decided against elsewhere
	case a.Waits && !a.Proven:
		return gateway.Unknown // it is committed, and would not have been acknowledged yet
	}
	return gateway.Committed
}

func fateOf(o link.Outcome) gateway.Fate {
	switch o {
	case link.OutcomeCommitted:
		return gateway.Committed
	case link.OutcomeAborted:
		return gateway.Aborted
	case link.OutcomeUnknown:
	}
	return gateway.Unknown
}

const (
	// runsMax is how long a backend may take to end that is told to (T1 of the design).
	runsMax = 2 * time.Second
	// fateMax bounds a question.
	fateMax = 5 * time.Second
	// margin is more than the age of a transaction may be greater than a question names: the loss was noticed, the question was
	// under way, and waited here.
	margin = 2*fateMax + link.StateSilence
)

// Fate is that of link.Asked.
func (h *host) Fate(ctx context.Context, q link.FateQuestion) (link.FateAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, fateMax)
	defer cancel()
	if q.Site == h.a.self.Name {
		return h.ownFate(ctx, q), nil
	}
	return h.fateElsewhere(ctx, q), nil
}

// statusSQL is the state of a transaction, and ends its backend if it still runs, also where it waits for other sites: then it is
// committed. The number of a backend's transaction has no epoch in pg_stat_activity.
const (
	statusSQL = `SELECT coalesce(pg_catalog.pg_xact_status($1::text::xid8), 'too old'), (` + identitySQL + `)`
	endSQL    = `SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE pid = $1::int AND backend_type = 'client backend' AND backend_xid::text::int8 = $2::int8 % 4294967296`
	// endStartedSQL is for a backend of which is known when it was started.
	endStartedSQL = `SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE pid = $1::int AND backend_type = 'client backend' AND extract(epoch FROM backend_start) = $2::numeric`
	// endUnwrittenSQL is for a transaction that has not written.
	endUnwrittenSQL = `SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
		WHERE pid = $1::int AND backend_type = 'client backend' AND datname = $2 AND backend_xid IS NULL AND xact_start IS NOT NULL`
)

// ownFate tells what this site's server knows of a transaction that ran here.
func (h *host) ownFate(ctx context.Context, q link.FateQuestion) link.FateAnswer {
	a := link.FateAnswer{Site: h.a.self.Name}
	n := h.nodeOf(q.Database)
	if why := n.behindJournal(); why != "" {
		a.Why = why
		return a
	}
	status, server, since, err := h.xactStatus(ctx, q)
	if err != nil {
		a.Why = err.Error()
		return a
	}
	a.Server, a.Waits = server, n.waits()
	// Was it told to commit in the same life of the server as the answer? After a crash, numbers that were not in the WAL are given
	// again, and the data directory may be an older one, which the journal knows.
	same := since.Before(time.Now().Add(-q.Age - margin))
	switch {
	case status != "aborted" && status != "committed":
		a.Why = "its server says that it is " + status
	case !same && (!n.known.Load() || n.behindJournal() != ""):
		a.Why = "its server has begun anew, and is compared with its journal first"
	case status == "aborted":
		a.Outcome = link.OutcomeAborted
	case same:
		a.Outcome = link.OutcomeCommitted
	default:
		if a.Outcome, err = h.inJournal(ctx, n, q); err != nil {
			a.Why = err.Error()
		}
	}
	if a.Outcome == link.OutcomeCommitted && a.Waits {
		if err := h.prove(ctx, n); err != nil {
			a.Why = "it is committed, but not known to be elsewhere as well: " + err.Error()
		} else {
			a.Proven = true
		}
	}
	if k := h.a.keeper; k != nil { // after the proof, during which the site may have been left out
		k.mu.Lock()
		a.HasRegister, a.Member, a.MemberSince = true, k.place().Member && !k.doubt, k.memberAt
		k.mu.Unlock()
		if !a.Member {
			a.Why = "the register does not count this site in"
		}
	}
	return a
}

// nodeOf is the node of a database; of one that is not replicated, one whose commits wait if there is any, as all commits of the
// server wait alike.
func (h *host) nodeOf(database string) *node {
	if n, ok := h.a.node(database); ok {
		return n
	}
	for _, n := range h.a.nodes {
		if n.waits() {
			return n
		}
	}
	return h.a.nodes[0]
}

// xactStatus asks until the transaction has ended. since is when the connection was opened over which the answer came.
func (h *host) xactStatus(ctx context.Context, q link.FateQuestion) (status, server string, since time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, runsMax)
	defer cancel()
	xid := strconv.FormatUint(q.XID, 10)
	for {
		var rows [][]string
		rows, since, err = h.fates.query(ctx, statusSQL, xid)
		if pg.SQLState(err) == "22023" { // "in the future": its number was not in the WAL when the server ended.
			rows, since, err = h.fates.query(ctx, "SELECT 'aborted', ("+identitySQL+")")
		}
		if err != nil {
			return "", "", since, fmt.Errorf("ask PostgreSQL for the state of the transaction: %w", err)
		}
		status, server = rows[0][0], rows[0][1]
		if status != "in progress" {
			return status, server, since, nil
		}
		if _, _, err := h.fates.query(ctx, endSQL, strconv.FormatUint(uint64(q.PID), 10), xid); err != nil && pg.SQLState(err) != "42501" && ctx.Err() == nil {
			return "", "", since, fmt.Errorf("end the transaction's backend: %w", err)
		}
		select {
		case <-ctx.Done():
			return status, server, since, nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// inJournal looks whether a marked transaction is in the own journal, which has all that this site has committed.
func (h *host) inJournal(ctx context.Context, n *node, q link.FateQuestion) (link.Outcome, error) {
	c := n.ready.Load()
	if c == nil || len(q.LTXID) == 0 || n.database.Name != q.Database {
		return link.OutcomeUnknown, fmt.Errorf("the server has begun anew since, and transactions of database %s cannot be told by another mark", q.Database)
	}
	rows, _, err := h.fates.query(ctx, "SELECT pg_catalog.pg_current_wal_insert_lsn()")
	if err == nil {
		var at wal.LSN
		if at, err = wal.ParseLSN(rows[0][0]); err == nil {
			err = n.barrier(ctx, c, at)
		}
	}
	if err != nil {
		return link.OutcomeUnknown, fmt.Errorf("read what was committed: %w", err)
	}
	switch found, since := n.marks.has(string(q.LTXID)); {
	case found:
		return link.OutcomeCommitted, nil
	case since.Before(time.Now().Add(-q.Age - margin)):
		return link.OutcomeAborted, nil // what has its number now is another one
	}
	return link.OutcomeUnknown, fmt.Errorf("the server and the agent have begun anew since")
}

// marks are the marks of this site's latest transactions in the journal. Safe for concurrent use.
type marks struct {
	mu          sync.Mutex // guards the rest
	now, before map[string]bool
	nowSince    time.Time
	beforeSince time.Time
}

// marksKeep is how long they are kept, at least: longer than anybody asks.
const marksKeep = 40 * time.Second

// note notes a transaction's mark; none: that from now on all are noted.
func (m *marks) note(id string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nowSince.IsZero() {
		m.now, m.nowSince, m.beforeSince = map[string]bool{}, now, now
	}
	if now.Sub(m.nowSince) > marksKeep {
		m.before, m.now, m.beforeSince, m.nowSince = m.now, map[string]bool{}, m.nowSince, now
	}
	if id != "" {
		m.now[id] = true
	}
}

// has looks for a mark. since is from when on it would be known.
func (m *marks) has(id string) (found bool, since time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.nowSince.IsZero() {
		return false, time.Now()
	}
	return m.now[id] || m.before[id], m.beforeSince
}

// prove makes sure that all that is committed is as durable as an acknowledged commit is: a transaction that follows it is
// acknowledged.
func (h *host) prove(ctx context.Context, n *node) error {
	_, err := h.proofs.do(ctx, h.base, n.database.Name, func(ctx context.Context) (any, error) {
		return nil, proveOnce(ctx, n.cfg.Postgres.DSN, n.database.Name)
	})
	return err
}

// proveOnce commits something and waits until that is acknowledged. A wait that was broken off gives a warning only.
func proveOnce(ctx context.Context, dsn, database string) error {
	c, err := pg.Config(dsn, database, map[string]string{"application_name": "duri_proof", "synchronous_commit": "on", "client_min_messages": "warning"})
	if err != nil {
		return err
	}
	var warned error
	c.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		if n.Routine == "SyncRepWaitForLSN" {
			warned = fmt.Errorf("%s", n.Message)
		}
	}
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err != nil {
		return err
	}
	defer pg.Close(conn)
	if _, err := pg.Rows(ctx, conn, "SELECT pg_catalog.pg_logical_emit_message(true, 'duri.proof', '')"); err != nil {
		return err
	}
	return warned
}

// fateElsewhere tells what this site knows of a transaction of another one.
func (h *host) fateElsewhere(ctx context.Context, q link.FateQuestion) link.FateAnswer {
	a := link.FateAnswer{Site: h.a.self.Name}
	p, err := h.a.peerOf(OutcomeRequest{Database: q.Database, Origin: q.Site})
	if err == nil && len(q.LTXID) > 0 {
		a.Outcome, err = h.recorded(ctx, p, q)
	}
	if a.Outcome != link.OutcomeUnknown {
		return a
	}
	if err != nil {
		a.Why = err.Error()
	}
	client := h.a.clients[q.Site]
	if q.Forwarded || client == nil || h.a.keeper.leftOut(q.Site) {
		return a
	}
	q.Forwarded = true
	if theirs, err := client.Fate(ctx, q); err == nil {
		return theirs
	}
	return a
}

// recorded gives what is on record here, and decides where this site may.
func (h *host) recorded(ctx context.Context, p *peer, q link.FateQuestion) (link.Outcome, error) {
	var status string
	err := p.n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Query(ctx, c, "SELECT status FROM duri.outcome WHERE ltxid = $1::bytea", fmt.Sprintf(`\x%x`, q.LTXID))
		if err == nil && len(rows) > 0 {
			status = rows[0][0]
		}
		return err
	})
	if err != nil {
		return link.OutcomeUnknown, fmt.Errorf("read duri.outcome: %w", err)
	}
	switch status {
	case "committed":
		return link.OutcomeCommitted, nil
	case "aborted":
		return link.OutcomeAborted, nil
	}
	if k := h.a.keeper; k != nil { // so that nobody waits who is refused in the end
		if err := k.beginDeciding(q.Site); err != nil {
			return link.OutcomeUnknown, err
		}
		k.endDeciding()
	}
	report, err := h.a.outcome(ctx, OutcomeRequest{Database: q.Database, Origin: q.Site, LTXID: q.LTXID})
	switch {
	case err != nil:
		return link.OutcomeUnknown, err
	case report.Committed:
		return link.OutcomeCommitted, nil
	}
	return link.OutcomeAborted, nil
}

// End is that of link.Asked.
func (h *host) End(ctx context.Context, q link.FateQuestion) error {
	if q.Site != h.a.self.Name {
		return &hinted{"the transaction ran at site " + q.Site, "ask there"}
	}
	sql, second := endSQL, strconv.FormatUint(q.XID, 10)
	switch {
	case q.Started != "":
		sql, second = endStartedSQL, q.Started
	case q.XID == 0:
		sql, second = endUnwrittenSQL, q.Database
	}
	if _, _, err := h.fates.query(ctx, sql, strconv.FormatUint(uint64(q.PID), 10), second); err != nil {
		return fmt.Errorf("end the transaction's backend: %w", err)
	}
	return nil
}

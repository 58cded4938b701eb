package server

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/apply"
	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/decode"
	"github.com/duri-io/duri/enrol"
	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/journal"
	"github.com/duri-io/duri/link"
	"github.com/duri-io/duri/preflight"
	"github.com/duri-io/duri/wal"
)

// Keys of duri.meta.
const (
	metaCluster  = "cluster"
	metaSite     = "site"
	metaEnrolled = "enrolled_at"
	metaCopied   = "copied_from" // written by the transaction that copies the first content
)

// open brings the database into the cluster, or back into it: checks, schema duri, slot and journal, first content,
// local index. It may be called again after it failed at any step.
func (n *node) open(ctx context.Context) error {
	n.setState(stateWaiting)
	var enrolled bool
	err := n.withSQL(ctx, func(c *pgconn.PgConn) error {
		var err error
		enrolled, err = n.prepare(ctx, c)
		return err
	})
	if err != nil {
		return err
	}
	if !enrolled {
		n.setState(stateJoining)
		if err := n.enrol(ctx); err != nil {
			return err
		}
	}
	return n.openJournal(ctx)
}

// prepare checks the database and makes duri's own tables; it tells whether the database was enrolled before.
func (n *node) prepare(ctx context.Context, c *pgconn.PgConn) (enrolled bool, err error) {
	who, err := pg.Rows(ctx, c, "SELECT current_user, pg_catalog.to_regclass('duri.meta') IS NOT NULL")
	if err != nil {
		return false, err
	}
	copied := false // by an attempt to join that was interrupted after that
	if who[0][1] == "t" {
		if _, enrolled, err = catalog.Meta(ctx, c, metaEnrolled); err != nil {
			return false, err
		}
		if _, copied, err = catalog.Meta(ctx, c, metaCopied); err != nil {
			return false, err
		}
	}
	findings, err := preflight.Run(ctx, c, preflight.Spec{
		Database: n.database.Name, Schemas: n.database.Schemas, Role: who[0][0], Bootstrap: n.cfg.Bootstrap,
		Joined: enrolled || copied, Sites: len(n.cfg.Sites), Databases: len(n.cfg.Databases),
		Policies: n.database.Policies(),
	})
	if err != nil {
		return false, err
	}
	n.tell(findings)
	if err := preflight.Err(findings); err != nil {
		return false, err
	}
	if err := catalog.Migrate(ctx, c); err != nil {
		return false, err
	}
	for key, want := range map[string]string{metaCluster: n.cfg.Cluster.ID, metaSite: n.self.Name} {
		if err := n.claim(ctx, c, key, want); err != nil {
			return false, err
		}
	}
	return enrolled, nil
}

// tell logs what the check found, each thing once: the check is made again at every attempt to open the database.
func (n *node) tell(findings []preflight.Finding) {
	for _, f := range findings {
		if f.Severity == preflight.SeverityInfo || n.told[f.String()] {
			continue
		}
		n.told[f.String()] = true
		n.log.Warn(f.String(), "database", n.database.Name, "severity", f.Severity, "hint", f.Hint)
	}
}

// claim writes an identity once and refuses another one later.
func (n *node) claim(ctx context.Context, c *pgconn.PgConn, key, want string) error {
	got, ok, err := catalog.Meta(ctx, c, key)
	switch {
	case err != nil:
		return err
	case !ok:
		return catalog.SetMeta(ctx, c, key, want)
	case got != want:
		return &hinted{
			fmt.Sprintf("database %s belongs to %s %s, not to %s", n.database.Name, key, got, want),
			"check postgres.dsn and site in duri.yaml; a database is never moved between clusters or sites in place",
		}
	}
	return nil
}

// enrol makes slot and journal and, unless this site is the seed, copies the content. A step that was interrupted is
// begun again from the start, which is safe because nothing of it counts before enrolled_at is written.
func (n *node) enrol(ctx context.Context) error {
	slot := Slot(n.database.Name)
	conn, err := decode.Connect(ctx, n.cfg.Postgres.DSN, n.database.Name, slot+"_enrol")
	if err != nil {
		return err
	}
	defer pg.Close(conn)
	got, err := decode.Observe(ctx, conn, slot)
	if err != nil {
		return err
	}
	copied, err := n.wasCopied(ctx)
	if err != nil {
		return err
	}
	if copied && !got.Exists {
		return &decode.GapError{
			Slot: slot, Reason: "it vanished while the database was joining, and clients may have written since",
			Hint: "empty this site's database (drop and create it) and start the agent again",
		}
	}
	at := got.Confirmed
	if !copied {
		if at, err = n.begin(ctx, conn, got, slot); err != nil {
			return err
		}
	}
	if n.cfg.Bootstrap == config.BootstrapCopy {
		if !copied {
			if err := n.copyFromSeed(ctx); err != nil {
				return err
			}
		}
		if at, err = n.passCopy(ctx, conn, slot, at); err != nil {
			return err
		}
	}
	seen, err := n.progress(ctx)
	if err != nil {
		return err
	}
	if err := n.forgetJournals(); err != nil {
		return err
	}
	if err := n.createJournal(ctx, conn, got, slot, at, seen); err != nil {
		return err
	}
	return n.withSQL(ctx, func(c *pgconn.PgConn) error { return n.enrolled(ctx, c) })
}

// wasCopied tells whether an attempt that was interrupted has copied the content already. That content is kept, and with
// it the slot that was there before it: clients may have written since.
func (n *node) wasCopied(ctx context.Context) (copied bool, err error) {
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		_, copied, err = catalog.Meta(ctx, c, metaCopied)
		return err
	})
	return copied, err
}

// begin clears what an interrupted attempt or an earlier database has left and makes the slot.
func (n *node) begin(ctx context.Context, conn *pgconn.PgConn, got decode.Identity, slot string) (wal.LSN, error) {
	if got.Exists {
		if err := decode.DropSlot(ctx, conn, slot); err != nil {
			return 0, fmt.Errorf("drop the slot of an interrupted enrolment: %w", err)
		}
	}
	if err := n.dropOrigins(ctx); err != nil {
		return 0, err
	}
	at, err := decode.CreateSlot(ctx, conn, slot)
	if err != nil {
		return 0, fmt.Errorf("create slot %s: %w", slot, err)
	}
	return at, nil
}

// passCopy moves the slot behind the copy: that is one huge transaction of a foreign origin, which decoding would carry
// through only to drop it. No change of a client is passed over, because until the copy commits its tables are either
// not visible yet or locked against writers (package enrol).
func (n *node) passCopy(ctx context.Context, conn *pgconn.PgConn, slot string, at wal.LSN) (wal.LSN, error) {
	rows, err := pg.Rows(ctx, conn, "SELECT coalesce(max(s.local_lsn), '0/0') FROM pg_catalog.pg_show_replication_origin_status() s "+
		"WHERE s.external_id IN ("+n.originList()+")")
	if err != nil {
		return 0, fmt.Errorf("find the end of the copy: %w", err)
	}
	end, err := wal.ParseLSN(rows[0][0])
	if err != nil || end <= at { // unknown after a restart of the server: then decoding has the longer way
		return at, err
	}
	if _, err := pg.Rows(ctx, conn, fmt.Sprintf("SELECT pg_catalog.pg_replication_slot_advance(%s, '%s')", pg.QuoteLiteral(slot), end)); err != nil {
		return 0, fmt.Errorf("move slot %s behind the copy: %w", slot, err)
	}
	return end, nil
}

// originList is the peers' replication origins as SQL literals.
func (n *node) originList() string {
	var names []string
	for _, s := range n.cfg.Peers() {
		names = append(names, pg.QuoteLiteral(apply.OriginName(n.database.Name, s.Name)))
	}
	return strings.Join(names, ", ")
}

// enrolled writes down that the database takes part from now on.
func (n *node) enrolled(ctx context.Context, c *pgconn.PgConn) error {
	if err := catalog.SetMeta(ctx, c, metaEnrolled, time.Now().UTC().Format(time.RFC3339)); err != nil {
		return err
	}
	if err := catalog.DropGaps(ctx, c); err != nil { // the whole content was copied
		return err
	}
	return catalog.Event(ctx, c, "enrolled", fmt.Sprintf("database %s joined cluster %s as site %s", n.database.Name, n.cfg.Cluster.Name, n.self.Name), nil)
}

// dropOrigins forgets the progress that an earlier database of the same name has left: replication origins belong to the
// server and outlive a database.
func (n *node) dropOrigins(ctx context.Context) error {
	return n.withSQL(ctx, func(c *pgconn.PgConn) error {
		_, err := pg.Rows(ctx, c, "SELECT pg_catalog.pg_replication_origin_drop(roname) FROM pg_catalog.pg_replication_origin WHERE roname IN ("+n.originList()+")")
		if err != nil {
			return fmt.Errorf("drop the replication origins of an earlier database: %w", err)
		}
		return nil
	})
}

// progress reads how far every other site has been applied here, durably.
func (n *node) progress(ctx context.Context) (seen []wal.Seen, err error) {
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		seen = nil
		for _, s := range n.cfg.Peers() {
			rows, err := pg.Query(ctx, c, `SELECT least(max(to_lsn), (SELECT min(lsn) FROM duri.held WHERE origin = $1::int2))::text
				FROM duri.applied WHERE origin = $1::int2`, fmt.Sprint(s.ID))
			if err != nil {
				return err
			}
			if rows[0][0] == "" {
				continue
			}
			// What was read may not be flushed yet, as apply commits asynchronously; this flushes it.
			if _, err := pg.Query(ctx, c, `SELECT pg_catalog.pg_replication_origin_progress(roname, true)
				FROM pg_catalog.pg_replication_origin WHERE roname = $1`, apply.OriginName(n.database.Name, s.Name)); err != nil {
				return err
			}
			lsn, err := wal.ParseLSN(rows[0][0])
			if err != nil {
				return err
			}
			seen = append(seen, wal.Seen{Site: s.ID, LSN: lsn})
		}
		return nil
	})
	return seen, err
}

func (n *node) createJournal(ctx context.Context, conn *pgconn.PgConn, id decode.Identity, slot string, at wal.LSN, seen []wal.Seen) error {
	version, err := pg.ServerVersion(ctx, conn)
	if err != nil {
		return err
	}
	encoding, err := pg.Rows(ctx, conn, "SHOW server_encoding")
	if err != nil {
		return err
	}
	if err := n.measureClock(ctx, conn); err != nil {
		return err
	}
	j, err := journal.Create(n.dir(n.self.Name), journal.Header{
		Cluster: n.cfg.Cluster.ID, Site: n.self.ID, SiteName: n.self.Name,
		Incarnation: journal.Incarnation{
			SystemID: id.SystemID, Timeline: id.Timeline, Database: n.database.Name, Slot: slot, CreatedLSN: at,
		},
		ServerVersion: version, Encoding: encoding[0][0], Settings: pg.WireSettings(),
		From: at, MaxVersionTime: n.clock.Now(), Seen: seen,
	}, n.journalOptions())
	if err != nil {
		return err
	}
	return j.Close()
}

func (n *node) journalOptions() journal.Options {
	return journal.Options{
		SegmentBytes: n.cfg.Journal.Segment.Bytes(),
		Logger:       n.log,
	}
}

// copyFromSeed takes the first content from whichever site offers it.
func (n *node) copyFromSeed(ctx context.Context) error {
	var errs []error
	var role string
	err := n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT current_user")
		if err == nil {
			role = rows[0][0]
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, p := range n.peers {
		r, err := p.client.Copy(ctx, n.database.Name)
		if err != nil {
			errs = append(errs, fmt.Errorf("copy from %s: %w", p.site.Name, err))
			continue
		}
		res, err := enrol.Receive(ctx, enrol.TargetConfig{
			DSN: n.cfg.Postgres.DSN, SetupDSN: n.cfg.Postgres.SetupDSN, Database: n.database.Name,
			Origin: apply.OriginName(n.database.Name, p.site.Name), Schemas: n.database.Schemas, Role: role,
			Within: func(ctx context.Context, c *pgconn.PgConn, r enrol.Result) error {
				if err := catalog.SetMeta(ctx, c, metaCopied, p.site.Name); err != nil {
					return err
				}
				return n.noteCopy(ctx, c, p.site.ID, r)
			},
		}, r, func(pr enrol.Progress) { n.copying(p.site.Name, pr) })
		cerr := r.Close()
		if err != nil {
			return fmt.Errorf("copy from %s: %w", p.site.Name, err)
		}
		if cerr != nil {
			n.log.Debug("close the copy stream", "error", cerr)
		}
		n.log.Info("copied", "database", n.database.Name, "from", p.site.Name, "tables", res.Tables, "rows", res.Rows, "bytes", res.Bytes, "lsn", res.At)
		return nil
	}
	return errors.Join(errs...)
}

// noteCopy writes the copy down as what has been applied of its source and, through it, of the other sites: apply goes on
// from there.
func (n *node) noteCopy(ctx context.Context, c *pgconn.PgConn, source wal.SiteID, r enrol.Result) error {
	// The copy's own row goes by the copying transaction, which its rows carry; the others by numbers that are none.
	const note = `INSERT INTO duri.applied (xid, origin, from_lsn, to_lsn, min_time, max_time, transactions, changes, records, seen)
		VALUES (%s, $1::int2, '0/0', $2::pg_lsn, '-infinity', $3::timestamptz, 0, 0, 0, '0/0')`
	_, err := pg.Query(ctx, c, fmt.Sprintf(note, "pg_catalog.pg_current_xact_id()"), fmt.Sprint(source), r.At.String(), r.Time.String())
	for site, lsn := range r.Applied {
		if err == nil && site != source && site != n.self.ID {
			_, err = pg.Query(ctx, c, fmt.Sprintf(note, fmt.Sprintf("'%d'::xid8", site)), fmt.Sprint(site), lsn.String(), r.Time.String())
		}
	}
	return err
}

func (n *node) copying(from string, p enrol.Progress) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state = fmt.Sprintf("%s: %d rows of %d tables copied from %s", stateJoining, p.Rows, p.Tables, from)
}

// openJournal opens the own journal, rebuilds the local index from it, and makes the capture.
func (n *node) openJournal(ctx context.Context) error {
	j, err := openJournal(n.dir(n.self.Name), n.journalOptions())
	if err != nil {
		return err
	}
	if j == nil {
		return &decode.GapError{
			Slot: Slot(n.database.Name), Reason: "the journal directory " + n.dir(n.self.Name) + " is gone",
			Hint: "put the directory back, or re-join this site (docs/guide/runbook.md)",
		}
	}
	if err := n.openAround(ctx, j); err != nil {
		return errors.Join(err, j.Close())
	}
	return nil
}

// openAround opens what stands around the own journal: the copies of the peers' ones, the index, capture and workers.
func (n *node) openAround(ctx context.Context, j *journal.Journal) (err error) {
	copies := make([]*link.CopyWriter, len(n.peers))
	n.keys = apply.NewKeys(n.cfg.Postgres.DSN, n.database.Name)
	defer func() {
		if err == nil {
			return
		}
		n.keys.Close()
		for _, w := range copies {
			if w != nil {
				err = errors.Join(err, w.Close())
			}
		}
	}()
	if err := n.openPolicies(ctx); err != nil {
		return err
	}
	if err := n.openGaps(ctx); err != nil {
		return err
	}
	for _, p := range n.peers {
		if err := p.loadGhosts(ctx); err != nil {
			return err
		}
	}
	past, err := n.openPast()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && past != nil {
			err = errors.Join(err, past.Close())
		}
	}()
	applied, err := n.progress(ctx)
	if err != nil {
		return err
	}
	for i, p := range n.peers {
		copies[i], err = p.openCopy(ctx, link.CopyConfig{Dir: n.dir(p.site.Name), Journal: n.journalOptions(), Prompt: n.waits(), Logger: p.log}, applied)
		if err != nil {
			return fmt.Errorf("open the copy of %s's journal: %w", p.site.Name, err)
		}
	}
	seen, err := n.lowestSeen(ctx, n.self.ID, copies)
	if err != nil {
		return err
	}
	local := apply.NewHistory(n.self.ID, seen, n.keys)
	if err := n.recall(ctx, past, j, local, seen); err != nil {
		return fmt.Errorf("rebuild the history of local changes: %w", err)
	}
	if err := n.renamed(ctx, j, local); err != nil {
		return fmt.Errorf("find the transactions that were given back: %w", err)
	}
	if err := n.loadBehind(ctx, j); err != nil {
		return err
	}
	mesh, err := n.openMesh(ctx, local, copies)
	if err != nil {
		return err
	}
	if err := n.withSQL(ctx, func(c *pgconn.PgConn) error { return mesh.Parking.Load(ctx, c) }); err != nil {
		return err
	}
	c := &captured{journal: j, local: local, mesh: mesh, opened: time.Now(), past: past}
	c.capture = newCapture(n, j, mesh)
	c.capture.bindOpen()
	if c.capture.foreign, err = n.newestApplied(ctx); err != nil {
		return err
	}
	c.capture.step = func(t *wal.Txn) { n.clockStepped(t) }
	for i, p := range n.peers {
		p.live.Store(&incoming{copies[i], p.newWorker(c, copies[i])})
	}
	n.ready.Store(c)
	return nil
}

// lowestSeen finds how far the next transaction of any other peer will have seen a site, at least; what came later is
// needed in the site's history. The last applied transaction tells, or the positions of a peer that has written nothing
// since. A peer of which nothing is known has seen nothing.
func (n *node) lowestSeen(ctx context.Context, site wal.SiteID, copies []*link.CopyWriter) (wal.LSN, error) {
	applied, err := n.progress(ctx)
	if err != nil {
		return 0, err
	}
	lowest, first := wal.LSN(0), true
	for i, p := range n.peers {
		if p.site.ID == site {
			continue
		}
		lsn, err := n.lastSeen(ctx, p.site.ID, site)
		if err != nil {
			return 0, err
		}
		idle, err := seenIdle(copies[i], positionOf(applied, p.site.ID), site)
		if err != nil {
			return 0, err
		}
		if lsn = max(lsn, idle); first || lsn < lowest {
			lowest, first = lsn, false
		}
	}
	return lowest, nil
}

// lastSeen reads what the last applied transaction of a peer had seen of a site; the last before any that waits for locks.
func (n *node) lastSeen(ctx context.Context, peer, site wal.SiteID) (lsn wal.LSN, err error) {
	column := "seen::text"
	if site != n.self.ID {
		column = fmt.Sprintf("coalesce(seen_others->>'%d', '0/0')", site)
	}
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Query(ctx, c, "SELECT "+column+` FROM duri.applied WHERE origin = $1::int2
			AND to_lsn <= coalesce((SELECT min(lsn) FROM duri.held WHERE origin = $1::int2), 'FFFFFFFF/FFFFFFFF') ORDER BY to_lsn DESC LIMIT 1`, fmt.Sprint(peer))
		if err == nil && len(rows) > 0 {
			lsn, err = wal.ParseLSN(rows[0][0])
		}
		return err
	})
	return lsn, err
}

// newestApplied is the greatest commit time that rows applied here carry; zero when nothing was applied.
func (n *node) newestApplied(ctx context.Context) (newest wal.Time, err error) {
	err = n.withSQL(ctx, func(c *pgconn.PgConn) error {
		rows, err := pg.Rows(ctx, c, "SELECT (extract(epoch from coalesce(max(max_time), '2000-01-01 00:00:00+00')) * 1000000)::int8 - 946684800000000 FROM duri.applied")
		if err != nil {
			return fmt.Errorf("find the newest applied transaction: %w", err)
		}
		micros, err := strconv.ParseInt(rows[0][0], 10, 64)
		newest = wal.Time(micros)
		return err
	})
	return newest, err
}

// openMesh makes the peers' histories, with three sites and more, and fills them from the copies of their journals as far
// as those reach.
func (n *node) openMesh(ctx context.Context, local *apply.History, copies []*link.CopyWriter) (*apply.Mesh, error) {
	byID := map[wal.SiteID]*link.CopyWriter{}
	for i, p := range n.peers {
		byID[p.site.ID] = copies[i]
	}
	open := func(site wal.SiteID, from wal.LSN) (apply.Reader, error) {
		r, err := readCopy(byID[site], from)
		if err != nil {
			return nil, err
		}
		return r, nil
	}
	applied, err := n.progress(ctx)
	if err != nil {
		return nil, err
	}
	var histories []*apply.History
	for i, p := range n.peers {
		if len(n.peers) == 1 {
			break
		}
		seen, err := n.lowestSeen(ctx, p.site.ID, copies)
		if err != nil {
			return nil, err
		}
		seen = min(seen, positionOf(applied, p.site.ID))
		h := apply.NewPeerHistory(p.site.ID, seen, n.keys)
		histories = append(histories, h)
		j, err := copies[i].Journal()
		if err != nil {
			continue // nothing was received yet
		}
		if err := rebuild(ctx, j, h, seen); err != nil {
			return nil, fmt.Errorf("rebuild the history of %s's changes: %w", p.site.Name, err)
		}
	}
	return apply.NewMesh(local, open, histories...), nil
}

// seenIdle is what a peer's journal copy had seen of site at its end, provided that it holds no transaction beyond
// applied; zero otherwise.
func seenIdle(w *link.CopyWriter, applied wal.LSN, site wal.SiteID) (wal.LSN, error) {
	j, err := w.Journal()
	if err != nil {
		return 0, nil // nothing was received yet
	}
	r, err := j.NewReader(max(applied, j.Start()))
	if err != nil {
		return 0, err
	}
	r.TrustChain()
	for {
		rec, ok, err := r.TryNext()
		if err != nil || rec.Txn != nil {
			return 0, errors.Join(err, r.Close())
		}
		if !ok {
			return positionOf(j.State().Seen, site), r.Close()
		}
	}
}

// clockStepped makes a backward clock step known (rule 3).
func (n *node) clockStepped(t *wal.Txn) {
	n.mu.Lock()
	news := time.Since(n.stepped) > time.Minute
	n.stepped = time.Now()
	n.mu.Unlock()
	if news {
		n.log.Error("this site's clock stepped back; versions are corrected until it has caught up",
			"database", n.database.Name, "commit_time", t.CommitTime, "version_time", t.VersionTime,
			"hint", "let the clock be disciplined by NTP without steps")
		n.event("clock_step", fmt.Sprintf("the clock stepped back: a commit of %s got the version time %s", t.CommitTime, t.VersionTime))
	}
}

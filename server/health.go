package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/duri-io/duri/durability"
	"github.com/duri-io/duri/internal/pg"
)

// What the keeper knows of PostgreSQL here, of the disk with the journals, and of what decodes and receives.

// health is that of the server, the disk and what decodes and receives here. k.mu is held.
func (k *keeper) health() durability.Server {
	h := k.server
	if !k.diskBusy.IsZero() {
		h.DiskStalled = time.Since(k.diskBusy)
	}
	h.Unable = k.diskFault
	overdue := time.Now().Add(-k.a.cfg.Durability.Detect.Std())
	if h.Down > 0 || k.serverUp.After(overdue) {
		overdue = time.Time{} // it had no chance
	}
	for _, n := range k.a.nodes {
		if n.waits() {
			h.Unable = cmp.Or(h.Unable, n.unable(overdue))
		}
	}
	return h
}

// unfitness says why this site cannot do its part; it goes out with every heartbeat, for what keeps the site from leaving by
// itself: a disk on which it cannot write that down.
func (k *keeper) unfitness() string {
	if k == nil {
		return ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.health().Unfit(k.a.cfg.Durability.Detect.Std())
}

// probeEvery is how often a small durable write looks whether PostgreSQL here can still make one (design: durability,
// "gray failure").
const probeEvery = 250 * time.Millisecond

// suspectServer has the server looked at now: a connection to it has broken. k may be nil.
func (k *keeper) suspectServer() {
	if k != nil {
		wake(k.suspect)
	}
}

// watchServer keeps the health of this site's PostgreSQL.
func (k *keeper) watchServer(ctx context.Context) {
	s := &session{dsn: k.a.cfg.Postgres.DSN, database: k.a.nodes[0].database.Name, settings: map[string]string{
		"application_name": "duri_probe", "synchronous_commit": "local",
	}}
	defer s.close()
	var down time.Time
	for {
		begun := time.Now()
		ended := make(chan struct{})
		go k.watchStall(begun, ended)
		probeCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := s.do(probeCtx, func(c *pgconn.PgConn) error {
			if _, err := pg.Rows(probeCtx, c, "SELECT pg_catalog.pg_logical_emit_message(true, 'duri.probe', '')"); err != nil {
				return err
			}
			return k.endWaiters(probeCtx, c)
		})
		cancel()
		close(ended)
		if ctx.Err() != nil {
			return
		}
		h := durability.Server{}
		if err != nil {
			if down.IsZero() {
				down = begun
			}
			h.Down = max(time.Since(down), time.Nanosecond)
			h.Restarting = pg.SQLState(err) == "57P03"
			h.Refused = errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT)
		} else {
			down = time.Time{}
		}
		k.mu.Lock()
		was := k.server
		if k.server = h; was.Down > 0 {
			k.serverUp = time.Now()
		}
		k.mu.Unlock()
		if (was.Down > 0) != (h.Down > 0) || was.Refused != h.Refused {
			k.log.Warn("health of PostgreSQL here", "down", h.Down.String(), "refused", h.Refused, "restarting", h.Restarting, "error", fmt.Sprint(err))
			k.stir()
		}
		every := probeEvery
		switch {
		case err != nil && was.Down == 0:
			every = 0 // Only a connection has broken: whether there will be another one is to be seen.
		case err != nil:
			every /= 5
		}
		select {
		case <-ctx.Done():
			return
		case <-k.suspect:
		case <-time.After(every):
		}
	}
}

// watchDisk looks whether the disk of data_dir still makes a small write durable.
func (k *keeper) watchDisk(ctx context.Context) {
	content := make([]byte, markBytes)
	path := filepath.Join(k.a.cfg.DataDir, "probe")
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		k.mu.Lock()
		k.diskBusy = time.Now()
		k.mu.Unlock()
		err := probeDisk(path, content)
		k.mu.Lock()
		k.diskBusy, k.diskFault = time.Time{}, ""
		if err != nil {
			k.diskFault = err.Error()
		}
		k.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// probeDisk writes to a file in place: that it is full does not matter, and shows at the journals.
func probeDisk(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// waitersSQL ends the sessions of clients whose COMMIT waits for other sites.
const waitersSQL = `SELECT pid, pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity

WHERE backend_type = 'client backend' AND wait_event = 'SyncRep' AND pid <> pg_catalog.pg_backend_pid()`

// endWaiters ends, at a site that was left out, the sessions whose COMMIT waits: it will not be acknowledged here, the door
// has ended their connections, which a waiting session does not notice, and the rows that they keep locked are needed to
// catch up. Their transactions are committed, and go to the other sites as the site's tail.
func (k *keeper) endWaiters(ctx context.Context, c *pgconn.PgConn) error {
	k.mu.Lock()
	out := !k.began.IsZero() && !k.doubt && !k.reg.Has(k.a.self.Name)
	k.mu.Unlock()
	if !out {
		return nil
	}
	rows, err := pg.Rows(ctx, c, waitersSQL)
	if pg.SQLState(err) == "42501" { // of a superuser, whom only a superuser may end
		k.fail("end sessions whose commits wait", err)
		return nil
	}
	if err == nil && len(rows) > 0 {
		k.log.Warn("sessions were ended whose commits waited for other sites", "sessions", len(rows))
	}
	return err
}

// watchStall counts for how long a probe has not ended.
func (k *keeper) watchStall(begun time.Time, ended <-chan struct{}) {
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	for {
		select {
		case <-ended:
			k.mu.Lock()
			k.server.Stalled = 0
			k.mu.Unlock()
			return
		case <-t.C:
			k.mu.Lock()
			k.server.Stalled = time.Since(begun)
			k.mu.Unlock()
		}
	}
}

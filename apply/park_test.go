package apply

import (
	"context"
	"testing"
	"time"

	"github.com/duri-io/duri/wal"
)

const parkSchema = `
CREATE TABLE t (id int PRIMARY KEY, v text, u int UNIQUE, w int UNIQUE);
CREATE TABLE p (id int PRIMARY KEY, u text, active bool);
CREATE UNIQUE INDEX p_active ON p (lower(u)) WHERE active;
CREATE TABLE r (id int PRIMARY KEY, span int4range, EXCLUDE USING gist (span WITH &&));`

// startUnparker runs a site's Unparker, as its agent does.
func (s *site) startUnparker() {
	names := map[wal.SiteID]string{s.id: RepairOriginName(s.db, s.name)}
	for _, p := range s.peers {
		names[p.id] = RepairOriginName(s.db, p.name)
	}
	cfg := s.worker.cfg
	cfg.Origin = 0
	u := NewUnparker(cfg, func(id wal.SiteID) string { return names[id] })
	stop := s.loop(u.Run)
	stopApply := s.stopApply
	s.stopApply = func() { stop(); stopApply() }
}

func newParkRig(t *testing.T, n int) []*site {
	sites := newMeshRig(t, n, parkSchema, rigOptions{asRole: true})
	for _, s := range sites {
		s.startUnparker()
	}
	return sites
}

// agree waits until every site shows rows and keeps hidden ones parked.
func agree(t *testing.T, sites []*site, table, rows, parked string) {
	t.Helper()
	settle(sites...)
	for _, s := range sites {
		var got, hidden string
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		for {
			got = s.rows("SELECT * FROM " + table + " ORDER BY 1")
			hidden = s.rows("SELECT key->>'id', site, row->>'v' FROM duri.parked ORDER BY 1")
			if got == rows && hidden == parked || pause(ctx, 10*time.Millisecond) != nil {
				break
			}
		}
		cancel()
		if got != rows || hidden != parked {
			t.Errorf("site %s: rows\n%swant\n%sparked\n%swant\n%s%v", s.name, got, rows, hidden, parked, s.problem())
		}
	}
}

func TestUniqueValuesAreParkedAndComeBack(t *testing.T) {
	sites := newParkRig(t, 3)
	a, b := sites[0], sites[1]
	for _, s := range sites {
		for _, to := range s.peers {
			s.feed.hold(to.id)
		}
	}
	release := func() {
		for _, s := range sites {
			for _, to := range s.peers {
				s.feed.release(to.id)
			}
		}
	}
	a.exec("INSERT INTO t VALUES (1, 'a', 5, NULL)")
	b.exec("INSERT INTO t VALUES (2, 'b', 5, NULL)")
	release()
	agree(t, sites, "t", "2|b|5|\\N\n", "1|1|a\n")
	b.exec("UPDATE t SET u = 6 WHERE id = 2") // S19
	agree(t, sites, "t", "1|a|5|\\N\n2|b|6|\\N\n", "")
	a.exec("INSERT INTO t VALUES (3, 'c', 7, 8)")
	agree(t, sites, "t", "1|a|5|\\N\n2|b|6|\\N\n3|c|7|8\n", "")
}

// TestTruncateRemovesParkedRowsToo: a parked row is older than the TRUNCATE, at whichever site that was made, and must not
// come back when nothing hides it any more (rules 11 and 15).
func TestTruncateRemovesParkedRowsToo(t *testing.T) {
	for _, by := range []int{0, 1, 2} { // the parked row's site, the other one's, a third
		t.Run(string(rune('a'+by)), func(t *testing.T) {
			sites := newParkRig(t, 3)
			holdAll(sites)
			sites[0].exec("INSERT INTO t VALUES (1, 'a', 5, NULL)")
			sites[1].exec("INSERT INTO t VALUES (2, 'b', 5, NULL)")
			releaseAll(sites)
			agree(t, sites, "t", "2|b|5|\\N\n", "1|1|a\n")
			sites[by].exec("TRUNCATE t")
			agree(t, sites, "t", "", "")
			sites[by].exec("INSERT INTO t VALUES (3, 'c', 5, NULL)")
			agree(t, sites, "t", "3|c|5|\\N\n", "")
		})
	}
}

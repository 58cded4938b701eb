package apply

import (
	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// held is what this site holds for a key, locked for the rest of the apply transaction.
type held struct {
	conflict.State
	image wal.Tuple // in the relation's column order; nil unless Live
	// end is the commit position, at this site, of the local transaction that made the state; zero when an origin
	// made it or when every peer has seen it.
	end wal.LSN
}

// verdict is what becomes of one key.
type verdict struct {
	live    bool      // the key ends with a row
	row     wal.Tuple // its image; may hold Unchanged only where the row that is there keeps its value
	changed bool      // something is to be written
	records []outcome
}

// outcome is one change that did not simply apply (rule 16, archive.md section 3).
type outcome struct {
	ref      *ref
	decision conflict.Decision
	rival    held // what the change met
}

// fetcher completes a row whose unchanged out-of-line values did not arrive (rule 9). It returns the origin's present
// row, or ok false when the origin has the row no more; then a later change in the stream will say so.
type fetcher func(r *ref) (row wal.Tuple, ok bool, err error)

// judge runs a key's changes, in order, against what is held. site is this site: the origin's transactions say how
// much of it they had seen.
func judge(chain []*ref, h held, site wal.SiteID, fetch fetcher) (verdict, error) {
	var v verdict
	wasLive := h.Existence == conflict.Live
	for _, r := range chain {
		s := h.State
		if h.end != 0 {
			s.Seen = h.end <= r.txn.SeenOf(site)
		}
		d := conflict.Decide(r.op, r.txn.Version(), s)
		rival := h
		if d.Apply {
			next, code, err := succeed(r, h, d, fetch)
			if err != nil {
				return v, err
			}
			if code != conflict.AsSent && d.Code == conflict.AsSent {
				d.Code = code
			}
			if code != conflict.Superseded {
				h, v.changed = next, true
			}
		}
		if d.Kind != conflict.None || d.Code != conflict.AsSent {
			v.records = append(v.records, outcome{r, d, rival})
		}
	}
	v.live = h.Existence == conflict.Live
	v.row = h.image
	v.changed = v.changed && (v.live || wasLive)
	return v, nil
}

// succeed gives the state after an incoming change that wins, and how it was completed.
func succeed(r *ref, h held, d conflict.Decision, fetch fetcher) (held, conflict.Code, error) {
	next := held{State: conflict.State{Version: r.txn.Version()}}
	if r.op == wal.Delete {
		next.Existence = conflict.Deleted
		return next, conflict.AsSent, nil
	}
	next.Existence = conflict.Live
	next.image = r.row
	if r.row.Complete() {
		return next, conflict.AsSent, nil
	}
	if d.Kind == conflict.None && h.image != nil {
		// No rival: what stands here is what the origin had before this change.
		next.image = fill(r.row, h.image)
		return next, conflict.AsSent, nil
	}
	if r.old != nil {
		next.image = fill(r.row, r.old)
		return next, conflict.AsSent, nil
	}
	row, ok, err := fetch(r)
	if err != nil {
		return h, "", err
	}
	if !ok { // gone at the origin: what removed it has a greater version and is on its way
		return h, conflict.Superseded, nil
	}
	next.image = fill(r.row, row)
	return next, conflict.Filled, nil
}

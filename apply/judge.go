package apply

import (
	"math"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// held is what this site holds for a key, locked for the rest of the apply transaction.
type held struct {
	conflict.State
	image wal.Tuple // in the relation's column order; nil unless Live
	// end is where, at its site, the transaction ends that made the state; zero when the incoming origin made it or when
	// every site has seen it.
	end  wal.LSN
	seen []wal.Seen // of other sites, by that transaction
	// third: a site wrote the row that is neither this one nor the incoming one; xid is the transaction that did.
	third bool
	xmin  uint32 // of the row
	// behind: the incoming transaction had seen what has not been applied here yet.
	behind bool
}

// ownRow is held.end of a row that the present apply transaction has written itself.
const ownRow = wal.LSN(math.MaxUint64)

// verdict is what becomes of one key.
type verdict struct {
	live    bool      // the key ends with a row
	row     wal.Tuple // its image; may hold Unchanged only where the row that is there keeps its value
	changed bool      // something is to be written
	records []outcome
	state   held // the key's state in the end
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

// merging is what judging a key takes besides its changes and its state.
type merging struct {
	fetch   fetcher
	blend   *blend                     // see target
	touched func(*ref) map[string]bool // with a blend in column mode: columns that greater versions have written
}

// judge runs a key's changes, in order, against what is held.
func judge(chain []*ref, h held, m merging) (verdict, error) {
	var v verdict
	wasLive := h.Existence == conflict.Live
	var known wal.Tuple // the origin's image after the changes so far, as far as they tell
	for i, r := range chain {
		row := imageAfter(chain, i, known)
		known = row
		d := conflict.Decide(r.op, r.txn.Version(), h.toward(r))
		rival := h
		if m.blend != nil && r.op == wal.Update && h.Existence == conflict.Live {
			var changed bool
			var err error
			if h, d, changed, err = blendOne(m.blend, r, h, d, m.touched); err != nil {
				return v, err
			}
			v.changed = v.changed || changed
		} else if d.Apply {
			next, code, err := succeed(r, row, h, d, m.fetch)
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
	v.state = h
	v.live = h.Existence == conflict.Live
	v.row = h.image
	v.changed = v.changed && (v.live || wasLive)
	return v, nil
}

// imageAfter is the origin's image after change i of a chain, as far as that and the image known before it tell.
func imageAfter(chain []*ref, i int, known wal.Tuple) wal.Tuple {
	if r := chain[i]; r.op == wal.Update && !r.blind && i > 0 && r.follows(chain[i-1]) {
		return fill(r.row, known)
	}
	return chain[i].row
}

// image is the origin's image after a chain, nil when that ends with a delete.
func image(chain []*ref) (row wal.Tuple) {
	for i := range chain {
		row = imageAfter(chain, i, row)
	}
	return row
}

// undisputed reports that what is held is what the origin had before a change of r's transaction.
func undisputed(r *ref, h held) bool {
	d := conflict.Decide(wal.Delete, r.txn.Version(), h.toward(r))
	return d.Apply && d.Kind == conflict.None
}

// toward is the state as the incoming transaction of r meets it.
func (h held) toward(r *ref) conflict.State {
	s := h.State
	s.Behind = h.behind
	if h.Version.Site == r.txn.Origin && h.end > r.txn.EndLSN && h.end != ownRow {
		s.Version.Site, s.Saw = 0, true // of the same site, and newer: r's transaction is given back
		return s
	}
	if h.end != 0 {
		s.Seen = h.end <= r.txn.SeenOf(s.Version.Site)
		s.Saw = wal.SeenOf(h.seen, r.txn.Origin) >= r.txn.EndLSN
	}
	return s
}

// succeed gives the state after an incoming change that wins, and how it was completed. row is the change's image.
func succeed(r *ref, row wal.Tuple, h held, d conflict.Decision, fetch fetcher) (held, conflict.Code, error) {
	next := held{State: conflict.State{Version: r.txn.Version()}}
	if r.op == wal.Delete {
		next.Existence = conflict.Deleted
		return next, conflict.AsSent, nil
	}
	next.Existence = conflict.Live
	next.image = row
	if row.Complete() {
		return next, conflict.AsSent, nil
	}
	// No rival: what stands here is what the origin had before this change. An insert lacks values only when it is one
	// half of a key change; what stands under its key is then another row.
	if r.op == wal.Update && !r.blind && d.Kind == conflict.None && h.image != nil {
		next.image = fill(row, h.image)
		return next, conflict.AsSent, nil
	}
	whole, ok, err := fetch(r)
	if err != nil {
		return h, "", err
	}
	if !ok { // gone at the origin: what removed it has a greater version and is on its way
		return h, conflict.Superseded, nil
	}
	next.image = fill(row, whole)
	return next, conflict.Filled, nil
}

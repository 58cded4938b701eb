package verify

import (
	"cmp"
	"slices"
)

// cell is what one side holds of a row; zero is nothing.
type cell struct {
	hash   string
	copies int64
	stamp  string
}

func cellOf(r Row) cell { return cell{r.Hash, r.Copies, r.Stamp} }

// observation is a row at both sides, at about the same time.
type observation struct{ a, b cell }

// equal says that both sides hold the same values, whichever transactions wrote them.
func (o observation) equal() bool { return o.a.hash == o.b.hash && o.a.copies == o.b.copies }

// suspect is a row that differed. It is looked at again after each settling:
//
//	differs -> equal                      in flight, done
//	        -> as before                  stable
//	        -> differs in another way     still being written
//
// Settling waits until both sites have applied what the other had committed by then. So a row that is unchanged at
// both sites over one settling, and still differs, is not in flight: nothing that could make it equal is on its way.
// A real difference is therefore stable; a row that clients keep writing is not.
type suspect struct {
	key    Key    // nil without key
	hash   string // of the row, without key: what it is found by
	last   observation
	stable int // settlings that it was unchanged over, the last ones in a row
	done   bool
	real   bool
}

// stableEnough is how many settlings decide. One is not enough: a row that one side lacks at both looks may have arrived
// and been deleted again in between; that delete then is on its way, and the second settling brings it. (Whether a row
// that is there was written in between, with the same values perhaps, its stamp tells.)
const stableEnough = 2

// see takes the next observation.
func (s *suspect) see(o observation) {
	switch {
	case o.equal():
		s.done, s.stable = true, 0
	case o == s.last:
		if s.stable++; s.stable >= stableEnough {
			s.done, s.real = true, true
		}
	default:
		s.stable = 0
	}
	s.last = o
}

// conclude decides what so many rounds left open.
func (s *suspect) conclude(rounds int) {
	s.real = s.real || !s.done && s.stable >= min(stableEnough, rounds)
}

// id is what identifies the row.
func (s *suspect) id() string {
	if s.key != nil {
		return s.key.id()
	}
	return s.hash
}

// difference reports a real one, without images.
func (s *suspect) difference() Difference {
	d := Difference{Kind: Differs, Key: s.key, CopiesA: s.last.a.copies, CopiesB: s.last.b.copies, seen: s.last, hash: s.hash}
	switch {
	case d.CopiesA < d.CopiesB:
		d.Kind = MissingAtA
	case d.CopiesA > d.CopiesB:
		d.Kind = MissingAtB
	}
	return d
}

// idOf is the id of a row.
func idOf(r Row) string {
	if r.Key != nil {
		return r.Key.id()
	}
	return r.Hash
}

// compareRows gives the rows that differ, in order of their ids.
func compareRows(a, b []Row) []*suspect {
	seen := map[string]*suspect{}
	add := func(rows []Row, put func(*observation, cell)) {
		for _, r := range rows {
			s := seen[idOf(r)]
			if s == nil {
				s = &suspect{key: r.Key, hash: r.Hash}
				seen[idOf(r)] = s
			}
			put(&s.last, cellOf(r))
		}
	}
	add(a, func(o *observation, c cell) { o.a = c })
	add(b, func(o *observation, c cell) { o.b = c })
	var differ []*suspect
	for _, s := range seen {
		if !s.last.equal() {
			differ = append(differ, s)
		}
	}
	sortSuspects(differ)
	return differ
}

// sortSuspects sorts by key: shorter numbers first, as people expect, without knowing types.
func sortSuspects(all []*suspect) {
	slices.SortFunc(all, func(a, b *suspect) int {
		return cmp.Or(slices.CompareFunc(a.key, b.key, func(x, y string) int {
			return cmp.Or(cmp.Compare(len(x), len(y)), cmp.Compare(x, y))
		}), cmp.Compare(a.hash, b.hash))
	})
}

// observations joins what both sides hold of the suspects, by id.
func observations(a, b []Row) map[string]observation {
	out := map[string]observation{}
	for _, r := range a {
		o := out[idOf(r)]
		o.a = cellOf(r)
		out[idOf(r)] = o
	}
	for _, r := range b {
		o := out[idOf(r)]
		o.b = cellOf(r)
		out[idOf(r)] = o
	}
	return out
}

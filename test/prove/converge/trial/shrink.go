package trial

import "slices"

// Shrink looks for a shorter script that still fails: with fewer operations, fewer faults, fewer kinds of statements, by
// halving. fails runs a script and says whether it failed; it decides how often to try one, as a failure need not come
// each time. budget bounds the calls.
func Shrink(s Script, budget int, fails func(Script) bool) Script {
	for smaller := true; smaller && budget > 0; {
		smaller = false
		for _, c := range candidates(s) {
			if budget--; budget < 0 {
				return s
			}
			if fails(c) {
				s, smaller = c, true
				break
			}
		}
	}
	return s
}

// minOps is how few operations a script is shrunk to.
const minOps = 200

// candidates are the scripts one step shorter.
func candidates(s Script) []Script {
	var all []Script
	if s.Ops/2 >= minOps {
		c := s
		c.Ops /= 2
		c.Faults = slices.Clone(s.Faults)
		for i := range c.Faults {
			c.Faults[i].At /= 2
		}
		all = append(all, c)
	}
	for _, part := range halves(s.Faults) {
		c := s
		c.Faults = part
		all = append(all, c)
	}
	for _, part := range halves(s.Atoms) {
		if len(part) > 0 {
			c := s
			c.Atoms = part
			all = append(all, c)
		}
	}
	if slices.ContainsFunc(s.Clocks, func(ms int) bool { return ms != 0 }) {
		c := s
		c.Clocks = make([]int, s.Sites)
		all = append(all, c)
	}
	return all
}

// halves are the two halves of a list; of one element, the empty list.
func halves[T any](list []T) [][]T {
	n := len(list)
	switch n {
	case 0:
		return nil
	case 1:
		return [][]T{nil}
	}
	return [][]T{slices.Clone(list[:n/2]), slices.Clone(list[n/2:])}
}

package trial

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Script is what a run does. All of it follows from the seed and the sizes (NewScript), or is read from JSON.
type Script struct {
	Seed     uint64 `json:"seed"`
	Sites    int    `json:"sites"`
	Ops      int    `json:"ops"`      // the load ends when so many row changes are committed
	Keys     int    `json:"keys"`     // of each table with a key
	Sessions int    `json:"sessions"` // at each site
	Rate     int    `json:"rate"`     // most row changes a second at all sites; 0: what the clients can do
	// Atoms are the kinds of statements that the clients draw from.
	Atoms []string `json:"atoms"`
	// Clocks are the sites' offsets in milliseconds at the beginning.
	Clocks []int   `json:"clocks_ms"`
	Faults []Fault `json:"faults"`
}

// Fault is something that happens to the system, and ends.
type Fault struct {
	At   int    `json:"at"` // when so many row changes are committed
	Kind string `json:"kind"`
	Site int    `json:"site"`           // number of the site, from 0
	Peer int    `json:"peer,omitempty"` // of the other end of a link
	// For is how long it lasts in milliseconds; Value is a clock's new offset, or how much slower a link is.
	For   int `json:"for_ms,omitempty"`
	Value int `json:"value_ms,omitempty"`
}

// Kinds of faults.
const (
	killAgent  = "kill-agent"
	stopAgent  = "stop-agent" // SIGSTOP, then SIGCONT
	killServer = "kill-server"
	stopServer = "stop-server"
	cutLink    = "cut"     // nothing passes between two sites
	oneWay     = "one-way" // of the connection by which a site reads another one's journal, one direction is cut
	slowLink   = "slow"
	resetLink  = "reset"
	stepClock  = "clock"
)

// String is the fault in words.
func (f Fault) String() string {
	a := names(maxSites)
	at := fmt.Sprintf("at %d: %s %s", f.At, f.Kind, a[f.Site])
	switch f.Kind {
	case cutLink, resetLink, oneWay:
		at += "-" + a[f.Peer]
	case slowLink:
		at += fmt.Sprintf("-%s by %d ms", a[f.Peer], f.Value)
	case stepClock:
		at += fmt.Sprintf(" to %+d ms", f.Value)
	}
	if f.For > 0 {
		at += fmt.Sprintf(" for %d ms", f.For)
	}
	return at
}

const maxSites = 8

// Sizes are what a script is made from besides the seed.
type Sizes struct {
	Sites, Ops, Keys, Sessions, Faults, Rate int
	Skew                                     time.Duration // greatest offset of a clock, ahead or behind; 0: all clocks are right
}

// NewScript makes the script of a seed.
func NewScript(seed uint64, z Sizes) Script {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := Script{Seed: seed, Sites: z.Sites, Ops: z.Ops, Keys: z.Keys, Sessions: z.Sessions, Rate: z.Rate, Atoms: Atoms(), Clocks: make([]int, z.Sites)}
	skew := int(z.Skew.Milliseconds())
	for i := range s.Clocks {
		s.Clocks[i] = offset(rng, skew)
	}
	for i := range z.Faults {
		f := newFault(rng, z.Sites, skew)
		f.At = z.Ops * (2*i + 1 + rng.IntN(2)) / (2 * (z.Faults + 1))
		s.Faults = append(s.Faults, f)
	}
	return s
}

// offset draws a clock's offset.
func offset(rng *rand.Rand, skew int) int {
	if skew == 0 {
		return 0
	}
	return rng.IntN(2*skew+1) - skew
}

// newFault draws a fault. Those that need no pause are short, so that the load goes on.
func newFault(rng *rand.Rand, sites, skew int) Fault {
	kinds := []string{
		killAgent, killAgent, killAgent, stopAgent, stopAgent, killServer, killServer, stopServer,
		cutLink, cutLink, cutLink, oneWay, oneWay, slowLink, slowLink, resetLink, stepClock, stepClock, stepClock,
	}
	if skew == 0 {
		kinds = slices.DeleteFunc(kinds, func(k string) bool { return k == stepClock })
	}
	f := Fault{Kind: kinds[rng.IntN(len(kinds))], Site: rng.IntN(sites)}
	f.Peer = (f.Site + 1 + rng.IntN(sites-1)) % sites
	switch f.Kind {
	case stepClock:
		f.Value = offset(rng, skew)
	case slowLink:
		f.Value, f.For = 5+rng.IntN(100), 500+rng.IntN(4000)
	case killServer, killAgent:
		f.For = rng.IntN(1500)
	case resetLink:
	default:
		f.For = 200 + rng.IntN(3500)
	}
	return f
}

// check says what is wrong with a script.
func (s Script) check() error {
	switch {
	case s.Sites < 2 || s.Sites > maxSites:
		return fmt.Errorf("script: %d sites; between 2 and %d are supported", s.Sites, maxSites)
	case s.Ops < 1 || s.Keys < 2 || s.Sessions < 1:
		return fmt.Errorf("script: %d operations on %d keys by %d sessions; at least 1, 2 and 1 are needed", s.Ops, s.Keys, s.Sessions)
	case len(s.Clocks) != s.Sites:
		return fmt.Errorf("script: %d clocks for %d sites", len(s.Clocks), s.Sites)
	case len(s.Atoms) == 0:
		return fmt.Errorf("script: no atoms; there are %s", strings.Join(Atoms(), ", "))
	}
	for _, a := range s.Atoms {
		if !slices.Contains(Atoms(), a) {
			return fmt.Errorf("script: unknown atom %q; there are %s", a, strings.Join(Atoms(), ", "))
		}
	}
	for _, f := range s.Faults {
		if f.Site < 0 || f.Peer < 0 || f.Site >= s.Sites || f.Peer >= s.Sites {
			return fmt.Errorf("script: fault %q is of a site that does not exist", f.Kind)
		}
	}
	return nil
}

// JSON is the script as -script reads it.
func (s Script) JSON() string {
	b, _ := json.Marshal(s) // numbers and strings always marshal
	return string(b)
}

// ParseScript reads what JSON wrote.
func ParseScript(b []byte) (Script, error) {
	var s Script
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("read script: %w", err)
	}
	return s, s.check()
}

package durability

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Policy is what happens when sites lose each other.
type Policy string

// The policies (design: durability, section 5). Availability first needs no register, so it is none of them.
const (
	DurabilityFirst Policy = "durability-first"   // the register decides who goes on
	PreferredSite   Policy = "preferred-site"     // only the named site may go on alone
	ReadOnly        Policy = "read-only-on-doubt" // nobody goes on alone without a person
)

const (
	// restartPatience is how long a server that says that it is starting up is waited for.
	restartPatience = 2 * time.Second
	// preferenceDelay is how long other sites let the preferred one ask first.
	preferenceDelay = 500 * time.Millisecond
)

// Peer is another site as seen from here. Durations are by this site's own monotonic clock; they decide when to ask, never
// who may write.
type Peer struct {
	Name string
	// Silent is how long ago the last sign of life came, or since when one is waited for.
	Silent time.Duration
	// Deaf is how long ago, by its own word, it last heard this site: a link that is cut in one direction counts at both
	// ends.
	Deaf time.Duration
	// Unfit is why it cannot do its part, by its own word; empty: it can.
	Unfit string
	// Refused: its agent's address refuses connections, so its process has ended (or something rejects for it, which is
	// safe all the same).
	Refused bool
	// CaughtUp: it is no member, its durable position of every database is as good as this site's own, as is what this site
	// has of its, and it has what this one has of the other sites that are left out.
	CaughtUp bool
	// Stable is since when the link to it has been up.
	Stable time.Duration
	// Passed: it has fsynced everything that this site acknowledged without it.
	Passed bool
	// Frozen and Armed are what it says, in the present epoch: sites that it gives no receipts and counts none of, and those
	// that it waits for as they come back, having Passed there. It keeps to both until it knows a greater epoch.
	Frozen, Armed []string
	// Ghosts are its transactions that do not count, as a client was told, and that it has not reversed. It reverses them only while
	// it is no member.
	Ghosts int
}

// Server is the health of this site's own PostgreSQL and journals.
type Server struct {
	Down        time.Duration // since when it cannot be connected to; 0: it can
	Refused     bool          // connections are refused: the process has ended
	Restarting  bool          // it answers that it is starting up
	Stalled     time.Duration // since when a small durable write has not ended; 0: they do
	DiskStalled time.Duration // the same of the disk with the journals, on which promises are written as well
	// Unable is why this site cannot decode its own changes or receive those of another one, on its own side: a copy that
	// failed, a disk that is full, a budget that is used up. Empty: it can.
	Unable string
}

// View is all that Decide takes into account.
type View struct {
	Self      string
	Known     bool // the register was read since this agent began, and its answer to the last change is known
	Open      bool // every database whose commits wait takes part; before, nobody can be heard
	Epoch     uint64
	Members   []string
	Settled   bool
	Exchanged bool // the register is not settled, and may be: see the function of this name, for all databases
	Required  int  // receipts
	Policy    Policy
	Preferred string
	Detect    time.Duration
	Server    Server
	Peers     []Peer
	Frozen    []string // sites that get no receipts from here
	FrozenFor time.Duration
	Arming    []string      // sites that reports wait for already
	Rearm     time.Duration // how long a link must have been stable before a site is taken back
}

// Kind is what to do.
type Kind string

// What Decide can ask for. The zero value is to do nothing.
const (
	Nothing  Kind = ""
	Read     Kind = "read"      // the register, linearizably
	Freeze   Kind = "freeze"    // give the sites no receipt any more, count none of theirs
	Thaw     Kind = "thaw"      // end that
	TakeOver Kind = "take over" // propose the members without the sites
	Leave    Kind = "leave"     // propose the members without this site
	Arm      Kind = "arm"       // let reports wait for the sites as well
	Disarm   Kind = "disarm"    // end that
	Return   Kind = "return"    // propose the members with the site
	Settle   Kind = "settle"    // propose the same members as settled
	Renew    Kind = "renew"     // propose the same value in the next epoch, which ends all promises
	Await    Kind = "await"     // that another member sees it likewise
	Blocked  Kind = "blocked"   // something should be done that the rules do not allow
)

// Action is what to do, with whom, and why.
type Action struct {
	Kind  Kind
	Sites []string
	Why   string
	Epoch uint64 // in which it was decided, and is to be done
}

func do(kind Kind, sites []string, why string) Action {
	return Action{Kind: kind, Sites: sites, Why: why}
}

// Decide says what this site should do next. It is called again whenever something has changed, and several times a
// second.
func Decide(v View) Action {
	a := decide(v)
	a.Epoch = v.Epoch
	return a
}

func decide(v View) Action {
	if !v.Known {
		return Action{Kind: Read, Why: "the register has not been read"}
	}
	if !slices.Contains(v.Members, v.Self) {
		return Action{}
	}
	others := slices.DeleteFunc(slices.Clone(v.Members), func(s string) bool { return s == v.Self })
	if why := v.Server.Unfit(v.Detect); why != "" && len(others) > 0 {
		if v.Server.DiskStalled > v.Detect {
			return do(Blocked, others, why+", so that not even a promise can be written: the others are told to go on without this site")
		}
		if !v.Settled {
			return do(Blocked, others, why+"; the last take-over is not settled, so it cannot leave")
		}
		// Only to somebody who is there; else whoever is back first goes on.
		if slices.ContainsFunc(others, func(s string) bool { return v.gone(s) == "" }) {
			return do(Leave, []string{v.Self}, why)
		}
		return do(Blocked, others, why+", and no other member is there")
	}
	if !v.Open {
		return Action{}
	}
	if a := v.lose(others); a.Kind != Nothing {
		return a
	}
	if !v.Settled { // until then nobody can be left out, nor come back
		if v.Exchanged {
			return do(Settle, nil, "the members hold what they and the sites that are left out acknowledged")
		}
		return Action{}
	}
	return v.rejoin(others)
}

// Unfit says why this site cannot do its part; empty: it can. detect is how long something may be silent.
func (s Server) Unfit(detect time.Duration) string {
	switch {
	case s.DiskStalled > detect:
		return fmt.Sprintf("a small durable write to the journals' disk here has not ended for %s", s.DiskStalled.Round(100*time.Millisecond))
	case s.Restarting && s.Down < restartPatience:
		return ""
	case s.Refused:
		return "PostgreSQL here has ended"
	case s.Down > detect:
		return fmt.Sprintf("PostgreSQL here cannot be reached for %s", s.Down.Round(100*time.Millisecond))
	case s.Stalled > detect:
		return fmt.Sprintf("a small durable write here has not ended for %s", s.Stalled.Round(100*time.Millisecond))
	case s.Unable != "":
		return "this site cannot do its part: " + s.Unable
	}
	return ""
}

// lose deals with members that are gone.
func (v View) lose(others []string) Action {
	var gone, frozen, whys []string
	for _, name := range others {
		why := v.gone(name)
		if why == "" {
			if slices.Contains(v.Frozen, name) {
				frozen = append(frozen, name)
			}
			continue
		}
		gone, whys = append(gone, name), append(whys, why)
	}
	if len(frozen) > 0 {
		if len(v.Members) > 2 { // another member may have relied on it, and its proposal be under way
			return do(Renew, frozen, "heard again")
		}
		return do(Thaw, frozen, "heard again")
	}
	why := strings.Join(whys, "; ")
	fresh := slices.DeleteFunc(slices.Clone(gone), func(s string) bool { return slices.Contains(v.Frozen, s) })
	limit := min(v.Required, len(v.Members)-1)
	switch {
	case len(gone) == 0:
		return Action{}
	case len(fresh) > 0:
		return do(Freeze, fresh, why)
	case v.Policy == ReadOnly, v.Policy == PreferredSite && v.Preferred != v.Self:
		return do(Blocked, gone, why+fmt.Sprintf("; policy %s leaves it to a person", v.Policy))
	case !v.Settled:
		return do(Blocked, gone, why+"; the last take-over is not settled")
	case len(gone) > limit:
		return do(Blocked, gone, why+fmt.Sprintf("; with %d of %d members gone, what they acknowledged may be nowhere else", len(gone), len(v.Members)))
	case v.Preferred != "" && v.Preferred != v.Self && !slices.Contains(gone, v.Preferred) && v.FrozenFor < preferenceDelay:
		return Action{} // it asks first
	case v.disagree(others, gone) != "":
		return do(Await, gone, why+"; "+v.disagree(others, gone)+" has not given up on it, and must have too")
	}
	return do(TakeOver, gone, why)
}

// disagree names a member that would remain and has not frozen all that are gone; empty: there is none.
func (v View) disagree(others, gone []string) string {
	for _, name := range others {
		if !slices.Contains(gone, name) && !v.says(name, gone, func(p Peer) []string { return p.Frozen }) {
			return name
		}
	}
	return ""
}

// says reports whether a site says something of all the others that are named.
func (v View) says(name string, sites []string, what func(Peer) []string) bool {
	i := slices.IndexFunc(v.Peers, func(p Peer) bool { return p.Name == name })
	return i >= 0 && !slices.ContainsFunc(sites, func(s string) bool { return !slices.Contains(what(v.Peers[i]), s) })
}

// gone says why a site counts as lost.
func (v View) gone(name string) string {
	i := slices.IndexFunc(v.Peers, func(p Peer) bool { return p.Name == name })
	if i < 0 {
		return ""
	}
	switch p := v.Peers[i]; {
	case p.Refused:
		return fmt.Sprintf("the agent of %s refuses connections", name)
	case p.Unfit != "":
		return fmt.Sprintf("%s says of itself: %s", name, p.Unfit)
	case p.Ghosts > 0:
		return fmt.Sprintf("%d transactions of %s do not count, and have to be reversed there", p.Ghosts, name)
	case p.Silent > v.Detect:
		return fmt.Sprintf("%s is silent for %s", name, p.Silent.Round(100*time.Millisecond))
	case p.Deaf > v.Detect:
		return fmt.Sprintf("%s has not heard this site for %s", name, p.Deaf.Round(100*time.Millisecond))
	}
	return ""
}

// rejoin brings sites back that are no members: when all members wait for it already, and it has what each of them
// acknowledged before.
func (v View) rejoin(others []string) Action {
	for _, p := range v.Peers {
		if slices.Contains(v.Members, p.Name) {
			continue
		}
		armed := slices.Contains(v.Arming, p.Name)
		switch {
		case armed && (v.gone(p.Name) != "" || !p.CaughtUp):
			if len(others) > 0 { // as with Thaw
				return do(Renew, []string{p.Name}, "it fell behind or is gone again")
			}
			return do(Disarm, []string{p.Name}, "it fell behind or is gone again")
		case armed && p.Passed && !slices.ContainsFunc(others, func(o string) bool {
			return !v.says(o, []string{p.Name}, func(m Peer) []string { return m.Armed })
		}):
			return do(Return, []string{p.Name}, p.Name+" has caught up")
		case !armed && p.CaughtUp && v.gone(p.Name) == "" && p.Stable >= v.Rearm:
			return do(Arm, []string{p.Name}, p.Name+" has caught up")
		}
	}
	return Action{}
}

package pair

import (
	"errors"
	"time"

	"github.com/duri-io/duri/internal/faultnet"
)

// Relays are the relays in front of one site's agent, by the name of the site that connects through each. The methods do
// to all of them what the method of the same name does to one; see faultnet.
type Relays map[string]*faultnet.Relay

// Cut stops all connections to the site, in both directions.
func (r Relays) Cut() { r.each((*faultnet.Relay).Cut) }

// Drop stops one direction of the connections to the site.
func (r Relays) Drop(d faultnet.Direction) { r.each(func(one *faultnet.Relay) { one.Drop(d) }) }

// Heal ends Cut, Drop and Refuse.
func (r Relays) Heal() { r.each((*faultnet.Relay).Heal) }

// Delay makes every byte take d longer in each direction.
func (r Relays) Delay(d time.Duration) { r.each(func(one *faultnet.Relay) { one.Delay(d) }) }

// Refuse makes new connections end at once until Heal.
func (r Relays) Refuse() { r.each((*faultnet.Relay).Refuse) }

// Reset aborts all connections.
func (r Relays) Reset() { r.each((*faultnet.Relay).Reset) }

func (r Relays) each(f func(*faultnet.Relay)) {
	for _, one := range r {
		f(one)
	}
}

func (r Relays) close() error {
	var errs []error
	for _, one := range r {
		errs = append(errs, one.Close())
	}
	return errors.Join(errs...)
}

// Link is the relay through which one site's agent connects to another's, to read that one's journal; nil without
// Options.Relays.
func (p *Pair) Link(from, to string) *faultnet.Relay {
	for _, s := range p.Sites {
		if s.Name == to {
			return s.Relay[from]
		}
	}
	return nil
}

package gateway

import "time"

// Secured marks a connection that Config.Dial has made safe on its own: the server is not asked for TLS on it.
type Secured interface{ Secured() }

// Retire closes the connections to a site's server that no session uses just now, so that nothing is left of those that use it
// no more. It may be called at any time.
func (g *Server) Retire(site string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range g.pools {
		p.mu.Lock()
		if len(p.idle) > 0 && p.idle[0].target.Site == site {
			p.expire(time.Now().Add(time.Hour))
		}
		p.mu.Unlock()
	}
}

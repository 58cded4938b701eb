package server

import (
	"strings"
	"testing"

	"github.com/duri-io/duri/config"
)

func TestAComparisonNamesTheOtherSiteWhereThereAreSeveral(t *testing.T) {
	of := func(names ...string) *node {
		n := &node{}
		for _, name := range names {
			n.peers = append(n.peers, &peer{site: config.Site{Name: name}})
		}
		return n
	}
	for _, c := range []struct {
		n          *node
		with, want string
		hint       string
	}{
		{of("busan"), "", "busan", ""},
		{of("busan"), "busan", "busan", ""},
		{of("busan", "daegu"), "daegu", "daegu", ""},
		{of("busan", "daegu"), "", "", "--with: busan, daegu"},
		{of("busan", "daegu"), "seoul", "", "--with: busan, daegu"},
		{of("busan"), "seoul", "", "--with: busan"},
	} {
		p, err := c.n.comparedWith(c.with)
		if c.want == "" {
			if err == nil || !strings.Contains(hintOf(err), c.hint) {
				t.Errorf("with %q: error %v, hint %q, want a hint with %q", c.with, err, hintOf(err), c.hint)
			}
			continue
		}
		if err != nil || p.site.Name != c.want {
			t.Errorf("with %q: %v, want %s", c.with, err, c.want)
		}
	}
}

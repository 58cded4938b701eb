package config

import (
	"strings"
	"testing"
)

func TestTheFirstRouteThatFitsIsTheHome(t *testing.T) {
	g := Gateway{Routes: []Route{
		{Database: "app", Role: "batch", Site: "busan"},
		{Application: "report", Site: "jeju"},
		{Database: "app", Site: "seoul"},
	}}
	for _, c := range []struct{ database, role, application, want string }{
		{"app", "batch", "report", "busan"},
		{"app", "web", "report", "jeju"},
		{"other", "batch", "report", "jeju"},
		{"app", "web", "", "seoul"},
		{"other", "batch", "", ""},
	} {
		if got := g.Home(c.database, c.role, c.application); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

// alone is the file of a gateway that runs alone.
const alone = `cluster: {id: 4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a, name: demo}
sites:
  - {id: 1, name: seoul, address: "10.1.0.5:7400"}
  - {id: 2, name: busan, address: "10.2.0.5:7400"}
gateway:
  name: web1
  listen: 127.0.0.1:6432
`

func TestGatewayProblems(t *testing.T) {
	c := mustParse(t, alone)
	if !c.Alone() || c.Name() != "web1" || c.Site != "" || c.Gateway.Mode != GatewayTransaction {
		t.Errorf("%+v", c.Gateway)
	}
	site := minimal + "gateway:\n"
	for _, c := range []struct{ name, text, want string }{
		{"alone, by the door", alone + "  mode: door\n", `gateway.name is not for the mode door`},
		{"alone, without an address", strings.Replace(alone, "  listen: 127.0.0.1:6432\n", "", 1), "gateway.listen is missing"},
		{"alone, with a bad name", strings.Replace(alone, "web1", "Web", 1), `gateway.name "Web" is not a name`},
		{"alone, and a witness", "witness: w\n" + alone, "witness and gateway.name are both given"},
		{"alone, at an unknown site", "site: paris\n" + alone, `site "paris" is not in sites`},
		{"a route without a site", site + "  mode: session\n  routes:\n    - {role: web}\n", "gateway.routes[0].site is missing"},
		{"a route to an unknown site", site + "  mode: session\n  routes:\n    - {role: web, site: paris}\n", `gateway.routes[0].site "paris" is not in sites`},
		{"routes at a door", site + "  routes:\n    - {role: web, site: busan}\n", "gateway.routes is not for the mode door"},
		{"re-homing at a door", site + "  rehome_every: 1\n", "gateway.rehome_every is not for the mode door"},
		{"re-homing backwards", site + "  mode: session\n  rehome_every: -1\n", "gateway.rehome_every is -1"},
	} {
		if _, err := Parse("duri.yaml", []byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

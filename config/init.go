package config

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"github.com/duri-io/duri/internal/pki"
	"github.com/duri-io/duri/policy"
	"github.com/duri-io/duri/wal"
)

// DefaultDSN is the connection string that a new site gets when none is given.
const DefaultDSN = "host=127.0.0.1 port=5432 user=duri"

// InitSpec describes a new cluster.
type InitSpec struct {
	Name      string
	Sites     []InitSite // their ids are 1, 2, ... in this order
	Databases []Database
	Seed      string // site whose content all begin with; empty: the first
	Out       string // folder to make; may exist if it is empty
	ClusterID string // UUID; empty: a new one
	// Witness is the host, or host:port, of a voter that holds no user data: the cluster then keeps a register, and
	// commits wait for another site. Empty: neither.
	Witness string
	// Voters of the register; empty, with a Witness: the first two sites and it, on ports near those of the agents.
	Voters []Voter
}

// WitnessFolder is the witness's folder, and its name.
const WitnessFolder = "witness"

// witnessPort is the default of the witness; voterPorts is where those of a site begin, above its agent's.
const (
	witnessPort = 7480
	voterPorts  = 80
)

// InitSite describes a site of a new cluster.
type InitSite struct {
	Name     string
	Address  string // host:port for the other agents
	Listen   string // empty: the port of Address on all interfaces
	DSN      string // empty: DefaultDSN
	SetupDSN string // may be empty
	Clients  string // gateway.listen; may be empty
}

// Files lists what InitCluster makes, relative to Out.
func (s InitSpec) Files() []string {
	files := []string{"ca/ca.crt", "ca/ca.key"}
	for _, folder := range s.folders() {
		for _, f := range []string{FileName, "ca.crt", "site.crt", "site.key"} {
			files = append(files, folder+"/"+f)
		}
	}
	return files
}

// folders are the names of the sites, and of the witness.
func (s InitSpec) folders() []string {
	var all []string
	for _, site := range s.Sites {
		all = append(all, site.Name)
	}
	if s.Witness != "" {
		all = append(all, WitnessFolder)
	}
	return all
}

// voters are the first two sites and the witness: three, in three places. Those of the sites have the hosts of their
// agents and the next free ports from 80 above theirs.
func (s InitSpec) voters() []Voter {
	if s.Witness == "" || len(s.Voters) > 0 {
		return s.Voters
	}
	taken := map[string]bool{}
	for _, site := range s.Sites {
		taken[site.Address] = true
	}
	free := func(name, host string, port int) Voter {
		for {
			v := Voter{Name: name, Peer: net.JoinHostPort(host, strconv.Itoa(port)), Client: net.JoinHostPort(host, strconv.Itoa(port+1))}
			if !taken[v.Peer] && !taken[v.Client] {
				taken[v.Peer], taken[v.Client] = true, true
				return v
			}
			port += 2
		}
	}
	host, port := s.Witness, strconv.Itoa(witnessPort)
	if h, p, err := net.SplitHostPort(s.Witness); err == nil {
		host, port = h, p
	}
	n, _ := strconv.Atoi(port) // 0 is found when the file is checked
	witness := free(WitnessFolder, strings.Trim(host, "[]"), n)
	var all []Voter
	for _, site := range s.Sites[:min(2, len(s.Sites))] {
		h, p, _ := net.SplitHostPort(site.Address) // its problems are found when the file is checked
		n, _ := strconv.Atoi(p)
		all = append(all, free(site.Name, h, n+voterPorts))
	}
	return append(all, witness)
}

// SeedSite is the name of the site whose content all begin with.
func (s InitSpec) SeedSite() string {
	if s.Seed == "" && len(s.Sites) > 0 {
		return s.Sites[0].Name
	}
	return s.Seed
}

// Check reports whether InitCluster would refuse, and why: all problems of the spec, or a target that is in use.
// It changes nothing.
func (s InitSpec) Check() error {
	if s.ClusterID == "" {
		s.ClusterID = "00000000-0000-4000-8000-000000000000"
	}
	if _, err := s.configs(); err != nil {
		return err
	}
	return checkTarget(s.Out)
}

// InitCluster makes the files of a new cluster in Out: the authority in ca/, and for each site a folder named after it
// that is moved to the site as a whole. All or nothing: everything is made beside Out and then moved. An Out that
// holds anything is refused. Errors of the spec are an *Error.
func InitCluster(s InitSpec) error {
	if s.ClusterID == "" {
		s.ClusterID = newUUID()
	}
	files, err := s.configs()
	if err != nil {
		return err
	}
	if err := checkTarget(s.Out); err != nil {
		return err
	}
	out, err := filepath.Abs(s.Out)
	if err != nil {
		return fmt.Errorf("make cluster: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return fmt.Errorf("make cluster: %w", err)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(out), ".duri-init-")
	if err != nil {
		return fmt.Errorf("make cluster: %w", err)
	}
	defer os.RemoveAll(tmp)
	if err := s.write(tmp, files); err != nil {
		return fmt.Errorf("make cluster: %w", err)
	}
	return install(tmp, out)
}

// configs gives each site's duri.yaml, and is an *Error when one of them would not be valid.
func (s InitSpec) configs() (map[string][]byte, error) {
	if err := s.shape(); err != nil {
		return nil, &Error{Problems: []*Problem{err}}
	}
	files := map[string][]byte{}
	var all Error
	for _, folder := range s.folders() {
		files[folder] = s.render(s.site(folder), false)
		_, err := Parse(FileName, files[folder])
		if e, ok := errors.AsType[*Error](err); ok {
			all.add(e.Problems)
		}
	}
	if len(all.Problems) > 0 {
		return nil, &all
	}
	return files, nil
}

// site finds a site of the spec, or makes one for the witness.
func (s InitSpec) site(folder string) InitSite {
	for _, site := range s.Sites {
		if site.Name == folder {
			return site
		}
	}
	return InitSite{Name: folder, Address: s.Witness}
}

// shape checks what cannot be seen in a single site's file.
func (s InitSpec) shape() *Problem {
	if len(s.Sites) == 0 {
		return &Problem{Msg: "a cluster needs at least two sites", Hint: "for example: --site seoul=10.1.0.5:7400 --site busan=10.2.0.5:7400"}
	}
	known := slices.ContainsFunc(s.Sites, func(site InitSite) bool { return site.Name == s.SeedSite() })
	if !known {
		return &Problem{Msg: fmt.Sprintf("seed %q is not a site of the cluster", s.Seed), Hint: "name one of the sites"}
	}
	for _, site := range s.Sites {
		if site.Name == "ca" { // the authority's folder
			return &Problem{Msg: `a site cannot be called "ca"`, Hint: "choose another name"}
		}
		if s.Witness != "" && site.Name == WitnessFolder {
			return &Problem{Msg: fmt.Sprintf("a site cannot be called %q beside a witness", site.Name), Hint: "choose another name"}
		}
	}
	return nil
}

// add takes problems over without their position (the file does not exist yet) and without repeating them.
func (e *Error) add(problems []*Problem) {
	for _, p := range problems {
		if !slices.ContainsFunc(e.Problems, func(q *Problem) bool { return q.Msg == p.Msg }) {
			e.Problems = append(e.Problems, &Problem{Key: p.Key, Msg: p.Msg, Hint: p.Hint})
		}
	}
}

// checkTarget refuses a folder that holds anything, and what is not a folder.
func checkTarget(out string) error {
	if out == "" {
		return &Problem{Msg: "no folder is named for the new cluster", Hint: "for example: --out demo"}
	}
	entries, err := os.ReadDir(out)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at the target folder: %w", err)
	case len(entries) > 0:
		return &Problem{Msg: fmt.Sprintf("folder %s is not empty", out), Hint: "name another folder: keys that are in use are never overwritten"}
	}
	return nil
}

func (s InitSpec) write(dir string, files map[string][]byte) error {
	ca, err := pki.NewCA(s.ClusterID, s.Name)
	if err != nil {
		return err
	}
	caDir := filepath.Join(dir, "ca")
	if err := os.Mkdir(caDir, 0o700); err != nil {
		return err
	}
	own, err := ca.Pair()
	if err != nil {
		return err
	}
	if err := own.Write(filepath.Join(caDir, "ca.crt"), filepath.Join(caDir, "ca.key")); err != nil {
		return err
	}
	for _, folder := range s.folders() {
		if err := writeSite(filepath.Join(dir, folder), ca, s.site(folder), files[folder]); err != nil {
			return err
		}
	}
	return nil
}

func writeSite(dir string, ca *pki.CA, site InitSite, file []byte) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	pair, err := ca.Issue(site.Name, site.Address)
	if err != nil {
		return err
	}
	return errors.Join(
		pair.Write(filepath.Join(dir, "site.crt"), filepath.Join(dir, "site.key")),
		ca.WriteCert(filepath.Join(dir, "ca.crt")),
		// The connection string may hold a password.
		os.WriteFile(filepath.Join(dir, FileName), file, 0o600),
	)
}

// install moves the finished folders to out. A folder that exists is kept, as it may be the current one of a shell.
func install(tmp, out string) error {
	err := os.Rename(tmp, out)
	if err == nil || !errors.Is(err, fs.ErrExist) {
		return err
	}
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return fmt.Errorf("make cluster: %w", err)
	}
	for i, e := range entries {
		if err := os.Rename(filepath.Join(tmp, e.Name()), filepath.Join(out, e.Name())); err != nil {
			for _, moved := range entries[:i] {
				err = errors.Join(err, os.RemoveAll(filepath.Join(out, moved.Name())))
			}
			return fmt.Errorf("make cluster: %w", err)
		}
	}
	return nil
}

// newUUID makes a random UUID (version 4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand stops the program instead
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Example is a commented duri.yaml with every key; it is valid.
func Example() string {
	s := InitSpec{
		Name:      "demo",
		ClusterID: "4f2c9a1e-7c1d-4b5e-9a55-0d7f6c1e2b3a",
		Sites: []InitSite{
			{Name: "seoul", Address: "10.1.0.5:7400", Listen: ":7400"},
			{Name: "busan", Address: "10.2.0.5:7400"},
		},
		Witness: "10.3.0.5",
		Databases: []Database{{Name: "app", Durability: Async, Schemas: []string{"public"}, Tables: map[string]policy.Table{
			"public.account": {Mode: policy.ModeRow, Delta: []string{"balance"}, FK: map[string]policy.Orphans{"account_branch_fkey": policy.Report}},
		}}},
	}
	return string(s.render(s.Sites[0], true))
}

// page is what the template of duri.yaml sees.
type page struct {
	Spec      InitSpec
	Site      InitSite
	Bootstrap Bootstrap
	Default   *Config
	All       bool // write every key
	Witness   bool // the file is that of the witness
	Voters    []Voter
}

// ID is the number of the i-th site.
func (page) ID(i int) wal.SiteID { return wal.SiteID(i + 1) }

func (s InitSpec) render(site InitSite, all bool) []byte {
	p := page{Spec: s, Site: site, Bootstrap: BootstrapCopy, Default: defaults(), All: all, Voters: s.voters()}
	p.Witness = s.Witness != "" && site.Name == WitnessFolder
	if site.Name == s.SeedSite() {
		p.Bootstrap = BootstrapSeed
	}
	if p.Site.DSN == "" {
		p.Site.DSN = DefaultDSN
	}
	var b strings.Builder
	if err := fileTemplate.Execute(&b, p); err != nil {
		panic(err) // the template and its data are ours: a test renders both forms
	}
	return []byte(b.String())
}

var fileTemplate = template.Must(template.New(FileName).Funcs(template.FuncMap{
	// Go's quoted form is also YAML's double-quoted one.
	"q": strconv.Quote,
}).Parse(`# {{.Site.Name}}: configuration of {{if .Witness}}the cluster's witness{{else}}this site's duri agent{{end}}. Each key is described in docs/reference/config.md;
# see them all with "duri config example", check this file with "duri config check".

cluster:
  id: {{q .Spec.ClusterID}}   # the same at every site
  name: {{q .Spec.Name}}
{{- if .Witness}}
witness: {{q .Site.Name}}   # a voter of the register that holds no user data
{{- else}}
site: {{q .Site.Name}}   # which of the sites below this agent is
{{- end}}
{{- if .All}}
witness: ""   # in the witness's file in place of site: the voter that holds no user data
{{- end}}

sites:   # all sites of the cluster, the same at every site; an id is never changed or used again
{{- range $i, $s := .Spec.Sites}}
  - id: {{$.ID $i}}
    name: {{q $s.Name}}
    address: {{q $s.Address}}   # where the other agents reach this one
{{- end}}
{{- if not .Witness}}

# seed: the present content of the databases here is the cluster's first content.
# copy: the databases here start empty and are copied from the seed site.
bootstrap: {{.Bootstrap}}
{{- end}}
{{- if .Site.Listen}}

listen: {{q .Site.Listen}}   # default: the port of the own address, on all interfaces
{{- end}}
{{- if .All}}

data_dir: {{q .Default.DataDir}}   # journals and control socket; relative to this file
{{- end}}
{{- if not .Witness}}

databases:{{if not .Spec.Databases}} []{{end}}
{{- range .Spec.Databases}}
  - name: {{q .Name}}
{{- if .Durability}}
    durability: {{.Durability}}   # default: durability.level
{{- end}}
{{- if .Schemas}}
    schemas:   # default: all user schemas
{{- range .Schemas}}
      - {{q .}}
{{- end}}
{{- end}}
{{- if .Tables}}
    tables:   # where the default, the later transaction's whole row, is not right; the same at every site
{{- range $name, $t := .Tables}}
      {{q $name}}:
        mode: {{$t.Mode}}   # or column: updates of different columns both stand
        delta:   # numeric columns that merge by adding differences
{{- range $t.Delta}}
          - {{q .}}
{{- end}}
        foreign_keys:   # what becomes of a row whose parent is gone: report, remove_child or resurrect_parent
{{- range $fk, $o := $t.FK}}
          {{q $fk}}: {{$o}}
{{- end}}
{{- end}}
{{- end}}
{{- end}}
{{- end}}
{{- if .Voters}}

quorum:   # who keeps the register of the sites that may acknowledge; the same at every site and the witness
  members:   # three voters in three places: names of sites, and of the witness
{{- range .Voters}}
    - name: {{q .Name}}
      peer: {{q .Peer}}   # for the other voters
      client: {{q .Client}}   # for the agents
{{- end}}
{{- if .All}}
  external: []   # instead of members: https URLs of an etcd that somebody else keeps
  tls:   # for external: PEM files; default: those of tls
    ca: ""
    cert: ""
    key: ""
{{- end}}
{{- end}}
{{- if .All}}

durability:   # what an acknowledged commit promises; the same at every site
  level: {{.Default.Durability.Level}}   # or sync: commits wait until other sites hold them
  receipts: {{.Default.Durability.Receipts}}   # how many other sites
  policy: {{.Default.Durability.Policy}}   # availability-first, preferred-site or read-only-on-doubt: when sites lose each other
  preferred: ""   # the site of preferred-site
  detect: {{.Default.Durability.Detect}}   # silence of a site after which it is taken for dead
  rearm: {{.Default.Durability.Rearm}}   # how long a link must have been stable before its site is taken back
  returning_tail: {{.Default.Durability.ReturningTail}}   # or merge: transactions of a site that was left out and that nobody acknowledged

gateway:   # the way of clients to PostgreSQL through the agent, which keeps them out while the site may not serve
  listen: ""   # host:port; default: clients do not come this way
  mode: {{.Default.Gateway.Mode}}   # session: the agent authenticates clients; transaction: and pools connections
  cert: ""   # certificate that clients see, PEM; not for the mode door
  key: ""
  client_ca: ""   # PEM: authorities of clients' certificates; who shows one of theirs logs in without a password
  login_ca:   # signs certificates with which the agent logs the roles of such clients in at PostgreSQL: duri gateway login-ca
    cert: ""
    key: ""
    roles: []   # that it is for; default: all that pg_hba.conf lets in by cert
  routes: []   # of {database, role, application_name, site, reads}: the home of the sessions that fit; default: this site
  rehome_every: 0   # for tests of applications: every n-th transaction goes to the next site
  reads:   # for the mode transaction: reads outside a transaction go also to other sites than the session's home
    weights: {}   # share of the sessions by site, such as {seoul: 1, busan: 3}; default: all read at their home
    lag_max: {{.Default.Gateway.Reads.LagMax}}   # a site that is further behind serves no reads
    wait_max: {{.Default.Gateway.Reads.WaitMax}}   # how long a read waits until a site has what its session has seen, before it goes home instead
  slow_down:   # for the mode transaction: transactions that write are delayed while another site falls behind
    from: {{.Default.Gateway.SlowDown.From}}   # bytes of WAL that it has not applied; 0B: nobody is delayed
    to: {{.Default.Gateway.SlowDown.To}}   # from here on the delay is
    most: {{.Default.Gateway.SlowDown.Most}}
  name: ""   # in the file of a gateway that runs alone (duri gateway): that of its certificate
  # For session and transaction; SIGHUP to the agent, or RELOAD in the database duri, takes a change of these.
  admins: []   # roles that may use the gateway's own database, duri; default: the agent's role
  replay: []   # roles whose open transactions are run again at another site when theirs is lost; others get 40001
  clients_max: {{.Default.Gateway.ClientsMax}}
  pool_size: {{.Default.Gateway.PoolSize}}   # connections to a server per database, user and set of startup parameters
  hold: {{.Default.Gateway.Hold}}   # how long a client waits for one, or for a site that may serve
  idle: {{.Default.Gateway.Idle}}   # after this an unused connection is closed
  strict: {{.Default.Gateway.Strict}}   # true: ask the server after each transaction what the session has become
  login_rate: {{.Default.Gateway.LoginRate}}   # logins per second and address, ten times as many at once
{{- else if and .Voters (not .Witness)}}

durability:
  level: sync   # a commit waits until another site holds it; async: it does not
{{- end}}
{{- if and .Site.Clients (not .Witness)}}

gateway:
  listen: {{q .Site.Clients}}   # clients connect here, and are kept out while the site may not serve
{{- end}}
{{- if not .Witness}}

postgres:
  # Connection of the run-time role that "duri grants" prepares; no database in it. Leave the password to pgpass
  # (~/.pgpass) or a service file.
  dsn: {{q .Site.DSN}}
{{- if or .All .Site.SetupDSN}}
  # Superuser, used only to enrol (schema duri, publication, first copy); remove it afterwards.
  setup_dsn: {{q .Site.SetupDSN}}
{{- end}}
{{- if .All}}
  bin_dir: ""   # where pg_dump is; default: PATH, then /usr/lib/postgresql/*/bin
{{- end}}
{{- end}}
{{- if .All}}

tls:   # PEM files made by "duri init"; relative to this file
  ca: {{.Default.TLS.CA}}
  cert: {{.Default.TLS.Cert}}
  key: {{.Default.TLS.Key}}

journal:
  keep: {{.Default.Journal.Keep}}   # at least this long after every site has applied it
  budget: {{.Default.Journal.Budget}}   # of disk, for all journals of this site
  segment: {{.Default.Journal.Segment}}   # one file
  full: {{.Default.Journal.Full}}   # or stop-writes: when a site that is away has used up the budget

apply:   # bounds of one apply transaction
  batch_transactions: {{.Default.Apply.BatchTransactions}}
  batch_bytes: {{.Default.Apply.BatchBytes}}
  lock_timeout: {{.Default.Apply.LockTimeout}}   # then apply gives way to the client and tries again

conflict:
  keep: {{.Default.Conflict.Keep}}   # records of conflicts, with both images

verify:   # the sites are compared all the time, slowly; what differs is in "duri status"
  enabled: {{.Default.Verify.Enabled}}
  period: {{.Default.Verify.Period}}   # of a pass over all rows
  cpu: {{.Default.Verify.CPU}}   # share of a core of each site's server; where it is not enough, a pass takes longer

max_clock_skew: {{.Default.MaxClockSkew}}   # beyond it the link is shown as degraded
heartbeat: {{.Default.Heartbeat}}

log:
  level: {{.Default.Log.Level}}   # debug, info, warn, error
  format: {{.Default.Log.Format}}   # text, json
{{- end}}
`))

package archtest

// module is the path that go.mod declares; the test compares.
const module = "github.com/duri-io/duri"

// A rule forbids imports. Packages of this module are named by their folder ("journal"), others by their import path;
// "x/..." means x and everything below it, "std" the standard library, "*" everything.
type rule struct {
	from   []string // importers that the rule binds
	unless []string // importers that it does not bind after all
	forbid []string // what they must not import
	allow  []string // what they may import after all
	tests  bool     // whether _test.go files are bound as well
	reason string

	// breach is an import that the rule must find, so that no rule is written in a way that it cannot bite.
	breach [2]string
}

var rules = []rule{
	{
		from: []string{"wal"}, forbid: []string{"*"}, allow: []string{"std"},
		reason: "wal is the vocabulary at the bottom; what it imports, everybody imports",
		breach: [2]string{"wal", "golang.org/x/sync/errgroup"},
	},
	{
		from: []string{"conflict"}, forbid: []string{"*"}, allow: []string{"std", "wal"},
		reason: "conflict decides and does nothing else: values in, value out",
		breach: [2]string{"conflict", "config"},
	},
	{
		from: []string{"topology"}, forbid: []string{"*"}, allow: []string{"std", "wal"},
		reason: "topology is vocabulary, as wal is",
		breach: [2]string{"topology", "link"},
	},
	{
		from: []string{"policy"}, forbid: []string{"*"}, allow: []string{"std"},
		reason: "policy is vocabulary that the configuration, the catalog and apply share",
		breach: [2]string{"policy", "catalog"},
	},
	{
		from: []string{"quorum"}, forbid: []string{"*"}, allow: []string{"std", "wal"},
		reason: "the rules of the register are values in, value out; quorum/etcdstore keeps the value",
		breach: [2]string{"quorum", "quorum/etcdstore"},
	},
	{
		from: []string{"durability"}, forbid: []string{"*"}, allow: []string{"std", "wal"},
		reason: "what may be acknowledged, and when to ask the register, is decided purely; package server acts",
		breach: [2]string{"durability", "link"},
	},
	{
		from: []string{"pgwire/..."}, forbid: []string{"*"}, allow: []string{"std", "pgwire"},
		reason: "pgwire frames bytes of clients and servers; it depends on nobody's idea of a session",
		breach: [2]string{"pgwire", "github.com/jackc/pgx/v5/pgproto3"},
	},
	{
		from: []string{"gateway"}, forbid: []string{"*"}, allow: []string{"std", "pgwire/..."},
		reason: "the gateway is told by its caller where to go and what to check passwords against",
		breach: [2]string{"gateway", "quorum"},
	},
	{
		from: []string{"parity"}, forbid: []string{"*"}, allow: []string{"std", "internal/pg", "github.com/jackc/pgx/v5/pgconn"},
		reason: "what must be the same at two sites is compared without knowing who asks, or why",
		breach: [2]string{"parity", "gateway"},
	},
	{
		from: []string{"..."}, unless: []string{"quorum/etcdstore"}, tests: true,
		forbid: []string{"go.etcd.io/...", "go.uber.org/zap/..."},
		reason: "etcd and its logger stay behind quorum.Store",
		breach: [2]string{"server", "go.etcd.io/etcd/client/v3"},
	},
	{
		from: []string{"wal", "conflict", "topology", "policy", "quorum"}, forbid: []string{"net/...", "os/...", "database/...", "log/..."},
		reason: "the vocabulary and the decisions do no I/O",
		breach: [2]string{"conflict", "os"},
	},
	{
		from: []string{"journal"}, forbid: []string{"decode", "apply", "link", "gateway", "server"},
		reason: "the journal is the heart: its writers and readers know it, it knows none of them",
		breach: [2]string{"journal", "decode"},
	},
	{
		from: []string{"apply"}, forbid: []string{"link", "decode", "server"},
		reason: "apply reads transactions from a journal, wherever they came from",
		breach: [2]string{"apply", "link"},
	},
	{
		from: []string{"decode"}, forbid: []string{"apply", "link", "server"},
		reason: "decode ends at the journal; who ships and applies is not its concern",
		breach: [2]string{"decode", "apply"},
	},
	{
		from: []string{"..."}, unless: []string{"cmd/..."}, tests: true,
		forbid: []string{"github.com/spf13/..."},
		reason: "the command line lives in cmd; everything else can be called from a test or another program",
		breach: [2]string{"server", "github.com/spf13/cobra"},
	},
	{
		from: []string{"..."}, tests: true,
		unless: []string{"cmd/...", "server/...", "demo/...", "bench/...", "test/...", "internal/*test", "internal/pair"},
		forbid: []string{"cmd/...", "server/..."},
		reason: "the composition root knows every package, so nothing it composes may know it",
		breach: [2]string{"link", "server"},
	},
	{
		from: []string{"..."}, unless: []string{"bench/...", "test/..."}, tests: true,
		forbid: []string{"bench/...", "test/..."},
		reason: "benchmarks and end-to-end tests stand outside the product",
		breach: [2]string{"apply", "test/prove"},
	},
	{
		from: []string{"..."}, unless: []string{"bench/...", "test/...", "internal/*test", "internal/pair"},
		forbid: []string{
			"testing", "testing/...", "internal/*test", "internal/pair", "github.com/google/go-cmp/...", "go.uber.org/goleak/...",
			"pgregory.net/rapid/...", "github.com/rogpeppe/go-internal/...", "github.com/cockroachdb/datadriven/...",
		},
		reason: "what only tests need is not part of the product",
		breach: [2]string{"cmd/duri", "internal/pgtest"},
	},
	{
		from: []string{"..."}, tests: true, forbid: []string{"C"},
		reason: "duri is one static binary, built without CGO",
		breach: [2]string{"verify", "C"},
	},
	{
		from: []string{"..."}, tests: true, forbid: []string{"github.com/jackc/pglogrepl/..."},
		reason: "decode speaks the replication protocol with its own decoder, which is fuzzed and does not allocate per row",
		breach: [2]string{"decode", "github.com/jackc/pglogrepl"},
	},
	{
		from: []string{"..."}, tests: true,
		forbid: []string{
			"github.com/stretchr/testify/...", "github.com/golang/mock/...", "go.uber.org/mock/...",
			"github.com/testcontainers/...", "github.com/fergusstrange/embedded-postgres/...",
		},
		reason: "tests compare with cmp.Diff, fake with function fields, and run the real PostgreSQL of internal/pgtest",
		breach: [2]string{"journal", "github.com/stretchr/testify/require"},
	},
	{
		from: []string{"..."}, tests: true,
		forbid: []string{
			"gopkg.in/yaml.v2/...", "gopkg.in/yaml.v3/...", "github.com/lib/pq/...", "gorm.io/...",
			"github.com/mattn/go-sqlite3/...", "modernc.org/...", "go.etcd.io/bbolt/...", "github.com/pkg/errors/...",
			"github.com/sirupsen/logrus/...", "github.com/urfave/cli/...",
		},
		reason: "one library per need, the one in CONTRIBUTING.md; control data live in PostgreSQL, logging is log/slog",
		breach: [2]string{"config", "gopkg.in/yaml.v3"},
	},
}

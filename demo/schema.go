package demo

import (
	"fmt"
	"strings"

	"github.com/duri-io/duri/internal/pg"
)

// Names in the demo's database.
const (
	database = "finance"
	schema   = "finance"
	appRole  = "finance_app" // whom the ledger's clients connect as
	opsRole  = "finance_ops" // who may look into the gateways
	duriRole = "duri"        // whom the agents connect as
)

const (
	fiscalYear      = 2026
	funds           = 6    // rows that both sites update all the time
	quarters        = 4    // settlement rows per government
	openingPayments = 5000 // in the database before duri: client 0
)

// budgetLines are the policy fields of the local-finance classification.
var budgetLines = []string{
	"일반공공행정", "공공질서 및 안전", "교육", "문화 및 관광", "환경", "사회복지", "보건", "농림해양수산", "산업·중소기업", "교통 및 물류",
}

// fundNames are the shared funds, the hot rows.
var fundNames = [funds]string{
	"통합재정안정화기금", "재난관리기금", "지역상생발전기금", "지방소멸대응기금", "고향사랑기금", "지역개발기금",
}

// schemaSQL makes the ledger's tables. The audit log has no key on purpose: nothing but exactly-once apply keeps a row
// of it from being there twice (replication.md rule 18). It has a replica identity so that what a site committed and does not count
// can be deleted there when the site is back.
const schemaSQL = `
CREATE SCHEMA finance;
CREATE TABLE finance.government (
	id int PRIMARY KEY, province text NOT NULL, name text NOT NULL, tier text NOT NULL);
CREATE TABLE finance.budget (
	gov_id int REFERENCES finance.government, line int, year int, title text NOT NULL,
	appropriated numeric(18) NOT NULL, executed numeric(18) NOT NULL DEFAULT 0, site text, at timestamptz,
	PRIMARY KEY (gov_id, line, year));
CREATE TABLE finance.payment (
	id uuid PRIMARY KEY, gov_id int NOT NULL REFERENCES finance.government, line int NOT NULL,
	amount numeric(15) NOT NULL CHECK (amount > 0), payee text NOT NULL,
	site text NOT NULL, client int NOT NULL, seq bigint NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE finance.settlement (
	gov_id int REFERENCES finance.government, quarter int, settled numeric(18) NOT NULL DEFAULT 0,
	state text NOT NULL DEFAULT '집행중', site text, at timestamptz, PRIMARY KEY (gov_id, quarter));
CREATE TABLE finance.fund (
	id int PRIMARY KEY, name text NOT NULL, balance numeric(18) NOT NULL, notice text, site text, at timestamptz);
CREATE TABLE finance.audit (
	at timestamptz NOT NULL DEFAULT clock_timestamp(), site text NOT NULL, client int NOT NULL, seq bigint NOT NULL,
	payment uuid NOT NULL, amount numeric(15) NOT NULL, note text);
ALTER TABLE finance.audit REPLICA IDENTITY FULL;
`

// seedSQL fills the tables with what the database held before duri. It is deterministic.
func seedSQL() string {
	var b strings.Builder
	b.WriteString("INSERT INTO finance.government VALUES\n")
	for i, g := range governments() {
		if i > 0 {
			b.WriteString(",\n")
		}
		fmt.Fprintf(&b, "(%d, %s, %s, %s)", g.id, pg.QuoteLiteral(g.province), pg.QuoteLiteral(g.name), pg.QuoteLiteral(g.tier()))
	}
	b.WriteString(";\nINSERT INTO finance.budget (gov_id, line, year, title, appropriated)\n" +
		"SELECT g.id, l.line, " + fmt.Sprint(fiscalYear) + ", l.title, (1 + (g.id * 37 + l.line * 11) % 90) * 1000000000::numeric\n" +
		"FROM finance.government g, unnest(ARRAY[" + literals(budgetLines) + "]) WITH ORDINALITY AS l(title, line);\n")
	fmt.Fprintf(&b, "INSERT INTO finance.settlement (gov_id, quarter) SELECT id, q FROM finance.government, generate_series(1, %d) q;\n", quarters)
	fmt.Fprintf(&b, "INSERT INTO finance.fund SELECT i, n, 50000000000 FROM unnest(ARRAY[%s]) WITH ORDINALITY AS f(n, i);\n", literals(fundNames[:]))
	fmt.Fprintf(&b, `INSERT INTO finance.payment (id, gov_id, line, amount, payee, site, client, seq, at)
SELECT md5('opening ' || i)::uuid, 1 + i %% %d, 1 + i %% %d, 10000 + (i * 7919) %% 9000000, '이월 ' || i, 'opening', 0, i,
	timestamptz '2026-01-02 00:00+00' + i * interval '1 minute' FROM generate_series(1, %d) i;
INSERT INTO finance.audit (at, site, client, seq, payment, amount, note)
SELECT at, site, client, seq, id, amount, '이월' FROM finance.payment;
UPDATE finance.budget b SET executed = p.total
FROM (SELECT gov_id, line, sum(amount) AS total FROM finance.payment GROUP BY 1, 2) p
WHERE (b.gov_id, b.line) = (p.gov_id, p.line);
`, len(governments()), len(budgetLines), openingPayments)
	return b.String()
}

// roles are whom gateways let in, in the order of appSQL's passwords.
var roles = [2]string{appRole, opsRole}

// appSQL lets the ledger's role read and write, and tells transactions at which site they run. The predefined roles suit both sites
// alike, whoever copied the tables. passwords may be verifiers.
func appSQL(site string, passwords [2]string) string {
	var b strings.Builder
	for i, role := range roles {
		fmt.Fprintf(&b, "CREATE ROLE %s LOGIN PASSWORD %s;\n", pg.QuoteIdent(role), pg.QuoteLiteral(passwords[i]))
	}
	fmt.Fprintf(&b, "GRANT pg_read_all_data, pg_write_all_data TO %s;\n", pg.QuoteIdent(appRole))
	fmt.Fprintf(&b, "ALTER DATABASE %s SET %s = %s;\n", database, siteSetting, pg.QuoteLiteral(site))
	return b.String()
}

func literals(all []string) string {
	quoted := make([]string, len(all))
	for i, s := range all {
		quoted[i] = pg.QuoteLiteral(s)
	}
	return strings.Join(quoted, ", ")
}

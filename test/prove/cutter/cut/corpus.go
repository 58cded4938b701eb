package cut

import (
	"fmt"
	"strings"
)

// insert writes a row of the ledger.
func insert(seq int) string { return fmt.Sprintf("INSERT INTO ledger VALUES ($c, %d)", seq) }

// corpus is what clients do, in about all forms in which they do it.
func corpus() []*script {
	five := func(f func(i int) []message) (all []message) {
		for i := 1; i <= 5; i++ {
			all = append(all, f(i)...)
		}
		return all
	}
	unnamed := func(sql string, args ...string) []message {
		return []message{parse("", sql), bind("", "", args...), describePortal(""), execute("")}
	}
	put := func(i int) []message {
		return unnamed("INSERT INTO ledger VALUES ($1::bigint, $2::int) RETURNING seq", "$c", fmt.Sprint(i))
	}
	all := []*script{
		// Reads.
		{name: "read-simple", bursts: queries("SELECT amount FROM account WHERE client = $c", "SELECT generate_series(1, 5)", "SHOW search_path")},
		{name: "read-extended", bursts: []burst{extended("SELECT amount + $1::int FROM account WHERE client = $2::bigint", "1", "$c"), extended("SELECT generate_series(1, 4)")}},
		{name: "read-large", most: 10, may: []string{failed}, bursts: []burst{extended("SELECT repeat('x', 4000), i FROM generate_series(1, 50) i"), one(query("SELECT 1"))}},
		{name: "read-empty", bursts: bursts(queries("", ";", "-- nothing"), []burst{extended("")})},
		{name: "read-volatile", bursts: queries("SELECT now() IS NOT NULL, random() < 2", "SELECT clock_timestamp() IS NOT NULL")},

		// Writes that commit by themselves.
		{name: "write-simple", bursts: queries(insert(1), "UPDATE account SET amount = amount + 1 WHERE client = $c", "DELETE FROM secret WHERE false", insert(2))},
		{name: "write-extended", bursts: []burst{extended("INSERT INTO ledger VALUES ($1::bigint, 1)", "$c"), extended("UPDATE account SET amount = amount - $1::int WHERE client = $2::bigint", "7", "$c")}},
		{name: "write-returning", bursts: bursts(queries("INSERT INTO ledger SELECT $c, i FROM generate_series(1, 3) i RETURNING seq", "UPDATE account SET amount = amount + 1 WHERE client = $c RETURNING amount"),
			[]burst{extended("INSERT INTO ledger VALUES ($1::bigint, 4), ($1::bigint, 5) RETURNING seq * 2", "$c")})},
		{name: "write-with", bursts: queries("WITH new AS (INSERT INTO ledger VALUES ($c, 1) RETURNING seq) SELECT seq + 1 FROM new",
			"WITH a AS (UPDATE account SET amount = 0 WHERE client = $c RETURNING client) INSERT INTO ledger SELECT client, 2 FROM a")},
		{name: "write-function", bursts: bursts(queries("SELECT put($c, 1)", "SELECT * FROM put($c, 2) p"), []burst{extended("SELECT put($1::bigint, 3)", "$c")})},
		{name: "write-view", bursts: queries("SELECT * FROM writes WHERE false", insert(1))},
		{name: "write-trigger", bursts: queries("INSERT INTO audited VALUES ($c, 1)", "INSERT INTO audited VALUES ($c, 2), ($c, 3) RETURNING seq")},
		{name: "write-upsert", bursts: queries("INSERT INTO account VALUES ($c, 1) ON CONFLICT (client) DO UPDATE SET amount = account.amount + 1 RETURNING amount",
			"MERGE INTO account a USING (SELECT $c::bigint AS client) s ON a.client = s.client WHEN MATCHED THEN UPDATE SET amount = a.amount + 10", "SELECT amount FROM account WHERE client = $c")},
		{name: "write-call", may: []string{unknown}, bursts: queries("CALL plain($c)", "DO $do$ BEGIN INSERT INTO ledger VALUES ($c, 2); END $do$")},
		{name: "write-fails", may: []string{unknown}, bursts: bursts(queries("INSERT INTO ledger VALUES ($c, NULL)", "SELECT 1/0", insert(1), "SELECT * FROM nowhere", "INSERT INTO ledger VALUES ($c, 1/0)"),
			[]burst{extended("INSERT INTO ledger VALUES ($1::bigint, 'x'::text::int)", "$c"), extended("SELEC"), extended(insert(2))})},
		{name: "write-deferred-fails", bursts: bursts(queries("INSERT INTO child VALUES ($c, -1)", insert(1)),
			[]burst{extended("INSERT INTO child VALUES ($1::bigint, -2)", "$c"), extended("INSERT INTO child VALUES ($1::bigint, $1::bigint)", "$c")})},

		// Several statements in one message.
		{name: "multi-simple", may: []string{unknown}, bursts: queries(insert(1)+"; "+insert(2), insert(3)+"; SELECT 1/0; "+insert(4), "SELECT 1; "+insert(5)+"; SELECT amount FROM account WHERE client = $c")},
		{name: "multi-transaction", bursts: queries("BEGIN; "+insert(1)+"; COMMIT", "BEGIN; "+insert(2)+"; ROLLBACK; "+insert(3), insert(4)+"; COMMIT; "+insert(5)), parts: true, may: []string{unknown, failed}},
		{name: "multi-begins", may: []string{unknown}, bursts: queries("BEGIN; "+insert(1), insert(2)+"; COMMIT", "SELECT 1")},

		// Transactions.
		{name: "block-simple", bursts: queries("BEGIN", insert(1), "UPDATE account SET amount = amount + 1 WHERE client = $c", "COMMIT", "BEGIN", insert(2), "END")},
		{name: "block-extended", bursts: []burst{extended("BEGIN"), extended("INSERT INTO ledger VALUES ($1::bigint, 1)", "$c"), extended("SELECT amount FROM account WHERE client = $1::bigint FOR UPDATE", "$c"), extended("COMMIT")}},
		{name: "block-rollback", bursts: queries("BEGIN", insert(1), "ROLLBACK", "START TRANSACTION ISOLATION LEVEL REPEATABLE READ", insert(2), "ABORT", insert(3))},
		{name: "block-chain", may: []string{unknown}, bursts: queries("BEGIN ISOLATION LEVEL SERIALIZABLE", insert(1), "COMMIT AND CHAIN", insert(2), "SHOW transaction_isolation", "ROLLBACK AND CHAIN", insert(3), "COMMIT")},
		{name: "block-empty", bursts: queries("BEGIN", "COMMIT", "BEGIN READ ONLY", "SELECT 1", "COMMIT", "BEGIN", "ROLLBACK")},
		{name: "block-fails", bursts: queries("BEGIN", insert(1), "SELECT 1/0", insert(2), "COMMIT", insert(3), "BEGIN", "SELECT * FROM nowhere", "ROLLBACK")},
		{name: "block-warns", bursts: queries("COMMIT", "ROLLBACK", "BEGIN", "BEGIN", insert(1), "COMMIT")},
		{name: "block-modes", bursts: queries("BEGIN", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SHOW transaction_isolation", insert(1), "COMMIT", "BEGIN READ ONLY", insert(2), "ROLLBACK")},
		{name: "block-deferred-fails", bursts: queries("BEGIN", insert(1), "INSERT INTO child VALUES ($c, -1)", "COMMIT", "BEGIN", insert(2), "INSERT INTO child VALUES ($c, $c)", "COMMIT",
			"BEGIN", "INSERT INTO child VALUES ($c, -1)", "SET CONSTRAINTS ALL IMMEDIATE", "ROLLBACK")},
		{name: "block-read", bursts: queries("BEGIN", "SELECT amount FROM account WHERE client = $c", "SELECT generate_series(1, 4)", "COMMIT")},
		{name: "block-long", bursts: queries("BEGIN", insert(1), insert(2), insert(3), insert(4), insert(5), insert(6), insert(7), insert(8), "COMMIT")},
		{name: "savepoints", bursts: queries("BEGIN", insert(1), "SAVEPOINT a", insert(2), "ROLLBACK TO a", insert(3), "SAVEPOINT b", "SELECT 1/0", "ROLLBACK TO b", insert(4), "RELEASE a", "COMMIT")},
		{name: "prepared-block", bursts: bursts([]burst{one(parse("ins", "INSERT INTO ledger VALUES ($1::bigint, $2::int)"), describeStatement("ins"), sync_)},
			queries("BEGIN"), []burst{one(bind("", "ins", "$c", "1"), execute(""), sync_), one(bind("", "ins", "$c", "2"), execute(""), sync_)}, queries("COMMIT"))},

		// Pipelines.
		{name: "pipeline-one-sync", bursts: []burst{one(append(five(put), sync_)...)}},
		{name: "pipeline-five-syncs", bursts: []burst{one(five(func(i int) []message { return append(put(i), sync_) })...)}},
		{name: "pipeline-reads", bursts: []burst{one(five(func(i int) []message { return append(unnamed(fmt.Sprintf("SELECT %d", i)), sync_) })...)}},
		{name: "pipeline-block", may: []string{unknown}, bursts: []burst{one(append(append(append(unnamed("BEGIN"), five(put)...), unnamed("COMMIT")...), sync_)...)}},
		{name: "pipeline-block-syncs", bursts: []burst{one(append(append(append(unnamed("BEGIN"), sync_), five(func(i int) []message { return append(put(i), sync_) })...), append(unnamed("COMMIT"), sync_)...)...)}},
		{name: "pipeline-fails", bursts: []burst{one(append(append(append(put(1), unnamed("SELECT 1/0")...), put(2)...), append([]message{sync_}, append(put(3), sync_)...)...)...)}},
		{name: "pipeline-queries", bursts: []burst{one(query(insert(1)), query("SELECT 1"), query(insert(2)))}},
		{name: "flush", may: []string{failed}, bursts: []burst{
			until('T', parse("", "SELECT seq FROM ledger WHERE client = $1::bigint"), describeStatement(""), flush), one(bind("", "", "$c"), execute(""), sync_),
			until('C', append(put(1), flush)...), one(append(put(2), sync_)...),
		}},
		{name: "flush-fails", may: []string{failed, unknown}, bursts: []burst{
			until('2', parse("", "INSERT INTO ledger VALUES ($1::bigint, 'x'::text::int)"), bind("", "", "$c"), flush), one(describePortal(""), execute(""), sync_),
			until('C', append(unnamed("INSERT INTO ledger VALUES ($1::bigint, 1/0)", "$c"), flush)...), one(append(put(2), sync_)...), one(append(put(3), sync_)...),
		}},
		{name: "syncs-only", bursts: []burst{one(sync_), one(sync_, sync_), one(flush, sync_)}},

		// Prepared statements.
		{name: "prepared", bursts: []burst{
			one(parse("w", "INSERT INTO ledger VALUES ($1::bigint, $2::int) RETURNING seq"), describeStatement("w"), sync_),
			one(parse("r", "SELECT amount FROM account WHERE client = $1::bigint"), describeStatement("r"), sync_),
			one(bind("", "w", "$c", "1"), execute(""), sync_), one(bind("", "r", "$c"), execute(""), sync_), one(bind("", "w", "$c", "2"), execute(""), sync_),
			one(closeStatement("w"), sync_), one(bind("", "w", "$c", "3"), execute(""), sync_), one(parse("w", "SELECT 3"), bind("", "w"), execute(""), sync_),
		}},
		{name: "prepared-at-once", bursts: []burst{
			one(parse("w", "INSERT INTO ledger VALUES ($1::bigint, $2::int)"), describeStatement("w"), bind("", "w", "$c", "1"), describePortal(""), execute(""), sync_),
			one(bind("", "w", "$c", "2"), execute(""), sync_),
		}},
		{name: "prepared-sql", may: []string{pinned, unknown}, bursts: queries("PREPARE p AS INSERT INTO ledger VALUES ($c, $1) RETURNING seq", "EXECUTE p(1)", "EXECUTE p(2)", "DEALLOCATE p", insert(3))},

		// COPY.
		{name: "copy-in", may: []string{failed, unknown}, bursts: []burst{until('G', query("COPY ledger FROM STDIN")), one(copyData("$c\t1\tx\n$c\t2\t\\N\n"), copyData("$c\t3\ty\n"), copyDone), one(query("SELECT count(*) FROM ledger WHERE client = $c"))}},
		{name: "copy-in-extended", may: []string{failed, unknown}, bursts: []burst{until('G', parse("", "COPY ledger (client, seq) FROM STDIN"), bind("", ""), execute(""), flush), one(copyData("$c\t1\n"), copyDone, sync_)}},
		{name: "copy-in-eager", may: []string{failed, unknown}, bursts: []burst{
			one(query("COPY ledger FROM STDIN"), copyData("$c\t1\tx\n"), copyData("$c\t2\ty\n"), copyDone),
			one(query(insert(3)), query("COPY ledger FROM STDIN"), copyData("$c\t4\tx\n"), copyData("$c\t5\ty\n"), copyDone),
		}},
		{name: "copy-in-fails", may: []string{failed, unknown}, bursts: []burst{
			until('G', query("COPY ledger FROM STDIN")), one(copyData("$c\t1\tx\n"), copyData("$c\tno\n"), copyDone),
			until('G', query("COPY ledger FROM STDIN")), one(copyData("$c\t1\tx\n"), copyFail("the client does not want it")),
		}},
		{name: "copy-in-block", bursts: bursts(queries("BEGIN"), []burst{until('G', query("COPY ledger (client, seq) FROM STDIN")), one(copyData("$c\t1\n$c\t2\n"), copyDone)}, queries("COMMIT"))},
		{name: "copy-in-large", most: 8, may: []string{failed, unknown}, bursts: []burst{until('G', query("COPY ledger FROM STDIN")), one(append(five(func(i int) []message {
			return []message{copyData(fmt.Sprintf("$c\t%d\t%s\n", i, strings.Repeat("y", 30_000)))}
		}), copyDone)...)}},
		{name: "copy-out", may: []string{pinned, failed}, bursts: queries("COPY (SELECT i, 'text' FROM generate_series(1, 6) i) TO STDOUT", "COPY (SELECT amount FROM account WHERE client = $c) TO STDOUT")},
		{name: "copy-out-large", most: 8, may: []string{pinned, failed}, bursts: queries("COPY (SELECT i, repeat('z', 5000) FROM generate_series(1, 40) i) TO STDOUT")},
		{name: "copy-out-writes", may: []string{pinned, failed, unknown}, bursts: queries("COPY (INSERT INTO ledger VALUES ($c, 1), ($c, 2) RETURNING seq) TO STDOUT")},

		// Cursors and portals.
		{name: "cursor", bursts: queries("BEGIN", "DECLARE cur CURSOR FOR SELECT generate_series(1, 6)", "FETCH 2 FROM cur", insert(1), "FETCH 2 FROM cur", "CLOSE cur", "COMMIT")},
		{name: "cursor-hold", may: []string{pinned, unknown}, bursts: queries("DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 4)", "FETCH 2 FROM held", insert(1), "FETCH 2 FROM held", "CLOSE held")},
		{name: "portal-rows", bursts: bursts(queries("BEGIN"), []burst{one(parse("", "SELECT generate_series(1, 5)"), bind("pp", ""), describePortal("pp"), fetch("pp", 2), sync_), one(fetch("pp", 2), sync_), one(fetch("pp", 0), sync_)}, queries("COMMIT"))},
		{name: "portal-autocommit", may: []string{failed}, bursts: []burst{
			one(parse("", "INSERT INTO ledger SELECT $1::bigint, i FROM generate_series(1, 5) i RETURNING seq"), bind("", "", "$c"), fetch("", 2), sync_),
			one(parse("", "SELECT generate_series(1, 5)"), bind("", ""), fetch("", 2), fetch("", 2), fetch("", 0), sync_),
		}},

		// Settings.
		{name: "settings", bursts: queries("SET work_mem = '7MB'", "SET app.user_id = '$c'", "SELECT v FROM secret", "SELECT set_config('app.more', 'x', false)", "RESET work_mem", insert(1), "SET statement_timeout = '1min'")},
		{name: "settings-local", bursts: queries("BEGIN", "SET LOCAL app.user_id = '$c'", "SELECT v FROM secret", "SET LOCAL work_mem = '9MB'", insert(1), "COMMIT", "SELECT v FROM secret")},
		{name: "settings-block", bursts: queries("SET app.user_id = '0'", "BEGIN", "SET app.user_id = '$c'", "SELECT v FROM secret", "SAVEPOINT a", "SET work_mem = '8MB'", "ROLLBACK TO a", insert(1), "COMMIT", "SELECT v FROM secret",
			"BEGIN", "SET app.user_id = '1'", "ROLLBACK", "SELECT v FROM secret")},
		{name: "settings-function", bursts: bursts(queries("SELECT sets('work_mem', '11MB')", "SHOW work_mem"), []burst{extended("SELECT set_config('app.user_id', $1, false)", "$c")}, queries("SELECT v FROM secret", insert(1)))},
		{name: "settings-write", bursts: queries("SELECT set_config('app.user_id', '$c', false), put($c, 1)", "SELECT v FROM secret")},
		{name: "role", bursts: queries("SET ROLE clerk", "SELECT current_user", insert(1), "RESET ROLE", "SET search_path = other, public", "SELECT v FROM here", "SELECT current_user")},
		{name: "discard", bursts: queries("SET app.user_id = '$c'", "SET work_mem = '6MB'", "DISCARD ALL", insert(1), "SHOW work_mem")},

		// What stays at a server.
		{name: "listen", may: []string{pinned, unknown}, bursts: queries("LISTEN ch$c", "NOTIFY ch$c, 'one'", insert(1), "BEGIN", "NOTIFY ch$c, 'two'", insert(2), "COMMIT", "UNLISTEN *", insert(3))},
		{name: "notify", bursts: queries("NOTIFY ch$c, 'one'", "SELECT pg_notify('ch$c', 'two')", "BEGIN", "NOTIFY ch$c", insert(1), "COMMIT")},
		{name: "temporary", may: []string{pinned, unknown}, bursts: queries("CREATE TEMP TABLE mine (a int)", "INSERT INTO mine VALUES (1)", "INSERT INTO ledger SELECT $c, a FROM mine", "BEGIN", insert(2), "COMMIT", "DROP TABLE mine", insert(3))},
		{name: "advisory", may: []string{pinned, unknown}, bursts: queries("SELECT pg_advisory_lock($c)", insert(1), "SELECT pg_advisory_unlock($c)", insert(2))},
		{name: "advisory-block", bursts: queries("BEGIN", "SELECT pg_advisory_xact_lock($c)", insert(1), "COMMIT")},

		// What cannot be told, or run again.
		{name: "call-commits", parts: true, may: []string{unknown}, bursts: queries("CALL thrice($c)", insert(9))},
		{name: "do-commits", parts: true, may: []string{unknown}, bursts: queries("DO $do$ BEGIN INSERT INTO ledger VALUES ($c, 1); COMMIT; INSERT INTO ledger VALUES ($c, 2); END $do$")},
		{name: "vacuum", may: []string{unknown}, bursts: queries("VACUUM small", "VACUUM (ANALYZE) small", insert(1))},
		{name: "ddl", may: []string{unknown, failed}, bursts: queries("CREATE TABLE other.t$c (a int)", "DROP TABLE other.t$c", insert(1))},
		{name: "prepare-transaction", parts: true, may: []string{unknown, pinned}, bursts: queries("BEGIN", insert(1), "PREPARE TRANSACTION 'p$c'", "COMMIT PREPARED 'p$c'", "BEGIN", insert(2), "PREPARE TRANSACTION 'q$c'", "ROLLBACK PREPARED 'q$c'", insert(3))},
		{name: "explain", bursts: queries("EXPLAIN (COSTS OFF) SELECT 1", "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) INSERT INTO ledger VALUES ($c, 1)")},
	}
	return append(all, apps()...)
}

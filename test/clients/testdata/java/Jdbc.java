// PgJDBC, alone and under HikariCP: server-prepared statements, batches, fetch size, savepoints, generated keys, COPY, LISTEN,
// large objects, cancellation, changes of tables under prepared statements.
import com.zaxxer.hikari.HikariConfig;
import com.zaxxer.hikari.HikariDataSource;
import java.io.StringReader;
import java.io.StringWriter;
import java.sql.*;
import java.util.*;
import java.util.concurrent.*;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.copy.CopyManager;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;

public class Jdbc {
	static String url(String more) {
		return "jdbc:postgresql://" + System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE") + "?sslmode=disable" + more;
	}

	static Connection connect(String more) throws SQLException {
		return DriverManager.getConnection(url(more), System.getenv("PGUSER"), System.getenv("PGPASSWORD"));
	}

	static void say(String what, Object v) { System.out.println(what + ": " + v); }

	static void check(boolean ok, Object what) { if (!ok) throw new AssertionError(what); }

	static String one(Connection c, String sql) throws SQLException {
		try (Statement s = c.createStatement(); ResultSet r = s.executeQuery(sql)) { r.next(); return r.getString(1); }
	}

	static void refused(String what, Callable<?> f) throws Exception {
		try { f.call(); } catch (SQLException e) { say(what, e.getSQLState() + " " + e.getMessage().lines().findFirst().get()); return; }
		throw new AssertionError(what + " was not refused");
	}

	static void prepared(String more) throws Exception {
		try (Connection c = connect(more)) {
			try (Statement s = c.createStatement()) {
				s.execute("DROP TABLE IF EXISTS item; CREATE TABLE item(id serial PRIMARY KEY, name text, at timestamptz, n numeric, b bytea)");
			}
			try (PreparedStatement p = c.prepareStatement("INSERT INTO item(name, at, n, b) VALUES (?, ?, ?, ?)", Statement.RETURN_GENERATED_KEYS)) {
				for (int i = 0; i < 12; i++) {
					p.setString(1, "n'" + i);
					p.setObject(2, java.time.OffsetDateTime.of(2024, 1, 1 + i, 0, 0, 0, 0, java.time.ZoneOffset.UTC));
					p.setBigDecimal(3, new java.math.BigDecimal(i).movePointLeft(1));
					p.setBytes(4, new byte[] {0, (byte) i, -1});
					p.executeUpdate();
					try (ResultSet k = p.getGeneratedKeys()) { k.next(); check(k.getInt("id") == i + 1, i); }
				}
			}
			try (PreparedStatement p = c.prepareStatement("SELECT name, n, at, b FROM item WHERE id = ?")) {
				for (int i = 1; i <= 12; i++) { // from prepareThreshold on the server knows it, and results are binary
					p.setInt(1, i);
					try (ResultSet r = p.executeQuery()) {
						r.next();
						check(r.getString(1).equals("n'" + (i - 1)) && r.getBytes(4)[1] == i - 1 && r.getDouble(2) == (i - 1) / 10.0, i);
					}
				}
			}
			c.setAutoCommit(false);
			try (PreparedStatement p = c.prepareStatement("UPDATE item SET n = n + ? WHERE id = ?")) {
				for (int round = 0; round < 8; round++) {
					for (int i = 1; i <= 12; i++) { p.setInt(1, round); p.setInt(2, i); p.addBatch(); }
					check(Arrays.stream(p.executeBatch()).sum() == 12, round);
					c.commit();
				}
				for (int i = 0; i < 3; i++) { p.setInt(1, i); p.setInt(2, i); p.addBatch(); }
				try (Statement s = c.createStatement()) { s.execute("SELECT 1"); }
				c.rollback();
				p.clearBatch();
			}
			say("sum", one(c, "SELECT sum(n) FROM item"));
			try (Statement s = c.createStatement()) {
				for (int i = 0; i < 5; i++) s.addBatch("INSERT INTO item(name) VALUES ('batch" + i + "')");
				s.addBatch("SELECT 1/0");
				refused("batch", () -> s.executeBatch());
			}
			c.rollback();
			Savepoint a = c.setSavepoint("a");
			try (Statement s = c.createStatement()) { s.execute("DELETE FROM item"); refused("error", () -> s.execute("SELECT 1/0")); try { s.execute("SELECT 1"); say("then", "autosave has put it right"); } catch (SQLException e) { say("then", e.getSQLState()); } }
			c.rollback(a);
			c.releaseSavepoint(a);
			say("rows", one(c, "SELECT count(*) FROM item"));
			c.commit();
			try (PreparedStatement p = c.prepareStatement("SELECT g, repeat('x', 20) FROM generate_series(1, ?) g")) {
				p.setFetchSize(70);
				for (int round = 0; round < 7; round++) {
					p.setInt(1, 1000);
					long sum = 0;
					try (ResultSet r = p.executeQuery()) { while (r.next()) { sum += r.getInt(1); if (round == 6 && r.getInt(1) == 100) break; } }
					if (round < 2) say("fetched", sum);
					c.commit();
				}
			}
			for (int level : new int[] {Connection.TRANSACTION_SERIALIZABLE, Connection.TRANSACTION_REPEATABLE_READ, Connection.TRANSACTION_READ_COMMITTED}) {
				c.setTransactionIsolation(level);
				say("isolation", one(c, "SHOW transaction_isolation"));
				c.commit();
			}
			c.setReadOnly(true);
			refused("read only", () -> { try (Statement s = c.createStatement()) { return s.execute("DELETE FROM item"); } });
			c.rollback();
			c.setReadOnly(false);
			c.setAutoCommit(true);
			try (Statement s = c.createStatement()) { s.execute("SET search_path = public, pg_catalog; SET TIME ZONE 'Asia/Seoul'; SET app.me = 'x'"); }
			Set<String> seen = new TreeSet<>();
			for (int i = 0; i < 8; i++) seen.add(one(c, "SELECT current_setting('search_path') || current_setting('TimeZone') || current_setting('app.me')"));
			say("settings", seen);
			c.setSchema("pg_catalog");
			say("schema", c.getSchema());
			c.setSchema("public");
			try (PreparedStatement p = c.prepareStatement("SELECT * FROM item WHERE id = ?")) {
				for (int i = 0; i < 7; i++) { p.setInt(1, 1); p.executeQuery().close(); }
				try (Statement s = c.createStatement()) { s.execute("ALTER TABLE item ADD COLUMN more int DEFAULT 5"); }
				p.setInt(1, 1);
				try (ResultSet r = p.executeQuery()) { r.next(); say("changed", r.getInt("more")); }
			}
			for (String sql : new String[] {"SELEC", "SELECT nothing", "INSERT INTO item(id) VALUES (1)"})
				refused(sql, () -> { try (Statement s = c.createStatement()) { return s.execute(sql); } });
			DatabaseMetaData m = c.getMetaData();
			try (ResultSet r = m.getColumns(null, "public", "item", "%")) { StringJoiner j = new StringJoiner(","); while (r.next()) j.add(r.getString("COLUMN_NAME")); say("columns", j); }
			try (CallableStatement f = c.prepareCall("{? = call upper(?)}")) { f.registerOutParameter(1, Types.VARCHAR); f.setString(2, "up"); f.execute(); say("called", f.getString(1)); }
			try (Statement s = c.createStatement()) {
				s.setQueryTimeout(1);
				refused("time-out", () -> s.execute("SELECT pg_sleep(60)"));
			}
			say("goes on", one(c, "SELECT 1"));
			try (Statement s = c.createStatement(ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_UPDATABLE); ResultSet r = s.executeQuery("SELECT id, name FROM item ORDER BY id")) {
				r.absolute(3);
				r.updateString("name", "updated");
				r.updateRow();
			}
			say("updated", one(c, "SELECT name FROM item WHERE id = 3"));
		}
	}

	static void apis() throws Exception {
		try (Connection c = connect(""); Connection other = connect(""); Statement s = c.createStatement()) {
			CopyManager copy = c.unwrap(PGConnection.class).getCopyAPI();
			s.execute("CREATE TABLE copied(a int, b text)");
			StringBuilder b = new StringBuilder();
			for (int i = 0; i < 3000; i++) b.append(i).append("\tline ").append(i).append('\n');
			say("copied in", copy.copyIn("COPY copied FROM STDIN", new StringReader(b.toString())));
			StringWriter w = new StringWriter();
			say("copied out", copy.copyOut("COPY (SELECT * FROM copied ORDER BY a) TO STDOUT", w) + " " + w.toString().equals(b.toString()));
			refused("bad data", () -> copy.copyIn("COPY copied FROM STDIN", new StringReader("x\ty\n")));
			s.execute("LISTEN news");
			try (Statement o = other.createStatement()) { for (int i = 0; i < 3; i++) o.execute("NOTIFY news, 'n" + i + "'"); }
			List<String> got = new ArrayList<>();
			for (long end = System.nanoTime() + 20_000_000_000L; got.size() < 3 && System.nanoTime() < end;) {
				PGNotification[] ns = c.unwrap(PGConnection.class).getNotifications(1000);
				if (ns != null) for (PGNotification n : ns) got.add(n.getName() + "=" + n.getParameter());
			}
			say("notified", got);
			s.execute("UNLISTEN *");
			s.execute("DO $$ BEGIN RAISE NOTICE 'hear'; END $$");
			say("warning", s.getWarnings().getMessage());
			c.setAutoCommit(false);
			LargeObjectManager lom = c.unwrap(PGConnection.class).getLargeObjectAPI();
			long oid = lom.createLO();
			LargeObject lo = lom.open(oid, LargeObjectManager.READWRITE);
			lo.write(new byte[100000]);
			lo.seek(50);
			say("large object", lo.read(10).length + " " + lo.size64());
			lo.close();
			lom.unlink(oid);
			c.commit();
		}
	}

	static void pooled() throws Exception {
		HikariConfig cfg = new HikariConfig();
		cfg.setJdbcUrl(url("&prepareThreshold=2"));
		cfg.setUsername(System.getenv("PGUSER"));
		cfg.setPassword(System.getenv("PGPASSWORD"));
		cfg.setMaximumPoolSize(6);
		cfg.setConnectionInitSql("SET app.me = 'pool'");
		try (HikariDataSource ds = new HikariDataSource(cfg)) {
			try (Connection c = ds.getConnection(); Statement s = c.createStatement()) { s.execute("CREATE TABLE account(id int PRIMARY KEY, n int); INSERT INTO account SELECT g, 0 FROM generate_series(1, 5) g"); }
			ExecutorService ex = Executors.newFixedThreadPool(12);
			List<Future<String>> done = new ArrayList<>();
			for (int i = 0; i < 200; i++) {
				final int k = i;
				done.add(ex.submit(() -> {
					try (Connection c = ds.getConnection()) {
						c.setAutoCommit(false);
						try (PreparedStatement p = c.prepareStatement("UPDATE account SET n = n + ? WHERE id = ? RETURNING current_setting('app.me')")) {
							p.setInt(1, k);
							p.setInt(2, 1 + k % 5);
							try (ResultSet r = p.executeQuery()) {
								r.next();
								String me = r.getString(1);
								if (k % 10 == 3) c.rollback(); else c.commit();
								return me;
							}
						}
					}
				}));
			}
			Set<String> seen = new TreeSet<>();
			for (Future<String> f : done) seen.add(f.get());
			ex.shutdown();
			try (Connection c = ds.getConnection()) { say("accounts", seen + " " + one(c, "SELECT string_agg(n::text, ',' ORDER BY id) FROM account")); }
		}
	}

	public static void main(String[] args) throws Exception {
		prepared("");
		prepared("&prepareThreshold=-1");
		prepared("&preferQueryMode=extendedCacheEverything&reWriteBatchedInserts=true");
		prepared("&autosave=always&ApplicationName=autosave");
		apis();
		pooled();
	}
}

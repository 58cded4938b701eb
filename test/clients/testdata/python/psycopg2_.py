"""psycopg2, which uses the simple protocol: transactions, named cursors, COPY, notifications, two-phase, large objects."""
import io
import select

import psycopg2
import psycopg2.extensions
import psycopg2.extras
import psycopg2.pool


def say(what, v):
    print(f"{what}: {v!r}", flush=True)


c = psycopg2.connect("")
cur = c.cursor()
cur.execute("CREATE TABLE item(id int PRIMARY KEY, name text, doc jsonb)")
psycopg2.extras.execute_values(cur, "INSERT INTO item VALUES %s", [(i, f"n'{i}\\", psycopg2.extras.Json({"i": i})) for i in range(100)])
c.commit()
for i in range(10):
    cur.execute("SELECT name, doc FROM item WHERE id = %s", (i,))
    assert cur.fetchone() == (f"n'{i}\\", {"i": i})
    c.commit()
psycopg2.extras.execute_batch(cur, "UPDATE item SET name = %s WHERE id = %s", [(f"b{i}", i) for i in range(50)], page_size=7)
c.rollback()
cur.execute("SELECT min(name), max(name) FROM item")
say("rolled back", cur.fetchone())
try:
    cur.execute("SELECT 1/0")
except psycopg2.Error as e:
    say("error", (e.pgcode, e.pgerror.splitlines()[0]))
try:
    cur.execute("SELECT 1")
except psycopg2.Error as e:
    say("then", e.pgcode)
c.rollback()
with c, c.cursor("named") as named:
    named.itersize = 30
    named.execute("SELECT id FROM item ORDER BY id")
    say("named", sum(r[0] for r in named))
held = c.cursor("held", withhold=True)
held.execute("SELECT id FROM item ORDER BY id")
c.commit()
cur.execute("SELECT 1")
c.commit()
say("held", held.fetchmany(3))
held.close()
c.commit()
c.set_session(isolation_level="SERIALIZABLE", readonly=True)
cur.execute("SHOW transaction_isolation")
say("isolation", cur.fetchone())
c.commit()
c.set_session(isolation_level="DEFAULT", readonly=False, autocommit=True)
cur.execute("SET DateStyle = 'SQL, DMY'; SET app.me = 'x'")
seen = set()
for _ in range(8):
    cur.execute("SELECT date '2024-02-01'::text, current_setting('app.me')")
    seen.add(cur.fetchone())
say("settings", (seen, c.get_parameter_status("DateStyle")))
c.reset()
c.set_client_encoding("LATIN1")
cur.execute("SELECT 'é'")
say("encoding", (c.encoding, cur.fetchone()))
c.set_client_encoding("UTF8")
c.commit()
c.autocommit = True
cur.execute("CREATE TABLE copied(a int, b text)")
cur.copy_expert("COPY copied FROM STDIN", io.StringIO("".join(f"{i}\tx{i}\n" for i in range(3000))))
out = io.StringIO()
cur.copy_expert("COPY (SELECT * FROM copied ORDER BY a) TO STDOUT CSV", out)
say("copied", (len(out.getvalue()), out.getvalue()[:30]))
try:
    cur.copy_expert("COPY copied FROM STDIN", io.StringIO("x\ty\n"))
except psycopg2.Error as e:
    say("bad data", e.pgcode)
other = psycopg2.connect("")
other.autocommit = True
cur.execute("LISTEN news")
other.cursor().execute("NOTIFY news, 'hello'")
while not c.notifies:
    select.select([c], [], [], 10)
    c.poll()
say("notified", [(n.channel, n.payload) for n in c.notifies])
cur.execute("UNLISTEN *")
cur.execute("DO $$ BEGIN RAISE NOTICE 'hear'; END $$")
say("notices", c.notices)
c.autocommit = False
lob = c.lobject(0, "wb")
lob.write(b"large" * 1000)
oid = lob.oid
lob.close()
c.commit()
lob = c.lobject(oid, "rb")
say("large object", len(lob.read()))
lob.unlink()
c.commit()
c.tpc_begin(c.xid(1, "g", "b"))
cur.execute("UPDATE item SET name = 'prepared' WHERE id = 4")
c.tpc_prepare()
c.tpc_commit()
cur.execute("SELECT name FROM item WHERE id = 4")
say("two-phase", cur.fetchone())
c.commit()
for name in ("REPEATABLE READ", "READ COMMITTED"):
    c.set_isolation_level({"REPEATABLE READ": 2, "READ COMMITTED": 1}[name])
    cur.execute("SHOW transaction_isolation")
    say("isolation", cur.fetchone())
    c.commit()
pool = psycopg2.pool.SimpleConnectionPool(1, 3, "")
for i in range(10):
    k = pool.getconn()
    with k, k.cursor() as kc:
        kc.execute("SELECT set_config('app.me', %s, true)", (str(i),))
        kc.execute("SELECT current_setting('app.me')")
        assert kc.fetchone() == (str(i),)
    pool.putconn(k)
pool.closeall()
c.close()
other.close()

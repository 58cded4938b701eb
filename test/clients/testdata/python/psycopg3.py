"""psycopg 3: prepared statements (also by itself, from the fifth use on), pipeline mode, server-side cursors, COPY, notifications, two-phase."""
import asyncio
import datetime
import logging
import threading
import time

import psycopg
from psycopg import errors, sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb


# What it logs when a pipeline has failed depends on when the error arrives.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)


def say(what, v):
    print(f"{what}: {v!r}", flush=True)


def plain():
    with psycopg.connect("", autocommit=True) as c:
        c.execute("CREATE TABLE item(id int PRIMARY KEY, name text, at timestamptz, doc jsonb, b bytea, n numeric, tags text[])")
        with c.cursor() as cur:
            cur.executemany("INSERT INTO item VALUES (%s, %s, %s, %s, %s, %s, %s)", [
                (i, f"n'{i}\\", datetime.datetime(2024, 1, 1 + i, tzinfo=datetime.timezone.utc), Jsonb({"i": i}), bytes([0, i, 255]), i / 4, ["a", f"b,{i}"])
                for i in range(20)])
            say("rowcount", cur.rowcount)
        for binary in (False, True):
            say("rows", c.cursor(binary=binary, row_factory=dict_row).execute("SELECT * FROM item ORDER BY id LIMIT 2").fetchall())
        for i in range(20):
            assert c.execute("SELECT name FROM item WHERE id = %s", (i,)).fetchone() == (f"n'{i}\\",)
            assert c.execute("SELECT %s::int + id FROM item WHERE id = %s", (i, i), prepare=True).fetchone() == (2 * i,)
        with c.transaction():
            c.execute("UPDATE item SET name = 'one' WHERE id = 1")
            try:
                with c.transaction():
                    c.execute("UPDATE item SET name = 'two' WHERE id = 2")
                    c.execute("SELECT 1/0")
            except errors.DivisionByZero as e:
                say("savepoint", (e.sqlstate, e.diag.message_primary))
            with c.transaction(force_rollback=True):
                c.execute("DELETE FROM item")
        say("after", c.execute("SELECT id, name FROM item WHERE id IN (1, 2) ORDER BY id").fetchall())
        c.execute("SET TIME ZONE 'Asia/Seoul'")
        c.execute("SELECT set_config('app.user_id', %s, false)", ("7",))
        say("settings", {c.execute("SELECT current_setting('TimeZone'), current_setting('app.user_id'), at FROM item WHERE id = 3").fetchone() for _ in range(10)})
        say("time zone", c.info.timezone.key)
        c.execute("SET client_encoding = 'LATIN1'")
        say("encoding", (c.info.encoding, {c.execute("SELECT 'é' || %s", ("ü",)).fetchone()[0] for _ in range(6)}))
        c.execute("RESET client_encoding")
        for s in ("SELECT 1/0", "SELEC", "SELECT nothing", "INSERT INTO item(id) VALUES (1)"):
            try:
                c.execute(s)
            except psycopg.Error as e:
                say(s, (e.sqlstate, e.diag.message_primary, e.diag.constraint_name))
        say("scroll", c.execute(sql.SQL("SELECT {} FROM item ORDER BY 1").format(sql.Identifier("id"))).fetchmany(3))


def transactions():
    with psycopg.connect("") as c:  # implicit transactions
        for isolation in (psycopg.IsolationLevel.SERIALIZABLE, psycopg.IsolationLevel.REPEATABLE_READ, None):
            c.isolation_level = isolation
            for _ in range(3):
                say("isolation", c.execute("SHOW transaction_isolation").fetchone())
                c.commit()
        c.read_only = True
        try:
            c.execute("DELETE FROM item")
        except errors.ReadOnlySqlTransaction as e:
            say("read only", e.sqlstate)
        c.rollback()
        c.read_only = None
        with c.cursor(name="big") as cur:
            cur.itersize = 100
            cur.execute("SELECT g, repeat('x', 50) FROM generate_series(1, 1050) g")
            say("named cursor", sum(r[0] + len(r[1]) for r in cur))
        c.commit()
        with c.cursor(name="scrolled", scrollable=True, withhold=True) as cur:
            cur.execute("SELECT g FROM generate_series(1, 10) g")
            c.commit()
            c.execute("SELECT 1")
            c.commit()
            cur.scroll(5)
            say("held", cur.fetchmany(2))
            c.commit()
        c.commit()
        c.tpc_begin(c.xid(1, "gtrid", "branch"))
        c.execute("UPDATE item SET name = 'prepared' WHERE id = 4")
        c.tpc_prepare()
        c.tpc_commit()
        say("two-phase", c.execute("SELECT name FROM item WHERE id = 4").fetchone())


def pipelined():
    with psycopg.connect("", autocommit=True) as c:
        with c.pipeline() as p:
            curs = [c.execute("SELECT %s::int", (i,)) for i in range(50)]
            p.sync()
            say("pipeline", sum(k.fetchone()[0] for k in curs))
        with c.pipeline(), c.transaction():
            c.execute("UPDATE item SET name = 'piped' WHERE id = 5")
            say("in it", c.execute("SELECT name FROM item WHERE id = 5").fetchone())
        try:
            with c.pipeline() as p:
                c.execute("UPDATE item SET name = 'gone' WHERE id = 6")
                c.execute("SELECT 1/0")
                c.execute("SELECT 1")
                p.sync()
        except psycopg.Error as e:
            say("error in it", e.sqlstate)
        say("after", c.execute("SELECT name FROM item WHERE id = 6").fetchone())
        with c.pipeline():
            with c.cursor() as cur:
                cur.executemany("INSERT INTO item(id, name) VALUES (%s, %s) RETURNING id", [(1000 + i, "x") for i in range(100)], returning=True)
                n = 0
                while True:
                    n += cur.fetchone()[0]
                    if not cur.nextset():
                        break
                say("returned", n)


def copies():
    with psycopg.connect("", autocommit=True) as c:
        c.execute("CREATE TABLE copied(a int, b text)")
        cur = c.cursor()
        with cur.copy("COPY copied FROM STDIN") as cp:
            for i in range(5000):
                cp.write_row((i, f"line\t{i}"))
        with cur.copy("COPY copied (a) FROM STDIN (FORMAT BINARY)") as cp:
            cp.set_types(["int4"])
            cp.write_row((-1,))
        with cur.copy("COPY (SELECT * FROM copied ORDER BY a) TO STDOUT") as cp:
            data = b"".join(bytes(d) for d in cp)
        say("copied", (len(data), data[:40]))
        try:
            with cur.copy("COPY copied FROM STDIN") as cp:
                cp.write_row((1, "x"))
                raise ValueError("changed my mind")
        except errors.QueryCanceled as e:
            say("given up", e.sqlstate)
        try:
            with cur.copy("COPY copied FROM STDIN") as cp:
                cp.write("not a number\tx\n" * 20000)
        except psycopg.Error as e:
            say("bad data", e.sqlstate)
        say("rows", c.execute("SELECT count(*), sum(a) FROM copied").fetchone())


def notified():
    with psycopg.connect("", autocommit=True) as c, psycopg.connect("", autocommit=True) as other:
        c.execute("LISTEN news")
        for i in range(3):
            other.execute("SELECT pg_notify('news', %s)", (str(i),))
        got = []
        for n in c.notifies():
            got.append((n.channel, n.payload))
            if len(got) == 3:
                break
        say("notified", got)
        c.execute("UNLISTEN *")
        notices = []
        c.add_notice_handler(lambda d: notices.append((d.severity, d.message_primary)))
        c.execute("DO $$ BEGIN RAISE WARNING 'hear'; END $$")
        say("notices", notices)
        threading.Timer(0.3, c.cancel).start()
        begin = time.monotonic()
        try:
            c.execute("SELECT pg_sleep(60)")
        except errors.QueryCanceled as e:
            say("cancelled", (e.sqlstate, time.monotonic() - begin < 30))
        say("goes on", c.execute("SELECT 1").fetchone())


async def many():
    async def one(i):
        async with await psycopg.AsyncConnection.connect("", autocommit=True) as c:
            await c.execute("SELECT set_config('app.me', %s, false)", (str(i),))
            for k in range(10):
                row = await (await c.execute("SELECT current_setting('app.me'), %s::int", (k,))).fetchone()
                assert row == (str(i), k), (row, i, k)
        return i
    say("many", sum(await asyncio.gather(*(one(i) for i in range(20)))))


plain()
transactions()
pipelined()
copies()
notified()
asyncio.run(many())

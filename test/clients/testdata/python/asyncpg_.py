"""asyncpg: it prepares and caches everything, looks up types by itself, and resets connections of a pool."""
import asyncio
import datetime
import io

import asyncpg


def say(what, v):
    print(f"{what}: {v!r}", flush=True)


async def main():
    c = await asyncpg.connect()
    await c.execute("CREATE TYPE mood AS ENUM ('glad', 'sad'); CREATE TYPE pt AS (x int, y text)")
    await c.execute("CREATE TABLE item(id int PRIMARY KEY, m mood, p pt, at timestamptz, tags text[], r int4range)")
    await c.executemany("INSERT INTO item VALUES ($1, $2, $3, $4, $5, $6)", [
        (i, ("glad", "sad")[i % 2], (i, f"y{i}"), datetime.datetime(2024, 1, 1 + i, tzinfo=datetime.timezone.utc), ["a", str(i)], asyncpg.Range(i, i + 5))
        for i in range(20)])
    say("rows", [tuple(r) for r in await c.fetch("SELECT * FROM item ORDER BY id LIMIT 2")])
    st = await c.prepare("SELECT p, tags FROM item WHERE id = $1")
    for i in range(20):
        row = await st.fetchrow(i)
        assert row["p"]["y"] == f"y{i}", row
    say("parameters", [p.name for p in st.get_parameters()] + [a.name for a in st.get_attributes()])
    for i in range(300):  # more than the cache holds
        assert await c.fetchval(f"SELECT $1::int + {i}", 1) == 1 + i
    async with c.transaction(isolation="serializable"):
        await c.execute("UPDATE item SET m = 'sad' WHERE id = 0")
        try:
            async with c.transaction():
                await c.execute("DELETE FROM item")
                await c.fetch("SELECT 1/0")
        except asyncpg.DivisionByZeroError as e:
            say("savepoint", e.sqlstate)
        total = 0
        async for r in c.cursor("SELECT id FROM item ORDER BY id", prefetch=6):
            total += r["id"]
        say("cursor", total)
        cur = await c.cursor("SELECT id FROM item ORDER BY id")
        await cur.forward(10)
        say("forward", [r["id"] for r in await cur.fetch(3)])
    say("copied", await c.copy_records_to_table("item", records=[(100 + i, None, None, None, None, None) for i in range(500)]))
    out = io.BytesIO()
    say("copied", await c.copy_from_query("SELECT id FROM item ORDER BY id", output=out))
    say("bytes", len(out.getvalue()))
    heard = asyncio.Queue()
    other = await asyncpg.connect()
    await c.add_listener("news", lambda _c, _pid, channel, payload: heard.put_nowait((channel, payload)))
    await other.execute("NOTIFY news, 'a'")
    say("heard", await asyncio.wait_for(heard.get(), 20))
    await c.reset()
    await other.close()
    try:
        await c.fetch("SELECT pg_sleep(60)", timeout=0.5)
    except asyncio.TimeoutError:
        say("cancelled", True)
    say("goes on", await c.fetchval("SELECT 1"))
    # A table that changes under a prepared statement.
    assert await c.fetchrow("SELECT * FROM item WHERE id = 0")
    await c.execute("ALTER TABLE item ADD COLUMN more int DEFAULT 5")
    say("changed", tuple(await c.fetchrow("SELECT * FROM item WHERE id = 0"))[-1])
    await c.execute("SET search_path = pg_catalog, public; SET TIME ZONE 'Asia/Seoul'")
    say("settings", {(await c.fetchval("SHOW search_path"), await c.fetchval("SHOW TimeZone")) for _ in range(6)})
    say("told", c.get_settings().TimeZone)
    await c.close()

    async with asyncpg.create_pool(min_size=2, max_size=5) as pool:
        async def one(i):
            async with pool.acquire() as k, k.transaction():
                await k.execute("SELECT set_config('app.me', $1, true)", str(i))
                await asyncio.sleep(0)
                assert await k.fetchval("SELECT current_setting('app.me')") == str(i)
                return await k.fetchval("SELECT $1::int", i)
        say("pool", sum(await asyncio.gather(*(one(i) for i in range(100)))))
    for e in ("SELECT nothing", "INSERT INTO item(id) VALUES (1)"):
        c = await asyncpg.connect()
        try:
            await c.execute(e)
        except asyncpg.PostgresError as err:
            say(e, (err.sqlstate, str(err)))
        await c.close()


asyncio.run(main())

// postgres.js: it pipelines, prepares what it sends by itself, and keeps several connections.
const assert = require('node:assert')
const postgres = require('postgres')
const { pipeline } = require('node:stream/promises')
const { Readable, Writable } = require('node:stream')

const say = (what, v) => console.log(what + ':', JSON.stringify(v))
const sql = postgres({ max: 4, onnotice: () => {} });

(async () => {
  await sql`CREATE TABLE item(id int PRIMARY KEY, name text, doc jsonb, tags int[], at timestamptz)`
  await sql`INSERT INTO item ${sql(Array.from({ length: 50 }, (_, id) => ({ id, name: `n${id}`, doc: sql.json({ id }), tags: [id, id + 1], at: new Date(Date.UTC(2024, 1, 1, id % 24)) })))}`
  say('rows', await sql`SELECT * FROM item WHERE id IN ${sql([1, 2, 3])} ORDER BY id`)
  for (let i = 0; i < 30; i++) { // one statement, prepared once per connection
    const [r] = await sql`SELECT name, tags FROM item WHERE id = ${i}`
    assert.equal(r.name, 'n' + i)
  }
  await Promise.all(Array.from({ length: 200 }, async (_, i) => { // pipelined
    const [r] = await sql`SELECT ${i}::int AS v, ${'t' + i} AS t`
    assert.deepEqual([r.v, r.t], [i, 't' + i])
  }))
  say('begin', await sql.begin(async tx => {
    await tx`UPDATE item SET name = 'in' WHERE id = 1`
    await tx.savepoint(async sp => { await sp`UPDATE item SET name = 'lost' WHERE id = 2`; throw new Error('back') }).catch(e => say('savepoint', e.message))
    return tx`SELECT id, name FROM item WHERE id IN (1, 2) ORDER BY id`
  }))
  say('pipelined transaction', (await sql.begin(tx => [tx`SELECT 1 AS a`, tx`SELECT 2 AS b`, tx`SELECT 3 AS c`])).map(r => r[0]))
  await assert.rejects(sql.begin(tx => [tx`UPDATE item SET name = 'x'`, tx`SELECT 1/0`]), { code: '22012' })
  say('rolled back', await sql`SELECT count(*) FROM item WHERE name = 'x'`)
  await Promise.all(Array.from({ length: 40 }, (_, i) => sql.begin(async tx => {
    await tx`SELECT set_config('app.tenant', ${'t' + i}, true)`
    await tx`UPDATE item SET doc = doc || ${sql.json({ tenant: i })} WHERE id = ${i}`
    const [r] = await tx`SELECT current_setting('app.tenant') AS t`
    assert.equal(r.t, 't' + i)
  })))
  say('documents', await sql`SELECT sum((doc->>'tenant')::int) FROM item`)
  const sizes = []
  await sql`SELECT g FROM generate_series(1, 95) g`.cursor(20, rows => { sizes.push(rows.length) })
  say('cursor', sizes)
  let each = 0
  await sql`SELECT g FROM generate_series(1, 500) g`.forEach(r => { each += r.g })
  say('each', each)
  await sql`CREATE TABLE copied(a int, b text)`
  await pipeline(Readable.from(Array.from({ length: 1000 }, (_, i) => `${i}\tline ${i}\n`)), await sql`COPY copied FROM STDIN`.writable())
  let bytes = 0
  await pipeline(await sql`COPY copied TO STDOUT`.readable(), new Writable({ write(c, _, done) { bytes += c.length; done() } }))
  say('copy', [await sql`SELECT count(*), sum(a) FROM copied`, bytes])
  for (const f of [() => sql`SELECT 1/0`, () => sql`SELECT nothing`, () => sql`INSERT INTO item(id) VALUES (1)`]) {
    await assert.rejects(f(), e => { say('error', [e.code, e.message]); return true })
  }
  const heard = []
  const all = new Promise(async done => {
    await sql.listen('news', p => { heard.push(p); if (heard.length === 3) done() })
    for (const p of ['a', 'b', 'c']) await sql.notify('news', p)
  })
  await all
  say('heard', heard)
  const slow = sql`SELECT pg_sleep(60)`
  setTimeout(() => slow.cancel(), 300)
  await assert.rejects(slow, e => { say('cancelled', e.code); return true })
  say('unsafe', await sql.unsafe('SELECT 1 AS a; SELECT 2 AS b'))
  say('describe', (await sql`SELECT id, name FROM item WHERE id = ${1}`.describe()).columns.map(c => [c.name, c.type]))
  await sql.end()
})().catch(e => { console.error(e); process.exit(1) })

// node-postgres: queries, prepared statements, transactions, pool, cursor, stream, LISTEN, errors, cancellation.
const assert = require('node:assert')
const { Client, Pool } = require('pg')
const Cursor = require('pg-cursor')
const QueryStream = require('pg-query-stream')

const say = (what, v) => console.log(what + ':', JSON.stringify(v))

async function plain() {
  const c = new Client()
  await c.connect()
  await c.query('CREATE TABLE item(id int PRIMARY KEY, name text, at timestamptz, doc jsonb, tags text[], b bytea)')
  for (let i = 0; i < 20; i++) {
    await c.query('INSERT INTO item VALUES ($1, $2, $3, $4, $5, $6)',
      [i, `n'${i}"\\`, new Date(Date.UTC(2024, 0, i + 1)), { i, deep: [1, { a: null }] }, ['x', `y,${i}`], Buffer.from([0, i, 255])])
  }
  say('rows', (await c.query('SELECT * FROM item ORDER BY id LIMIT 3')).rows)
  for (let i = 0; i < 20; i++) { // prepared once, used everywhere
    const r = await c.query({ name: 'by-id', text: 'SELECT name, doc FROM item WHERE id = $1', values: [i] })
    assert.equal(r.rows[0].name, `n'${i}"\\`)
    assert.equal(r.rows[0].doc.i, i)
  }
  say('binary', (await c.query({ text: 'SELECT $1::int8 AS a, $2::float8 AS b', values: [7, 1.5], binary: true })).rows)
  say('array rows', (await c.query({ text: 'SELECT id, name FROM item ORDER BY 1 LIMIT 2', rowMode: 'array' })).rows)
  say('several', (await c.query('SELECT 1 AS a; SELECT 2 AS b; UPDATE item SET name = name')).map(r => [r.command, r.rowCount, r.rows]))
  for (const sql of ['SELECT 1/0', 'SELEC', 'SELECT nothing FROM item', 'INSERT INTO item(id) VALUES (1)']) {
    await assert.rejects(c.query(sql), e => { say(sql, [e.code, e.message, e.severity]); return true })
    await assert.rejects(c.query(sql + ' ', []), e => { say(sql, [e.code]); return true })
  }
  await c.query('BEGIN')
  await c.query('UPDATE item SET name = $1 WHERE id = 1', ['changed'])
  await c.query('SAVEPOINT s')
  await assert.rejects(c.query('SELECT 1/0'))
  await assert.rejects(c.query('SELECT 1'), { code: '25P02' })
  await c.query('ROLLBACK TO s')
  await c.query('COMMIT')
  await c.query('BEGIN; DELETE FROM item')
  await c.query('ROLLBACK')
  say('after', (await c.query('SELECT count(*), max(name) FROM item')).rows)
  await c.query("SET TIME ZONE 'Asia/Seoul'; SET search_path = public, pg_catalog; SET app.user_id = '7'")
  const seen = new Set()
  for (let i = 0; i < 12; i++) {
    const { rows: [r] } = await c.query("SELECT current_setting('TimeZone') || current_setting('search_path') || current_setting('app.user_id') AS v")
    seen.add(r.v)
  }
  say('settings', [...seen])
  await Promise.all(Array.from({ length: 30 }, (_, i) => c.query('SELECT $1::int AS v', [i]).then(r => assert.equal(r.rows[0].v, i))))
  await c.end()
}

async function pool() {
  const p = new Pool({ max: 5, application_name: 'pool', statement_timeout: 60000 })
  await p.query('CREATE TABLE account(id int PRIMARY KEY, n int)')
  await p.query('INSERT INTO account SELECT g, 0 FROM generate_series(1, 5) g')
  await Promise.all(Array.from({ length: 100 }, async (_, i) => {
    const c = await p.connect()
    try {
      await c.query('BEGIN')
      await c.query({ name: 'add', text: 'UPDATE account SET n = n + $1 WHERE id = $2', values: [i, 1 + i % 5] })
      const fail = i % 10 === 3
      if (fail) await assert.rejects(c.query('SELECT 1/0'))
      await c.query(fail ? 'ROLLBACK' : 'COMMIT')
    } finally {
      c.release()
    }
  }))
  say('accounts', (await p.query('SELECT * FROM account ORDER BY id')).rows)
  say('timeout', (await p.query('SHOW statement_timeout')).rows)
  await p.end()
}

async function cursors() {
  const c = new Client()
  await c.connect()
  const cur = c.query(new Cursor('SELECT g FROM generate_series(1, $1) g', [250]))
  const sizes = []
  for (;;) {
    const rows = await cur.read(100)
    if (rows.length === 0) break
    sizes.push(rows.length, rows[0].g)
  }
  await cur.close()
  say('cursor', sizes)
  const early = c.query(new Cursor('SELECT g FROM generate_series(1, 1000) g'))
  await early.read(10)
  await early.close()
  const bad = c.query(new Cursor('SELECT 10 / (5 - g) FROM generate_series(1, 9) g'))
  await bad.read(2)
  await assert.rejects(bad.read(5), { code: '22012' })
  let n = 0, sum = 0
  for await (const row of c.query(new QueryStream('SELECT g, repeat($1, 100) AS x FROM generate_series(1, 20000) g', ['ab'], { batchSize: 500 }))) {
    n++; sum += row.g + row.x.length
  }
  say('stream', [n, sum])
  say('then', (await c.query('SELECT 1 AS one')).rows)
  await c.end()
}

async function listening() {
  const c = new Client(), other = new Client()
  await c.connect(); await other.connect()
  const got = []
  const all = new Promise(done => c.on('notification', m => { got.push([m.channel, m.payload]); if (got.length === 5) done() }))
  await c.query('LISTEN news')
  for (let i = 0; i < 5; i++) await other.query('SELECT pg_notify($1, $2)', ['news', 'n' + i])
  await all
  say('notified', got)
  await c.query('UNLISTEN *')
  await c.query('SELECT 1')
  const notices = []
  c.on('notice', n => notices.push(n.message))
  await c.query("DO $$ BEGIN RAISE NOTICE 'hello %', 1; END $$")
  say('notices', notices)
  await c.end(); await other.end()
}

async function cancelled() {
  const c = new Client({ statement_timeout: 100 })
  await c.connect()
  await assert.rejects(c.query('SELECT pg_sleep(30)'), e => { say('timeout', [e.code, e.message]); return true })
  say('goes on', (await c.query('SELECT 2 AS two')).rows)
  await c.end()
  const wrong = new Client({ password: 'wrong' })
  await assert.rejects(wrong.connect(), e => { say('wrong password', [e.code, e.message]); return true })
}

(async () => {
  await plain(); await pool(); await cursors(); await listening(); await cancelled()
})().catch(e => { console.error(e); process.exit(1) })

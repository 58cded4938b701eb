#!/usr/bin/env python3
"""Reads duri journal files (docs/reference/journal.md) and prints one JSON object per record.

    journal_reader.py FILE...          files of one journal, in the order of their names

It needs nothing but Python 3 and shares no code with duri, so that the history stays readable without it. It checks
checksums, continuity and the hash chain, and ends with status 1 and a message naming file and offset on any damage.
Values are strings where they are UTF-8, else {"hex": "..."}; times are microseconds since 2000-01-01 UTC.
"""

import hashlib
import json
import struct
import sys

HEADER, TXN, CHANGES, SCHEMA, POSITION, SEAL = 1, 2, 3, 4, 9, 13
OPS = {"I": "INSERT", "U": "UPDATE", "D": "DELETE", "T": "TRUNCATE"}


class Damage(Exception):
    pass


def crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


CRC_TABLE = crc_table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for b in data:
        crc = CRC_TABLE[(crc ^ b) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


class Bytes:
    """A cursor over bytes."""

    def __init__(self, data):
        self.data, self.pos = data, 0

    def more(self):
        return self.pos < len(self.data)

    def take(self, n):
        if n > len(self.data) - self.pos:
            raise Damage("data is cut off")
        self.pos += n
        return self.data[self.pos - n:self.pos]

    def byte(self):
        return self.take(1)[0]

    def uvarint(self):
        value = shift = 0
        while True:
            b = self.byte()
            value |= (b & 0x7F) << shift
            if b < 0x80:
                if value >= 1 << 64:
                    raise Damage("number too large")
                return value
            shift += 7

    def varint(self):
        return unzigzag(self.uvarint())

    def bytes(self):
        return self.take(self.uvarint())

    def string(self):
        return self.bytes().decode()


def unzigzag(u):
    return (u >> 1) ^ -(u & 1)


def fields(body, known):
    """The tagged fields of a record as a dict from tag to number or bytes."""
    out, cur, last = {}, Bytes(body), 0
    while cur.more():
        key = cur.uvarint()
        tag = key >> 2
        if tag <= last:
            raise Damage("fields are not in the order of their tags")
        last = tag
        value = cur.bytes() if key & 1 else cur.uvarint()
        if tag in known:
            out[tag] = value
        elif key & 2:
            raise Damage("unknown critical field %d: a newer format" % tag)
    return out


def lsn(v):
    return "%X/%X" % (v >> 32, v & 0xFFFFFFFF)


def text(b):
    try:
        return b.decode()
    except UnicodeDecodeError:
        return {"hex": b.hex()}


def seen(b):
    out, cur = [], Bytes(b)
    while cur.more():
        out.append({"site": cur.uvarint(), "lsn": lsn(cur.uvarint())})
    return out


def turns(b):
    out, cur = [], Bytes(b)
    while cur.more():
        f = fields(cur.bytes(), set(range(1, 8)))
        out.append({"system_id": f.get(1, 0), "timeline": f.get(2, 0), "database": f.get(3, b"").decode(),
                    "slot": f.get(4, b"").decode(), "created_lsn": lsn(f.get(5, 0)), "back": lsn(f.get(6, 0)),
                    "end": lsn(f.get(7, 0))})
    return out


def relation(content):
    cur = Bytes(content)
    rel = {"id": hashlib.sha256(content).digest()[:8].hex(), "oid": cur.uvarint(), "namespace": cur.string(),
           "name": cur.string(), "identity": chr(cur.byte()), "columns": []}
    for _ in range(cur.uvarint()):
        rel["columns"].append({"name": cur.string(), "type_oid": cur.uvarint(), "type_name": cur.string(),
                               "typmod": cur.varint(), "key": bool(cur.byte() & 1)})
    return rel


def tuple_of(data, rel):
    cur = Bytes(data)
    if cur.uvarint() != len(rel["columns"]):
        raise Damage("tuple and relation differ in the number of columns")
    out = []
    for _ in rel["columns"]:
        kind = chr(cur.byte())
        if kind not in "nuto":
            raise Damage("value of kind %r: a newer format" % kind)
        out.append({"kind": kind, "value": text(cur.bytes())} if kind == "t" else {"kind": kind})
    return out


def change(entry, relations):
    cur = Bytes(entry)
    op, form = chr(cur.byte()), cur.byte()
    rel = relations.get(cur.take(8).hex())
    if op not in OPS or form & 0xF0 or form & 3 == 3:
        raise Damage("change of unknown kind: a newer format")
    if rel is None:
        raise Damage("change without a schema record")
    out = {"op": OPS[op], "relation": rel["id"], "table": rel["namespace"] + "." + rel["name"]}
    parts = fields(cur.take(len(entry) - cur.pos), {1, 2})
    if 1 in parts:
        out["new"] = tuple_of(parts[1], rel)
    if 2 in parts:
        out["old_kind"] = {1: "key", 2: "full"}[form & 3]
        out["old"] = tuple_of(parts[2], rel)
    if op == "T":
        out["options"] = form >> 2
    return out


class Journal:
    """Running values and schemas while the files are read."""

    def __init__(self):
        self.to = None
        self.chain, self.txns, self.bytes = bytes(32), 0, 0
        self.relations, self.entries = {}, []

    def header(self, body):
        f = fields(body, set(range(1, 21)))
        if f.get(1, 0) != 1:
            raise Damage("format version %d" % f.get(1, 0))
        start = (f.get(10, 0), f.get(11), f.get(12, 0), f.get(13, 0))
        if self.to is not None and start != (self.to, self.chain, self.txns, self.bytes):
            raise Damage("the file does not carry on where the one before ends")
        self.to, self.chain, self.txns, self.bytes = start
        self.site, self.relations, settings = f.get(3, 0), {}, {}
        cur = Bytes(f.get(18, b""))
        while cur.more():
            name = cur.string()
            settings[name] = cur.string()
        return {"type": "header", "cluster": f.get(2, b"").decode(), "site": self.site,
                "site_name": f.get(4, b"").decode(), "system_id": f.get(5, 0), "timeline": f.get(6, 0),
                "database": f.get(7, b"").decode(), "slot": f.get(8, b"").decode(), "created_lsn": lsn(f.get(9, 0)),
                "from": lsn(self.to), "chain": self.chain.hex(), "txns": self.txns, "bytes": self.bytes,
                "max_version_time": unzigzag(f.get(14, 0)), "seen": seen(f.get(15, b"")),
                "server_version": f.get(16, 0), "encoding": f.get(17, b"").decode(), "settings": settings,
                "previous": lsn(f.get(19, 0)), "turns": turns(f.get(20, b""))}

    def advance(self, start, end):
        if start > self.to or end <= self.to:
            raise Damage("record covers (%s,%s], the journal ends at %s" % (lsn(start), lsn(end), lsn(self.to)))
        self.to = end

    def txn(self, body):
        f = fields(body, {1, 2, 3, 4, 5})
        c = fields(f[1], set(range(1, 12)))
        self.advance(f.get(2, 0), c[4])
        canonical = b"".join(self.entries) + f[1]
        self.chain = hashlib.sha256(self.chain + struct.pack("<Q", len(canonical)) + canonical).digest()
        self.txns, self.bytes = self.txns + 1, self.bytes + len(canonical)
        changes = []
        for run in self.entries:
            cur = Bytes(run)
            while cur.more():
                changes.append(change(cur.bytes(), self.relations))
        if len(changes) != c.get(7, 0):
            raise Damage("transaction with %d changes holds %d" % (c.get(7, 0), len(changes)))
        self.entries, counts, cur = [], {}, Bytes(c.get(8, b""))
        while cur.more():
            rel = cur.take(8).hex()
            counts[rel] = cur.uvarint()
        return {"type": "txn", "from": lsn(f.get(2, 0)), "origin": c.get(1, 0), "xid": c.get(2, 0),
                "commit_lsn": lsn(c.get(3, 0)), "end_lsn": lsn(c[4]), "commit_time": unzigzag(c.get(5, 0)),
                "version_time": unzigzag(c.get(6, c.get(5, 0))), "flags": c.get(9, 0), "counts": counts,
                "ltxid": c.get(10, b"").hex(), "level": c.get(11, 0),
                "received": unzigzag(f.get(3, 0)), "seen": seen(f.get(4, b"")), "changes": changes}

    def position(self, body):
        f = fields(body, {1, 2, 3, 4})
        self.advance(f.get(1, 0), f.get(2, 0))
        return {"type": "position", "from": lsn(f.get(1, 0)), "to": lsn(self.to), "time": unzigzag(f.get(3, 0)),
                "seen": seen(f.get(4, b""))}

    def seal(self, body):
        f = fields(body, {1, 2, 3, 4, 5})
        have = (f.get(1, 0), f.get(2), f.get(3, 0), f.get(4, 0))
        if have != (self.to, self.chain, self.txns, self.bytes):
            raise Damage("the seal does not fit the transactions before it")
        return {"type": "seal", "to": lsn(self.to), "chain": self.chain.hex(), "txns": self.txns, "bytes": self.bytes,
                "time": unzigzag(f.get(5, 0))}

    def record(self, typ, flags, body):
        if typ == CHANGES:
            self.entries.append(fields(body, {2})[2])
            return None
        if typ == SCHEMA:
            rel = relation(fields(body, {1})[1])
            self.relations[rel["id"]] = rel
            return dict(rel, type="schema")
        known = {HEADER: self.header, TXN: self.txn, POSITION: self.position, SEAL: self.seal}
        if typ in known:
            return known[typ](body)
        if flags & 1:
            raise Damage("unknown critical record of type %d: a newer format" % typ)
        return {"type": "unknown", "number": typ, "length": len(body)}


def frames(data):
    """Yields (offset, type, flags, body) up to the end or to the never written tail."""
    pos = 0
    while pos < len(data):
        head = data[pos:pos + 12]
        if not any(head):
            return
        if len(head) < 12:
            raise Damage("frame header is cut off", pos)
        size, typ, flags, zero, crc = struct.unpack("<IBBHI", head)
        body = data[pos + 12:pos + 12 + size]
        if len(body) < size or typ == 0 or crc32c(head[:8] + body) != crc:
            raise Damage("checksum does not fit the frame", pos)
        if flags & ~1 or zero:
            raise Damage("frame with unknown flags: a newer format", pos)
        yield pos, typ, flags, body
        pos += 12 + size


def main(names):
    journal = Journal()
    for name in sorted(names):
        with open(name, "rb") as f:
            data = f.read()
        pos = 0
        try:
            for pos, typ, flags, body in frames(data):
                record = journal.record(typ, flags, body)
                if record is not None:
                    print(json.dumps(record, ensure_ascii=False))
            if journal.entries:
                raise Damage("the file ends inside a transaction")
        except (Damage, KeyError, UnicodeDecodeError) as e:
            if isinstance(e, Damage) and len(e.args) > 1:
                pos = e.args[1]
            sys.stdout.flush()
            sys.exit("%s, offset %d: %s" % (name, pos, e.args[0] if isinstance(e, Damage) else "damaged record: %r" % e))


if __name__ == "__main__":
    main(sys.argv[1:])

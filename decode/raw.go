package decode

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/duri-io/duri/internal/pg"
	"github.com/duri-io/duri/wal"
)

// Written reads a stretch of WAL as it is, not decoded, and tells whether anybody but duri has committed changes of published
// tables in it. It is for the time in which there is no slot: after a fail-over, until one is made. What it cannot tell counts
// as written. It is for one stretch, which it may be given in parts.
type Written struct {
	database  uint32                          // oid
	node      func(node uint32) (counts bool) // whether changes of a relation file in the database count
	relation  func(oid uint32) (counts bool)  // likewise, by the relation's own oid
	raw       rawScan
	changed   map[uint32]bool // transactions that changed what counts
	committed wal.LSN         // of the first of them; zero: none
}

// NewWritten begins at a position at which a record ends. conn is a connection to the database.
func NewWritten(ctx context.Context, conn *pgconn.PgConn, publication string, from wal.LSN) (*Written, error) {
	rows, err := pg.Rows(ctx, conn, `SELECT d.oid, pg_catalog.pg_relation_filenode(c.oid), c.oid, EXISTS (
			SELECT FROM pg_catalog.pg_publication_tables p JOIN pg_catalog.pg_namespace n ON n.nspname = p.schemaname
			WHERE p.pubname = `+pg.QuoteLiteral(publication)+` AND n.oid = c.relnamespace AND p.tablename = c.relname)
		FROM pg_catalog.pg_class c, pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database() AND c.relkind IN ('r', 't', 'm')`)
	if err != nil {
		return nil, fmt.Errorf("list the relation files: %w", err)
	}
	w := &Written{raw: rawScan{pos: from}, changed: map[uint32]bool{}}
	nodes, oids := map[uint32]bool{}, map[uint32]bool{}
	for _, r := range rows {
		var node, oid uint32
		if _, err := fmt.Sscan(r[0]+" "+r[1]+" "+r[2], &w.database, &node, &oid); err != nil {
			return nil, fmt.Errorf("list the relation files: %w", err)
		}
		nodes[node], oids[oid] = r[3] == "t", r[3] == "t"
	}
	w.node = func(n uint32) bool {
		counts, known := nodes[n]
		return counts || !known // of a table that is gone, or was rewritten since
	}
	w.relation = func(oid uint32) bool {
		counts, known := oids[oid]
		return counts || !known
	}
	return w, nil
}

// Read goes on to a position, which must be flushed. conn is a replication connection, which it uses up.
func (w *Written) Read(ctx context.Context, conn *pgconn.PgConn, timeline uint32, to wal.LSN) error {
	if w.raw.pos >= to {
		return nil
	}
	conn.Frontend().SendQuery(&pgproto3.Query{String: fmt.Sprintf("START_REPLICATION PHYSICAL %s TIMELINE %d", w.raw.pos, timeline)})
	err := conn.Frontend().Flush()
	for err == nil && w.raw.pos < to {
		var msg pgproto3.BackendMessage
		if msg, err = conn.ReceiveMessage(ctx); err != nil {
			break
		}
		switch m := msg.(type) {
		case *pgproto3.CopyData:
			if len(m.Data) >= 25 && m.Data[0] == 'w' {
				err = w.take(wal.LSN(binary.BigEndian.Uint64(m.Data[1:])), m.Data[25:])
			}
		case *pgproto3.CopyDone:
			err = errors.New("the server ended the stream")
		case *pgproto3.ErrorResponse:
			err = pgconn.ErrorResponseToPgError(m)
		}
	}
	if err != nil {
		return fmt.Errorf("read WAL from %s: %w", w.raw.pos, err)
	}
	return nil
}

// Committed is where the first such commit stands; ok is false when there is none.
func (w *Written) Committed() (at wal.LSN, ok bool) { return w.committed, w.committed != 0 }

func (w *Written) take(at wal.LSN, data []byte) error {
	if next := w.raw.pos + wal.LSN(len(w.raw.buf)); at != next {
		return fmt.Errorf("WAL from %s arrives where %s belongs", at, next)
	}
	return w.raw.feed(data, w.record)
}

// Resource managers, operations and flags (access/rmgrlist.h, heapam_xlog.h, xact.h, xlogrecord.h); the same from 15 to 18.
const (
	rmXLOG, rmXact, rmHeap2, rmHeap = 0, 1, 9, 10

	opMask                                        = 0x70
	xlogSwitch                                    = 0x40
	heapInsert, heapDelete, heapUpdate            = 0x00, 0x10, 0x20
	heapTruncate, heapHotUpdate, heap2MultiInsert = 0x30, 0x40, 0x50
	xactCommit, xactPrepare                       = 0x00, 0x10
	xactHasInfo                                   = 0x80
	xinfoDatabase, xinfoSubxacts                  = 1, 2
	recordHeader                                  = 24
	blockShort, blockLong, blockOrigin, blockTop  = 255, 254, 253, 252
	blockMax                                      = 32
	blockImage, blockSameRel                      = 0x10, 0x80
	imageHole, imageCompressed                    = 0x01, 0x1c
)

// record takes one record.
func (w *Written) record(at wal.LSN, rec []byte) error {
	r, err := parseRecord(rec)
	if err != nil {
		return err
	}
	op := r.info & opMask
	switch {
	case r.rm == rmHeap && op == heapTruncate:
		if len(r.main) < 12 {
			return errors.New("truncate record is too short")
		}
		if r.origin == 0 && le32(r.main) == w.database {
			n := int(le32(r.main[4:]))
			for i := range min(n, (len(r.main)-12)/4) {
				if w.relation(le32(r.main[12+4*i:])) {
					w.changed[r.xid] = true
				}
			}
		}
	case r.rm == rmHeap && (op == heapInsert || op == heapDelete || op == heapUpdate || op == heapHotUpdate), r.rm == rmHeap2 && op == heap2MultiInsert:
		for _, f := range r.files {
			if r.origin == 0 && f.database == w.database && w.node(f.node) {
				w.changed[r.xid] = true
			}
		}
	case r.rm == rmXact && (op == xactCommit || op == xactPrepare):
		xids := append(r.subxacts(), r.xid)
		if w.committed == 0 && slices.ContainsFunc(xids, func(x uint32) bool { return w.changed[x] }) {
			w.committed = at
		}
	}
	return nil
}

// rawRecord is what Written needs of a record.
type rawRecord struct {
	xid      uint32 // its transaction, or part of one
	rm, info byte
	origin   uint16
	files    []relFile
	main     []byte
}

type relFile struct{ database, node uint32 }

func le32(b []byte) uint32 { return binary.LittleEndian.Uint32(b) }

// parseRecord reads a record's headers. It never panics on bad input.
func parseRecord(rec []byte) (r rawRecord, err error) {
	if len(rec) < recordHeader {
		return r, errors.New("record is too short")
	}
	r.xid, r.info, r.rm = le32(rec[4:]), rec[16], rec[17]
	b, data := rec[recordHeader:], 0
	need := func(n int) []byte {
		if len(b) < n {
			err = errors.New("record is too short for its headers")
			b = nil
			return make([]byte, n)
		}
		out := b[:n]
		b = b[n:]
		return out
	}
	for err == nil && len(b) > data {
		switch id := need(1)[0]; {
		case id == blockShort || id == blockLong:
			n := 0
			if id == blockShort {
				n = int(need(1)[0])
			} else {
				n = int(le32(need(4)))
			}
			if n < 0 || n > len(b) {
				return r, errors.New("record is shorter than its data")
			}
			r.main = rec[len(rec)-n:]
			return r, err
		case id == blockOrigin:
			r.origin = binary.LittleEndian.Uint16(need(2))
		case id == blockTop:
			need(4)
		case id <= blockMax:
			h := need(3)
			flags := h[0]
			data += int(binary.LittleEndian.Uint16(h[1:]))
			if flags&blockImage != 0 {
				img := need(5)
				data += int(binary.LittleEndian.Uint16(img))
				if img[4]&imageHole != 0 && img[4]&imageCompressed != 0 {
					need(2)
				}
			}
			if flags&blockSameRel == 0 {
				f := need(12)
				r.files = append(r.files, relFile{le32(f[4:]), le32(f[8:])})
			}
			need(4)
		default:
			return r, fmt.Errorf("record with a block of number %d", id)
		}
	}
	return r, err
}

// subxacts lists the parts of a transaction that a commit record names.
func (r rawRecord) subxacts() (xids []uint32) {
	b := r.main
	if r.info&xactHasInfo == 0 || len(b) < 12 {
		return nil
	}
	info := le32(b[8:])
	b = b[12:]
	if info&xinfoDatabase != 0 && len(b) >= 8 {
		b = b[8:]
	}
	if info&xinfoSubxacts == 0 || len(b) < 4 {
		return nil
	}
	n := int(le32(b))
	for i := range min(n, (len(b)-4)/4) {
		xids = append(xids, le32(b[4+4*i:]))
	}
	return xids
}

// rawScan cuts WAL into records.
type rawScan struct {
	pos      wal.LSN // of the first byte of buf
	buf      []byte  // not yet taken
	rec      []byte  // the record that is being collected
	at       wal.LSN // where that began
	switched bool    // the rest of the segment is nothing
}

const (
	walPage                               = 8192
	pageShort, pageLong                   = 24, 40
	pageContinues, pageHasLong, pageBroke = 1, 2, 8
)

// feed takes the next bytes and gives each record that is complete to f.
func (s *rawScan) feed(data []byte, f func(at wal.LSN, rec []byte) error) error {
	s.buf = append(s.buf, data...)
	taken := 0
	defer func() { s.buf = append(s.buf[:0], s.buf[taken:]...) }()
	for {
		n, err := s.step(s.buf[taken:], f)
		if err != nil {
			return fmt.Errorf("WAL at %s: %w", s.pos, err)
		}
		if n == 0 {
			return nil
		}
		s.pos += wal.LSN(n)
		taken += n
	}
}

// step takes some bytes and tells how many; none when more are needed.
func (s *rawScan) step(b []byte, f func(at wal.LSN, rec []byte) error) (int, error) {
	inPage := int(s.pos % walPage)
	if inPage == 0 {
		return s.page(b)
	}
	n := min(len(b), walPage-inPage)
	if s.switched {
		return n, nil
	}
	if len(s.rec) == 0 {
		if rest := int(s.pos % 8); rest != 0 {
			return min(n, 8-rest), nil
		}
		if n < 8 { // a length never stands on two pages
			return 0, nil
		}
		if s.at = s.pos; le32(b) < recordHeader {
			return 0, errors.New("no record where one belongs")
		}
		s.rec = append(s.rec, b[:4]...)
		return 4, nil
	}
	need := int(le32(s.rec))
	n = min(n, need-len(s.rec))
	s.rec = append(s.rec, b[:n]...)
	if len(s.rec) < need {
		return n, nil
	}
	s.switched = s.rec[17] == rmXLOG && s.rec[16]&^0x0f == xlogSwitch
	err := f(s.at, s.rec)
	s.rec = s.rec[:0]
	return n, err
}

// page takes a page's header.
func (s *rawScan) page(b []byte) (int, error) {
	if len(b) < pageShort {
		return 0, nil
	}
	known, flags, size := b[1] == 0xd1, binary.LittleEndian.Uint16(b[2:]), pageShort
	if known && flags&pageHasLong != 0 {
		if size = pageLong; len(b) < size {
			return 0, nil
		}
		s.switched = false // a segment begins
	}
	if s.switched {
		return pageShort, nil
	}
	if !known {
		return 0, fmt.Errorf("no page of WAL that is known (magic %02x%02x)", b[1], b[0])
	}
	if flags&pageBroke != 0 { // what was begun before a crash was never ended
		s.rec = s.rec[:0]
	} else if flags&pageContinues != 0 != (len(s.rec) > 0) {
		return 0, errors.New("a record does not go on where it should")
	}
	return size, nil
}

package journal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/duri-io/duri/wal"
)

const pythonReader = "../docs/reference/journal_reader.py"

// runPython runs the reference reader on the files of a journal.
func runPython(t *testing.T, files []string) (stdout, stderr string, err error) {
	t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Fatal("python3 is missing: the test of the reference reader needs it (package python3)")
	}
	cmd := exec.Command(python, append([]string{pythonReader}, files...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// pythonJournal writes a journal of several files to disk and returns their names.
func pythonJournal(t *testing.T) []string {
	t.Helper()
	dir := t.TempDir()
	j, err := Create(dir, testHeader(), Options{SegmentBytes: 2000})
	must(t, err)
	for i := range 8 {
		txn := simpleTxn(2 * i)
		switch i {
		case 2:
			txn.VersionTime += 9
			txn.Changes[0].New[1].Data = []byte{0xFF, 0xFE}
		case 3:
			txn.Changes = []wal.Change{{Op: wal.Truncate, Relation: testRelations()[0], Options: wal.TruncateCascade | wal.TruncateRestartIdentity}}
		case 4:
			txn.Changes[0].New[1].Data = bytes.Repeat([]byte("9"), changesLimit)
		case 5:
			txn.CommitTime, txn.VersionTime = -5, -5
		}
		appendAll(t, j, txn)
		must(t, j.AppendPosition(simpleTxn(2*i+1).EndLSN, []wal.Seen{{Site: 2, LSN: 60}, {Site: 3, LSN: 1 << 40}}, wal.Time(i)))
	}
	must(t, j.AppendFrames(append(appendFrame(nil, 99, 0, []byte("future")), appendPosition(nil, Position{From: j.End(), To: j.End() + 9})...)))
	must(t, j.Turn(nextIncarnation(), j.End()-9))
	must(t, j.AppendPosition(j.End()+50, nil, 3))
	must(t, j.Close())
	files, err := filepath.Glob(filepath.Join(dir, "*.j"))
	must(t, err)
	if len(files) < 3 {
		t.Fatalf("%d files", len(files))
	}
	return files
}

func TestPythonReaderPrintsTheSameRecords(t *testing.T) {
	files := pythonJournal(t)
	out, stderr, err := runPython(t, files)
	if err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	var have, want []any
	for line := range strings.Lines(out) {
		have = append(have, decodeJSON(t, []byte(line)))
	}
	for _, name := range files {
		for _, rec := range printable(t, name) {
			b, err := json.Marshal(rec)
			must(t, err)
			want = append(want, decodeJSON(t, b))
		}
	}
	if d := cmp.Diff(want, have); d != "" {
		t.Fatal(d)
	}
}

func decodeJSON(t *testing.T, b []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	must(t, d.Decode(&v))
	return v
}

func TestPythonReaderNamesDamage(t *testing.T) {
	files := pythonJournal(t)
	data, err := os.ReadFile(files[1])
	must(t, err)
	data[len(data)/2] ^= 1
	must(t, os.WriteFile(files[1], data, 0o600))
	_, stderr, err := runPython(t, files)
	if err == nil || !strings.Contains(stderr, files[1]) || !strings.Contains(stderr, "offset") {
		t.Fatalf("%v: %s", err, stderr)
	}
	if _, stderr, err = runPython(t, []string{files[0], files[2]}); err == nil || !strings.Contains(stderr, "carry on") {
		t.Fatalf("missing file: %v: %s", err, stderr)
	}
}

type object map[string]any

// printable reads a file with this package's scanner and gives the records as the Python reader prints them.
func printable(t *testing.T, name string) (out []object) {
	t.Helper()
	file, err := OSFS{}.Open(name, false)
	must(t, err)
	defer file.Close()
	size, err := file.Size()
	must(t, err)
	sc := scanner{file: file, name: name, limit: size}
	h, err := readHeader(&sc)
	must(t, err)
	out = append(out, printHeader(h))
	in := newIntake(h)
	for {
		f, ok, err := sc.next()
		must(t, err)
		if !ok {
			return out
		}
		done, err := in.add(f)
		must(t, err)
		switch {
		case f.typ == TypeSchema:
			rel, err := parseSchema(f.body)
			must(t, err)
			out = append(out, printRelation(rel))
		case f.typ == 99:
			out = append(out, object{"type": "unknown", "number": 99, "length": len(f.body)})
		case done && in.kind == TypeTxn:
			txn, err := in.decode()
			must(t, err)
			out = append(out, printTxn(txn, in.txn.from))
		case done && in.kind == TypePosition:
			p := in.pos
			out = append(out, object{"type": "position", "from": p.From, "to": p.To, "time": int64(p.Time), "seen": printSeen(p.Seen)})
		case done && in.kind == TypeSeal:
			s := in.seal
			out = append(out, object{"type": "seal", "to": s.to, "chain": s.chain.String(), "txns": s.txns, "bytes": s.bytes, "time": int64(s.time)})
		}
	}
}

func printHeader(h Header) object {
	return object{
		"type": "header", "cluster": h.Cluster, "site": h.Site, "site_name": h.SiteName, "system_id": h.SystemID, "timeline": h.Timeline,
		"database": h.Database, "slot": h.Slot, "created_lsn": h.CreatedLSN, "from": h.From, "previous": h.Previous, "chain": h.Chain.String(),
		"txns": h.Txns, "bytes": h.Bytes, "max_version_time": int64(h.MaxVersionTime), "seen": printSeen(h.Seen),
		"server_version": h.ServerVersion, "encoding": h.Encoding, "settings": h.Settings, "turns": printTurns(h.Turns),
	}
}

func printTurns(turns []Turn) []object {
	out := []object{}
	for _, t := range turns {
		out = append(out, object{
			"system_id": t.SystemID, "timeline": t.Timeline, "database": t.Database, "slot": t.Slot, "created_lsn": t.CreatedLSN, "back": t.Back, "end": t.End,
		})
	}
	return out
}

func printRelation(r *wal.Relation) object {
	columns := []object{}
	for _, c := range r.Columns {
		columns = append(columns, object{"name": c.Name, "type_oid": c.TypeOID, "type_name": c.TypeName, "typmod": c.TypeMod, "key": c.Key})
	}
	return object{
		"type": "schema", "id": r.ID.String(), "oid": r.OID, "namespace": r.Namespace, "name": r.Name, "identity": string(rune(r.Identity)),
		"columns": columns,
	}
}

func printSeen(seen []wal.Seen) []wal.Seen { return append([]wal.Seen{}, seen...) }

func printTxn(x *wal.Txn, from wal.LSN) object {
	counts, changes, flags := map[string]int{}, []object{}, 0
	for _, c := range x.Changes {
		counts[c.Relation.ID.String()]++
		o := object{"op": c.Op.String(), "relation": c.Relation.ID.String(), "table": c.Relation.String()}
		if hasNew(c.Op) {
			o["new"] = printTuple(c.New)
		}
		switch c.OldKind {
		case wal.OldKey:
			o["old_kind"], o["old"] = "key", printTuple(c.Old)
		case wal.OldFull:
			o["old_kind"], o["old"] = "full", printTuple(c.Old)
		}
		if c.Op == wal.Truncate {
			o["options"], flags = c.Options, flagTruncate
		}
		changes = append(changes, o)
	}
	return object{
		"type": "txn", "from": from, "origin": x.Origin, "xid": x.XID, "commit_lsn": x.CommitLSN, "end_lsn": x.EndLSN,
		"commit_time": int64(x.CommitTime), "version_time": int64(x.VersionTime), "flags": flags, "counts": counts,
		"ltxid": hex.EncodeToString([]byte(x.Mark.LTXID)), "level": x.Mark.Level,
		"received": int64(x.Received), "seen": printSeen(x.Seen), "changes": changes,
	}
}

func printTuple(tuple wal.Tuple) []object {
	out := []object{}
	for _, v := range tuple {
		o := object{"kind": string(rune(v.Kind))}
		if v.Kind == wal.Text {
			o["value"] = string(v.Data)
			if !utf8.Valid(v.Data) {
				o["value"] = object{"hex": hex.EncodeToString(v.Data)}
			}
		}
		out = append(out, o)
	}
	return out
}

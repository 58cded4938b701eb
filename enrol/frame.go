package enrol

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// magic opens a stream; the number is the version of the format.
const magic = "duri-enrol 1\n"

// The frames of a stream, in this order: one header, pre-data SQL, per table (begin, data..., end), sequences,
// post-data SQL, end. A failure frame can stand anywhere instead and is the last one.
const (
	frameHeader    = 'H' // JSON of Header
	framePreData   = 'S' // SQL text, may be cut anywhere
	frameTable     = 'T' // JSON: index into Header.Tables
	frameData      = 'D' // COPY text format, may be cut anywhere
	frameTableEnd  = 'E' // JSON of tableEnd
	frameSequences = 'Q' // JSON array of sequence
	framePostData  = 'P' // SQL text, may be cut anywhere
	frameFailure   = 'X' // JSON of failure
	frameEnd       = 'Z' // JSON of totals
)

// frameBytesMax bounds a frame's payload, so that damaged input cannot ask for any amount of memory. Text and data are
// cut into pieces of chunkBytes; a header with 100,000 tables of 50 columns is about 300 MB of JSON.
const (
	frameBytesMax = 512 << 20
	chunkBytes    = 128 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// failure is what the source tells the target when it cannot go on.
type failure struct {
	Text string `json:"text"`
	Hint string `json:"hint"`
}

// frameWriter writes frames: type (1 byte), payload length (4, big endian), payload, CRC-32C (4) of all before.
type frameWriter struct {
	w      *bufio.Writer
	failed error // the first write error: nothing is written after it
}

func newFrameWriter(w io.Writer) *frameWriter {
	f := &frameWriter{w: bufio.NewWriterSize(w, chunkBytes+64)}
	_, f.failed = f.w.WriteString(magic)
	return f
}

func (f *frameWriter) frame(kind byte, payload []byte) error {
	if f.failed != nil {
		return f.failed
	}
	if len(payload) > frameBytesMax {
		return fmt.Errorf("frame %c has %d bytes, the limit is %d", kind, len(payload), frameBytesMax)
	}
	head := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(payload)))
	sum := crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, payload)
	for _, b := range [][]byte{head, payload, binary.BigEndian.AppendUint32(nil, sum)} {
		if _, err := f.w.Write(b); err != nil {
			f.failed = err
			return err
		}
	}
	return nil
}

func (f *frameWriter) json(kind byte, v any) error {
	doc, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return f.frame(kind, doc)
}

// text writes s in pieces.
func (f *frameWriter) text(kind byte, s string) error {
	for len(s) > 0 {
		n := min(len(s), chunkBytes)
		if err := f.frame(kind, []byte(s[:n])); err != nil {
			return err
		}
		s = s[n:]
	}
	return nil
}

func (f *frameWriter) flush() error {
	if f.failed == nil {
		f.failed = f.w.Flush()
	}
	return f.failed
}

// frameReader reads frames. A stream that ends before its end frame gives io.ErrUnexpectedEOF.
type frameReader struct {
	r       *bufio.Reader
	buf     []byte
	kind    byte // of the frame that was peeked at; 0: none
	payload []byte
}

// errFormat is the beginning of every complaint about the stream's form.
var errFormat = errors.New("the enrolment stream is damaged")

func newFrameReader(r io.Reader) (*frameReader, error) {
	f := &frameReader{r: bufio.NewReaderSize(r, chunkBytes)}
	head := make([]byte, len(magic))
	if _, err := io.ReadFull(f.r, head); err != nil {
		return nil, fmt.Errorf("read the enrolment stream: %w", unexpected(err))
	}
	if string(head) != magic {
		return nil, &Error{Op: "read the enrolment stream", Text: fmt.Sprintf("it begins with %q, not with %q", head, magic), Hint: "run the same version of duri at both sites while one joins"}
	}
	return f, nil
}

// unexpected turns the end of input into what it is here: too early.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// peek gives the next frame without consuming it. The payload is valid until the next read. A failure frame becomes
// the error that it tells of.
func (f *frameReader) peek() (kind byte, payload []byte, err error) {
	if f.kind == 0 {
		if err := f.read(); err != nil {
			return 0, nil, err
		}
	}
	return f.kind, f.payload, nil
}

// next consumes a frame.
func (f *frameReader) next() (kind byte, payload []byte, err error) {
	kind, payload, err = f.peek()
	f.kind = 0
	return kind, payload, err
}

func (f *frameReader) read() error {
	var head [5]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return fmt.Errorf("read the enrolment stream: %w", unexpected(err))
	}
	n := int(binary.BigEndian.Uint32(head[1:]))
	if n > frameBytesMax {
		return fmt.Errorf("%w: a frame claims %d bytes", errFormat, n)
	}
	if err := f.fill(n + 4); err != nil {
		return fmt.Errorf("read the enrolment stream: %w", unexpected(err))
	}
	body, tail := f.buf[:n], f.buf[n:n+4]
	sum := crc32.Update(crc32.Checksum(head[:], castagnoli), castagnoli, body)
	if binary.BigEndian.Uint32(tail) != sum {
		return fmt.Errorf("%w: a frame's checksum is wrong", errFormat)
	}
	if head[0] == frameFailure {
		return failed(body)
	}
	f.kind, f.payload = head[0], body
	return nil
}

// fill reads n bytes into buf, growing it as they come: a damaged length must not cost memory that no data back.
func (f *frameReader) fill(n int) error {
	f.buf = f.buf[:0]
	for len(f.buf) < n {
		step := min(n-len(f.buf), 1<<20)
		have := len(f.buf)
		if cap(f.buf) < have+step {
			f.buf = append(make([]byte, 0, max(2*cap(f.buf), have+step)), f.buf...)
		}
		f.buf = f.buf[:have+step]
		if _, err := io.ReadFull(f.r, f.buf[have:]); err != nil {
			return err
		}
	}
	return nil
}

// failed reads a failure frame.
func failed(doc []byte) error {
	var x failure
	if err := json.Unmarshal(doc, &x); err != nil {
		return fmt.Errorf("%w: %w", errFormat, err)
	}
	return &Error{Op: "the source could not go on", Text: x.Text, Hint: x.Hint}
}

// expect consumes a frame of one kind and decodes its JSON.
func (f *frameReader) expect(kind byte, v any) error {
	got, doc, err := f.next()
	if err != nil {
		return err
	}
	if got != kind {
		return fmt.Errorf("%w: frame %q where %q should be", errFormat, got, kind)
	}
	if err := json.Unmarshal(doc, v); err != nil {
		return fmt.Errorf("%w: frame %q: %w", errFormat, kind, err)
	}
	return nil
}

// text consumes all frames of one kind, which may be none.
func (f *frameReader) text(kind byte) (string, error) {
	var out []byte
	for {
		got, b, err := f.peek()
		if err != nil {
			return "", err
		}
		if got != kind {
			return string(out), nil
		}
		out = append(out, b...)
		if len(out) > frameBytesMax {
			return "", fmt.Errorf("%w: more than %d bytes of SQL", errFormat, frameBytesMax)
		}
		f.kind = 0
	}
}

// tableReader gives the data frames of one table as one byte stream, and counts it.
type tableReader struct {
	f     *frameReader
	rest  []byte
	sum   tableEnd
	err   error // why it ended early
	moved func(bytes, rows int64)
}

// Read implements io.Reader.
func (t *tableReader) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		kind, b, err := t.f.peek()
		switch {
		case err != nil:
			t.err = err
			return 0, err
		case kind != frameData:
			return 0, io.EOF
		}
		t.f.kind = 0
		t.rest = b
		rows := t.sum.add(b)
		t.moved(int64(len(b)), rows)
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	return n, nil
}

// add counts a piece of COPY text data and gives its rows: a line feed inside a value is escaped, so each one ends a
// row.
func (s *tableEnd) add(b []byte) int64 {
	s.Bytes += int64(len(b))
	s.CRC = crc32.Update(s.CRC, castagnoli, b)
	rows := int64(bytes.Count(b, []byte{'\n'}))
	s.Rows += rows
	return rows
}

// tableWriter packs COPY data, which PostgreSQL sends row by row, into frames.
type tableWriter struct {
	f   *frameWriter
	buf []byte
	sum tableEnd
}

// Write implements io.Writer.
func (t *tableWriter) Write(p []byte) (int, error) {
	t.sum.add(p)
	for rest := p; len(rest) > 0; {
		n := min(len(rest), chunkBytes-len(t.buf))
		t.buf, rest = append(t.buf, rest[:n]...), rest[n:]
		if len(t.buf) == chunkBytes {
			if err := t.flush(); err != nil {
				return 0, err
			}
		}
	}
	return len(p), nil
}

func (t *tableWriter) flush() error {
	if len(t.buf) == 0 {
		return nil
	}
	err := t.f.frame(frameData, t.buf)
	t.buf = t.buf[:0]
	return err
}

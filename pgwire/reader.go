package pgwire

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// BufferSize is the size of the buffer of a Reader or Writer, in bytes, while it is busy.
const BufferSize = 16 << 10

// buffers holds what no Reader or Writer needs now.
var buffers = sync.Pool{New: func() any { return new([BufferSize]byte) }}

// headerLen is the type and the length word.
const headerLen = 5

// Reader reads messages by their headers. It is for one goroutine at a time.
//
// For each message: Next, then any of Peek, Body and Discard, or Forward. What is left of a body when Next is called again
// is passed over.
type Reader struct {
	src  io.Reader
	raw  syscall.RawConn       // nil where a wait needs a buffer: TLS, pipes
	pull func(fd uintptr) bool // r.readReady, made once

	buf  *[BufferSize]byte // nil while nothing is buffered
	r, w int               // buf[r:w] is buffered
	left int               // of the current message's body, what was not consumed
	head [headerLen]byte   // of the current message

	n   int // result of pull
	got uint64
	err error
}

// NewReader reads from src. For a TCP or Unix-domain connection it waits without holding a buffer.
func NewReader(src io.Reader) *Reader {
	r := &Reader{src: src}
	if c, ok := src.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			r.raw, r.pull = raw, r.readReady
		}
	}
	return r
}

// Next passes over what is left of the current message, waits for the header of the next and gives its type and the length
// of its body. io.EOF means that the stream ended between two messages.
func (r *Reader) Next(may Limits) (typ byte, length int, err error) {
	if err := r.Discard(r.left); err != nil {
		return 0, 0, err
	}
	for r.w-r.r < headerLen {
		if err := r.fill(); err != nil {
			if errors.Is(err, io.EOF) && r.w > r.r {
				err = io.ErrUnexpectedEOF
			}
			return 0, 0, err
		}
	}
	copy(r.head[:], r.buf[r.r:])
	typ = r.head[0]
	size := binary.BigEndian.Uint32(r.head[1:])
	most := may[typ]
	switch {
	case most < 0:
		return 0, 0, violation("a message of type %q, which may not come here", typ)
	case size < 4 || size-4 > uint32(most):
		return 0, 0, violation("a message of type %q with a length of %d, where 4 to %d is possible", typ, size, int64(most)+4)
	}
	r.r += headerLen
	r.left = int(size) - 4
	return typ, r.left, nil
}

// Left is how much of the current message's body was not consumed.
func (r *Reader) Left() int { return r.left }

// Complete reports whether the next message is buffered wholly, so that Next and Body would not wait. The current one
// must have been consumed.
func (r *Reader) Complete() bool {
	b := r.w - r.r
	return b >= headerLen && int64(b-1) >= int64(binary.BigEndian.Uint32(r.buf[r.r+1:]))
}

// Received is how many bytes have come in all.
func (r *Reader) Received() uint64 { return r.got }

// Buffered is how many bytes were read and not consumed yet, of the current message and later ones.
func (r *Reader) Buffered() int { return r.w - r.r }

// Ahead is what is buffered behind the current message, valid until the next call; nothing if that is not there wholly.
func (r *Reader) Ahead() []byte {
	if r.w-r.r <= r.left {
		return nil
	}
	return r.buf[r.r+r.left : r.w]
}

// Cut takes the first message off m; false: it is not there wholly.
func Cut(m []byte) (typ byte, body, rest []byte, ok bool) {
	if len(m) < headerLen {
		return 0, nil, nil, false
	}
	size := binary.BigEndian.Uint32(m[1:])
	if size < 4 || int64(size) > int64(len(m)-1) {
		return 0, nil, nil, false
	}
	return m[0], m[headerLen : 1+int(size)], m[1+int(size):], true
}

// Peek gives the next n bytes of the current message's body, or all of it when less is left, without consuming them. They
// are valid until the next call. No more than BufferSize can be seen.
func (r *Reader) Peek(n int) ([]byte, error) {
	n = min(n, r.left)
	if n > BufferSize {
		return nil, ErrTooLong
	}
	for r.w-r.r < n {
		if err := r.fill(); err != nil {
			return nil, noEOF(err)
		}
	}
	if n == 0 {
		return nil, nil
	}
	return r.buf[r.r : r.r+n], nil
}

// Body consumes the rest of the current message's body. It is valid until the next call. A body that does not fit into the
// Reader's buffer is read into one of its own, up to most bytes; a longer one is ErrTooLong and stays unconsumed.
func (r *Reader) Body(most int) ([]byte, error) {
	if r.left > most {
		return nil, ErrTooLong
	}
	if r.left <= BufferSize {
		b, err := r.Peek(r.left)
		if err != nil {
			return nil, err
		}
		r.r += len(b)
		r.left = 0
		return b, nil
	}
	// Grown as it comes: who announces much and sends little shall not make us reserve much.
	var b []byte
	for r.left > 0 {
		chunk, err := r.chunk()
		if err != nil {
			return nil, err
		}
		b = append(b, chunk...)
		r.take(len(chunk))
	}
	return b, nil
}

// Discard passes over up to n bytes of the current message's body.
func (r *Reader) Discard(n int) error {
	for n = min(n, r.left); n > 0; {
		chunk, err := r.chunk()
		if err != nil {
			return err
		}
		k := min(n, len(chunk))
		r.take(k)
		n -= k
	}
	return nil
}

// Forward writes the current message, of which nothing was consumed, to w, in pieces when it is large. It does not flush.
func (r *Reader) Forward(w *Writer) error {
	if err := w.Write(r.head[:]); err != nil {
		return err
	}
	return r.ForwardRest(w)
}

// ForwardRest writes what is left of the current message's body to w. Before it waits for more it flushes, because complete
// messages may be in w.
func (r *Reader) ForwardRest(w *Writer) error {
	for r.left > 0 {
		if r.r == r.w {
			if err := w.Flush(); err != nil {
				return err
			}
		}
		chunk, err := r.chunk()
		if err != nil {
			return err
		}
		if err := w.Write(chunk); err != nil {
			return err
		}
		r.take(len(chunk))
	}
	return nil
}

// chunk gives what is buffered of the current message's body, at least one byte.
func (r *Reader) chunk() ([]byte, error) {
	if r.r == r.w {
		if err := r.fill(); err != nil {
			return nil, noEOF(err)
		}
	}
	return r.buf[r.r:min(r.w, r.r+r.left)], nil
}

func (r *Reader) take(n int) {
	r.r += n
	r.left -= n
}

// fill waits for more bytes.
func (r *Reader) fill() error {
	if r.r == r.w {
		r.r, r.w = 0, 0
		if r.raw != nil {
			r.Release()
		}
	}
	if r.r > 0 {
		r.w = copy(r.buf[:], r.buf[r.r:r.w])
		r.r = 0
	}
	r.n, r.err = 0, nil
	if r.raw != nil {
		if err := r.raw.Read(r.pull); err != nil {
			return err
		}
	} else {
		if r.buf == nil {
			r.buf = buffers.Get().(*[BufferSize]byte)
		}
		r.n, r.err = r.src.Read(r.buf[r.w:])
	}
	r.w += r.n
	r.got += uint64(r.n)
	if r.n > 0 {
		return nil
	}
	if r.err == nil {
		return io.ErrNoProgress
	}
	return r.err
}

// readReady reads once from the descriptor of a connection; false means that nothing is there yet.
func (r *Reader) readReady(fd uintptr) bool {
	if r.buf == nil {
		r.buf = buffers.Get().(*[BufferSize]byte)
	}
	for {
		n, errno := call(syscall.SYS_READ, fd, r.buf[r.w:])
		switch {
		case errno == syscall.EINTR:
			continue
		case errno == syscall.EAGAIN:
			if r.w == 0 {
				r.Release()
			}
			return false
		case errno != 0:
			r.err = errno
		case n == 0:
			r.err = io.EOF
		default:
			r.n = n
		}
		return true
	}
}

// Release gives the buffer back if it is empty. The next read takes one again.
func (r *Reader) Release() {
	if r.buf != nil && r.r == r.w {
		buffers.Put(r.buf)
		r.buf, r.r, r.w = nil, 0, 0
	}
}

// Drop gives the buffer back with what is in it. The Reader must not be used any more.
func (r *Reader) Drop() {
	r.r = r.w
	r.Release()
}

// noEOF turns the end of the stream inside a message into an error.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Writer gathers messages and writes them in one call. It is for one goroutine at a time. After an error it keeps returning
// it.
type Writer struct {
	dst  io.Writer
	buf  *[BufferSize]byte // nil while nothing is buffered
	n    int
	sent int64 // bytes given to dst
	err  error
}

// NewWriter writes to dst.
func NewWriter(dst io.Writer) *Writer {
	if conn, ok := dst.(net.Conn); ok {
		dst = Quick(conn)
	}
	return &Writer{dst: dst}
}

// Write buffers p, and writes to the connection what does not fit.
func (w *Writer) Write(p []byte) error {
	for len(p) > 0 && w.err == nil {
		if w.buf == nil {
			w.buf = buffers.Get().(*[BufferSize]byte)
		}
		n := copy(w.buf[w.n:], p)
		w.n += n
		p = p[n:]
		if w.n == BufferSize {
			w.send()
		}
	}
	return w.err
}

// Free is the empty rest of the buffer, to append to; what was appended is then given to Write. It saves a buffer, as
// bufio.Writer.AvailableBuffer does.
func (w *Writer) Free() []byte {
	if w.buf == nil {
		w.buf = buffers.Get().(*[BufferSize]byte)
	}
	return w.buf[w.n:w.n]
}

// Buffered is how many bytes wait for Flush.
func (w *Writer) Buffered() int { return w.n }

// Total is how many bytes were ever written, those that wait for Flush included.
func (w *Writer) Total() int64 { return w.sent + int64(w.n) }

// Sent is how many of them the connection was given.
func (w *Writer) Sent() int64 { return w.sent }

// Err is why the connection takes nothing any more; nil: it does.
func (w *Writer) Err() error { return w.err }

// CutBack takes back what was written after the first total bytes; false means that the connection was given some of it.
func (w *Writer) CutBack(total int64) bool {
	if total < w.sent {
		return false
	}
	w.n = min(w.n, int(total-w.sent))
	return true
}

// Flush writes what is buffered to the connection and gives the buffer back.
func (w *Writer) Flush() error {
	w.send()
	if w.buf != nil {
		buffers.Put(w.buf)
		w.buf = nil
	}
	return w.err
}

func (w *Writer) send() {
	if w.n > 0 && w.err == nil {
		_, w.err = w.dst.Write(w.buf[:w.n])
	}
	w.sent += int64(w.n)
	w.n = 0
}

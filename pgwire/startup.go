package pgwire

import (
	"bytes"
	"encoding/binary"
	"io"
	"strings"
)

// StartupMax is the length of the longest startup packet, as in PostgreSQL (MAX_STARTUP_PACKET_LENGTH).
const StartupMax = 10_000

// NameMax is the length of the longest name, in bytes (NAMEDATALEN - 1). PostgreSQL cuts a longer one, and finds somebody else.
const NameMax = 63

// Codes that stand in the place of a protocol version.
const (
	cancelCode = 1234<<16 | 5678
	sslCode    = 1234<<16 | 5679
	gssCode    = 1234<<16 | 5680
)

// Version30 is protocol 3.0.
const Version30 = 3 << 16

// StartupKind is what a client wants with its first packet.
type StartupKind int

// The kinds of first packets.
const (
	StartupSession StartupKind = iota // StartupMessage
	StartupSSL                        // SSLRequest
	StartupGSS                        // GSSENCRequest
	StartupCancel                     // CancelRequest
)

// Param is a name and value of a StartupMessage or ParameterStatus.
type Param struct{ Name, Value string }

// Startup is a client's first packet.
type Startup struct {
	Kind StartupKind

	Minor  int     // StartupSession: the minor version asked for, with major 3
	Params []Param // StartupSession: in the order in which they came, names in the order of the packet

	PID    uint32 // StartupCancel
	Secret []byte // StartupCancel: 4 bytes in protocol 3.0, up to 256 later
}

// Get gives the value of a parameter, empty if it is not there. As in PostgreSQL, the last one counts.
func (s *Startup) Get(name string) (value string) {
	for _, p := range s.Params {
		if p.Name == name {
			value = p.Value
		}
	}
	return value
}

// Negotiate tells whether protocol 3.0 must be negotiated down to, and which protocol options (_pq_.*) are not supported:
// all.
func (s *Startup) Negotiate() (needed bool, options []string) {
	for _, p := range s.Params {
		if strings.HasPrefix(p.Name, "_pq_.") {
			options = append(options, p.Name)
		}
	}
	return s.Minor > 0 || len(options) > 0, options
}

// ReadStartup reads one startup packet, and not a byte more: a TLS handshake may follow. io.EOF means that the client
// closed without a word, as port scanners and health checks do.
func ReadStartup(src io.Reader) (*Startup, error) {
	var head [8]byte
	if _, err := io.ReadFull(src, head[:]); err != nil {
		return nil, err
	}
	size, code := binary.BigEndian.Uint32(head[:]), binary.BigEndian.Uint32(head[4:])
	if size < 8 || size > StartupMax {
		return nil, violation("a startup packet with a length of %d, where 8 to %d is possible", size, StartupMax)
	}
	body := make([]byte, size-8)
	if _, err := io.ReadFull(src, body); err != nil {
		return nil, noEOF(err)
	}
	return parseStartup(code, body)
}

func parseStartup(code uint32, body []byte) (*Startup, error) {
	switch {
	case code == sslCode || code == gssCode:
		if len(body) > 0 {
			return nil, violation("a request for encryption with content")
		}
		if code == sslCode {
			return &Startup{Kind: StartupSSL}, nil
		}
		return &Startup{Kind: StartupGSS}, nil
	case code == cancelCode:
		if len(body) < 8 || len(body) > 4+256 {
			return nil, violation("a cancel request with a key of %d bytes, where 4 to 256 are possible", len(body)-4)
		}
		return &Startup{Kind: StartupCancel, PID: binary.BigEndian.Uint32(body), Secret: body[4:]}, nil
	case code>>16 != 3:
		return nil, violation("protocol version %d.%d; supported is 3", code>>16, code&0xffff)
	}
	s := &Startup{Kind: StartupSession, Minor: int(code & 0xffff)}
	for {
		name, rest, ok := cutString(body)
		if !ok {
			return nil, violation("a startup packet that does not end with a zero byte")
		}
		if name == "" {
			if len(rest) > 0 {
				return nil, violation("a startup packet with content after its end")
			}
			return s, nil
		}
		value, rest, ok := cutString(rest)
		if !ok {
			return nil, violation("a startup packet with a parameter that has no value")
		}
		s.Params = append(s.Params, Param{name, value})
		body = rest
	}
}

// cutString takes a zero-terminated string off b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	before, rest, ok := bytes.Cut(b, []byte{0})
	return string(before), rest, ok
}

// AppendStartup appends a StartupMessage of protocol 3.0.
func AppendStartup(dst []byte, params []Param) []byte {
	at := len(dst)
	dst = append(dst, 0, 0, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, Version30)
	for _, p := range params {
		dst = appendString(appendString(dst, p.Name), p.Value)
	}
	return finishAt(append(dst, 0), at)
}

// AppendSSLRequest appends an SSLRequest.
func AppendSSLRequest(dst []byte) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(dst, 8), sslCode)
}

// AppendCancel appends a CancelRequest.
func AppendCancel(dst []byte, pid uint32, secret []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(12+len(secret)))
	dst = binary.BigEndian.AppendUint32(dst, cancelCode)
	return append(binary.BigEndian.AppendUint32(dst, pid), secret...)
}

func appendString(dst []byte, s string) []byte { return append(append(dst, s...), 0) }

// finishAt writes the length word at position at, counting from it to the end.
func finishAt(dst []byte, at int) []byte {
	binary.BigEndian.PutUint32(dst[at:], uint32(len(dst)-at))
	return dst
}

// Package scram is SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677) in both roles, as PostgreSQL speaks it, with
// pass-through: whoever stands between client and server authenticates the client against the verifier that the server
// keeps, recovers the ClientKey from the client's proof, and logs in at the server with it. No password is needed or
// stored, and no PBKDF2 is computed. It works at every server whose verifier is byte-identical: same salt, same iteration
// count, same keys.
//
// Channel binding is tls-server-end-point. Each leg has its own TLS connection and so its own binding data; the
// ClientKey is the same for both, which is why pass-through works with SCRAM-SHA-256-PLUS as well.
//
// A conversation is for one goroutine and for one login. Package gateway does the messages around it.
package scram

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Names of the mechanisms.
const (
	Mechanism     = "SCRAM-SHA-256"
	MechanismPlus = "SCRAM-SHA-256-PLUS"
)

// ErrPassword is returned when the client does not know the password.
var ErrPassword = errors.New("the password does not match")

// errMessage is what the other side sent that SCRAM does not allow.
type errMessage struct{ what string }

func (e *errMessage) Error() string { return "SCRAM: " + e.what }

func malformed(format string, args ...any) error { return &errMessage{fmt.Sprintf(format, args...)} }

const keyLen = sha256.Size

// Key is a ClientKey, StoredKey or ServerKey.
type Key [keyLen]byte

// Verifier is what a server keeps of a password.
type Verifier struct {
	Salt       []byte
	Iterations int
	StoredKey  Key
	ServerKey  Key
}

// ParseVerifier reads a verifier as pg_authid.rolpassword has it: SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey.
func ParseVerifier(text string) (*Verifier, error) {
	bad := errors.New("not a SCRAM-SHA-256 verifier") // never with its content
	rest, ok := strings.CutPrefix(text, Mechanism+"$")
	head, keys, ok2 := strings.Cut(rest, "$")
	iterations, salt, ok3 := strings.Cut(head, ":")
	stored, server, ok4 := strings.Cut(keys, ":")
	if !ok || !ok2 || !ok3 || !ok4 {
		return nil, bad
	}
	v := &Verifier{}
	var err error
	if v.Iterations, err = strconv.Atoi(iterations); err != nil || v.Iterations < 1 {
		return nil, bad
	}
	if v.Salt, err = base64.StdEncoding.DecodeString(salt); err != nil || len(v.Salt) == 0 {
		return nil, bad
	}
	for _, k := range []struct {
		to   *Key
		text string
	}{{&v.StoredKey, stored}, {&v.ServerKey, server}} {
		b, err := base64.StdEncoding.DecodeString(k.text)
		if err != nil || len(b) != keyLen {
			return nil, bad
		}
		copy(k.to[:], b)
	}
	return v, nil
}

// String is the verifier as pg_authid.rolpassword has it.
func (v *Verifier) String() string {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("%s$%d:%s$%s:%s", Mechanism, v.Iterations, b64(v.Salt), b64(v.StoredKey[:]), b64(v.ServerKey[:]))
}

// PostgreSQL's defaults, which a mock must have to be like the rest.
const (
	defaultSaltLen    = 16
	defaultIterations = 4096
)

// Mock is a verifier for a user that does not exist or has none. Nothing matches it, and it is the same each time for the
// same secret and user, so that nobody learns who exists. The secret is random and lives as long as verifiers do.
func Mock(secret []byte, user string) *Verifier {
	v := &Verifier{Iterations: defaultIterations, Salt: mac(secret, []byte(user))[:defaultSaltLen]}
	_, _ = rand.Read(v.StoredKey[:]) // It does not fail (crypto/rand).
	_, _ = rand.Read(v.ServerKey[:])
	return v
}

// Keys log in at a server with the verifier that they belong to.
type Keys struct {
	ClientKey  Key
	ServerKey  Key
	Salt       []byte
	Iterations int
}

// Zero forgets the keys.
func (k *Keys) Zero() {
	clear(k.ClientKey[:])
	clear(k.ServerKey[:])
}

// EndPoint is the channel binding data tls-server-end-point (RFC 5929) of a server's certificate. It is nil for a
// certificate for whose signature none is defined, such as Ed25519; there is no channel binding then.
func EndPoint(cert *x509.Certificate) []byte {
	switch cert.SignatureAlgorithm {
	case x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1,
		x509.SHA256WithRSA, x509.DSAWithSHA256, x509.ECDSAWithSHA256, x509.SHA256WithRSAPSS:
		h := sha256.Sum256(cert.Raw)
		return h[:]
	case x509.SHA384WithRSA, x509.ECDSAWithSHA384, x509.SHA384WithRSAPSS:
		h := sha512.Sum384(cert.Raw)
		return h[:]
	case x509.SHA512WithRSA, x509.ECDSAWithSHA512, x509.SHA512WithRSAPSS:
		h := sha512.Sum512(cert.Raw)
		return h[:]
	default:
		return nil
	}
}

const bindingPrefix = "p=tls-server-end-point,,"

func mac(key []byte, messages ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, m := range messages {
		h.Write(m)
	}
	return h.Sum(nil)
}

func nonce() string {
	var b [18]byte // as PostgreSQL
	_, _ = rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}

func xor(a, b []byte) (k Key) {
	subtle.XORBytes(k[:], a, b)
	return k
}

// attribute takes "x=value" with the name off a message; the rest follows a comma.
func attribute(msg []byte, name byte) (value, rest []byte, err error) {
	if len(msg) < 2 || msg[0] != name || msg[1] != '=' {
		return nil, nil, malformed("attribute %q is missing", name)
	}
	value, rest, _ = bytes.Cut(msg[2:], []byte{','})
	return value, rest, nil
}

func printable(b []byte) bool {
	for _, c := range b {
		if c < 0x21 || c > 0x7e || c == ',' {
			return false
		}
	}
	return len(b) > 0
}

// Server is the side that authenticates a client: First, then Final.
type Server struct {
	verifier *Verifier
	binding  []byte // nil: channel binding is not offered
	nonce    string // its own part

	gs2         []byte // the client's header, with binding data if it has chosen PLUS
	clientFirst []byte // without gs2
	serverFirst []byte
}

// NewServer begins a conversation. binding is EndPoint of the certificate that the client sees, nil without TLS.
func NewServer(v *Verifier, binding []byte) *Server {
	return &Server{verifier: v, binding: binding, nonce: nonce()}
}

// Mechanisms are what to offer, best first.
func (s *Server) Mechanisms() []string {
	if s.binding != nil {
		return []string{MechanismPlus, Mechanism}
	}
	return []string{Mechanism}
}

// First takes the client's first message and gives the answer.
func (s *Server) First(mechanism string, msg []byte) (reply []byte, err error) {
	plus := mechanism == MechanismPlus
	if mechanism != Mechanism && (!plus || s.binding == nil) {
		return nil, malformed("the mechanism %q was not offered", mechanism)
	}
	flag, rest, ok := bytes.Cut(msg, []byte{','})
	authzid, bare, ok2 := bytes.Cut(rest, []byte{','})
	if !ok || !ok2 {
		return nil, malformed("the first message has no header")
	}
	if len(authzid) > 0 {
		return nil, malformed("authorization identities are not supported")
	}
	switch f := string(flag); {
	case f == "n" && !plus:
	case f == "y" && !plus:
		if s.binding != nil {
			return nil, malformed("the client believes that channel binding is not offered, but it is; somebody may be in between")
		}
	case f+",," == bindingPrefix && plus:
	default:
		return nil, malformed("the channel binding flag %q does not go with %s", flag, mechanism)
	}
	s.gs2 = bytes.Clone(msg[:len(flag)+2])
	if plus {
		s.gs2 = append(s.gs2, s.binding...)
	}
	s.clientFirst = bytes.Clone(bare)
	// The user is the one of the startup packet; what is named here does not count (PostgreSQL manual, "SASL Authentication").
	_, rest, err = attribute(bare, 'n')
	if err != nil {
		return nil, err
	}
	theirs, _, err := attribute(rest, 'r')
	if err != nil {
		return nil, err
	}
	if !printable(theirs) {
		return nil, malformed("the client's nonce has other than printable characters")
	}
	s.nonce = string(theirs) + s.nonce
	s.serverFirst = fmt.Appendf(nil, "r=%s,s=%s,i=%d", s.nonce, base64.StdEncoding.EncodeToString(s.verifier.Salt), s.verifier.Iterations)
	return s.serverFirst, nil
}

// Final takes the client's last message. It gives the last answer and the client's keys, or ErrPassword.
func (s *Server) Final(msg []byte) (reply []byte, keys *Keys, err error) {
	if s.serverFirst == nil {
		return nil, nil, errors.New("SCRAM: Final before First")
	}
	bound, rest, err := attribute(msg, 'c')
	if err != nil {
		return nil, nil, err
	}
	if string(bound) != base64.StdEncoding.EncodeToString(s.gs2) {
		return nil, nil, malformed("channel binding does not match; somebody may be in between")
	}
	full, _, err := attribute(rest, 'r')
	if err != nil {
		return nil, nil, err
	}
	if string(full) != s.nonce {
		return nil, nil, malformed("the nonce is another conversation's")
	}
	// The proof is the last attribute; others, which nobody uses, may stand before it.
	at := bytes.LastIndex(msg, []byte(",p="))
	if at < 0 {
		return nil, nil, malformed("attribute 'p' is missing")
	}
	proof := make([]byte, base64.StdEncoding.DecodedLen(len(msg)-at-3))
	n, err := base64.StdEncoding.Decode(proof, msg[at+3:])
	if err != nil || n != keyLen {
		return nil, nil, malformed("the proof is not %d bytes in base64", keyLen)
	}
	auth := authMessage(s.clientFirst, s.serverFirst, msg[:at])
	clientKey := xor(proof[:n], mac(s.verifier.StoredKey[:], auth))
	stored := sha256.Sum256(clientKey[:])
	if subtle.ConstantTimeCompare(stored[:], s.verifier.StoredKey[:]) != 1 {
		return nil, nil, ErrPassword
	}
	signature := mac(s.verifier.ServerKey[:], auth)
	return append([]byte("v="), base64.StdEncoding.EncodeToString(signature)...),
		&Keys{clientKey, s.verifier.ServerKey, bytes.Clone(s.verifier.Salt), s.verifier.Iterations}, nil
}

func authMessage(clientFirst, serverFirst, clientFinal []byte) []byte {
	return bytes.Join([][]byte{clientFirst, serverFirst, clientFinal}, []byte{','})
}

// Client is the side that logs in: First, Final, Verify.
type Client struct {
	keys    *Keys
	binding []byte // nil: no TLS
	nonce   string

	gs2         []byte
	clientFirst []byte // without the header
	auth        []byte // the message that signatures are over
}

// NewClient begins a login with keys. binding is EndPoint of the certificate that the server showed, nil without TLS.
func NewClient(keys *Keys, binding []byte) *Client {
	return &Client{keys: keys, binding: binding, nonce: nonce()}
}

// First chooses the best mechanism of those that the server offers and gives the first message.
func (c *Client) First(offered []string) (mechanism string, msg []byte, err error) {
	var plain, plus bool
	for _, m := range offered {
		plain, plus = plain || m == Mechanism, plus || m == MechanismPlus
	}
	header := "n,,"
	switch {
	case plus && c.binding != nil:
		mechanism, header = MechanismPlus, bindingPrefix
		c.gs2 = append([]byte(header), c.binding...)
	case !plain:
		return "", nil, malformed("the server offers none of %s and %s, but %q", MechanismPlus, Mechanism, offered)
	default:
		mechanism = Mechanism
		if c.binding != nil {
			header = "y,,"
		}
		c.gs2 = []byte(header)
	}
	c.clientFirst = []byte("n=,r=" + c.nonce)
	return mechanism, append([]byte(header), c.clientFirst...), nil
}

// Final takes the server's first message and gives the proof. A server with another verifier is an error: these keys
// cannot log in there.
func (c *Client) Final(serverFirst []byte) (msg []byte, err error) {
	full, rest, err := attribute(serverFirst, 'r')
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(string(full), c.nonce) || len(full) == len(c.nonce) || !printable(full) {
		return nil, malformed("the server's nonce does not continue ours")
	}
	salt, rest, err := attribute(rest, 's')
	if err != nil {
		return nil, err
	}
	iterations, _, err := attribute(rest, 'i')
	if err != nil {
		return nil, err
	}
	if string(salt) != base64.StdEncoding.EncodeToString(c.keys.Salt) || string(iterations) != strconv.Itoa(c.keys.Iterations) {
		return nil, &VerifierError{}
	}
	msg = fmt.Appendf(nil, "c=%s,r=%s", base64.StdEncoding.EncodeToString(c.gs2), full)
	c.auth = authMessage(c.clientFirst, serverFirst, msg)
	stored := sha256.Sum256(c.keys.ClientKey[:])
	proof := xor(c.keys.ClientKey[:], mac(stored[:], c.auth))
	return fmt.Appendf(msg, ",p=%s", base64.StdEncoding.EncodeToString(proof[:])), nil
}

// Verify takes the server's last message: a server that does not know the verifier itself is an impostor.
func (c *Client) Verify(serverFinal []byte) error {
	signature, _, err := attribute(serverFinal, 'v')
	if err != nil {
		return err
	}
	want := base64.StdEncoding.EncodeToString(mac(c.keys.ServerKey[:], c.auth))
	if c.auth == nil || subtle.ConstantTimeCompare(signature, []byte(want)) != 1 {
		return malformed("the server does not prove that it knows the verifier")
	}
	return nil
}

// VerifierError says that the server's verifier is not the one that the client was authenticated against.
type VerifierError struct{}

func (e *VerifierError) Error() string {
	return "the server keeps another SCRAM verifier for this role (salt or iteration count differ)"
}

// HintText is the advice that goes with the error.
func (e *VerifierError) HintText() string {
	return "copy rolpassword from pg_authid of the other site with ALTER ROLE ... PASSWORD 'SCRAM-SHA-256$...'"
}

package scram

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// derive makes a verifier, and the ClientKey, from a password of ASCII letters.
func derive(t interface{ Fatal(...any) }, password string, salt []byte, iterations int) (*Verifier, Key) {
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, keyLen)
	if err != nil {
		t.Fatal(err)
	}
	client := Key(mac(salted, []byte("Client Key")))
	return &Verifier{salt, iterations, sha256.Sum256(client[:]), Key(mac(salted, []byte("Server Key")))}, client
}

// TestVectorsOfRFC7677: both roles give the messages of the RFC's example. Its client names its user, which PostgreSQL's do
// not, so the first message is put in place.
func TestVectorsOfRFC7677(t *testing.T) {
	const (
		clientNonce = "rOprNGfwEbeRWgbNEkqO"
		serverNonce = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
		clientFirst = "n,,n=user,r=" + clientNonce
		serverFirst = "r=" + clientNonce + serverNonce + ",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
		clientFinal = "c=biws,r=" + clientNonce + serverNonce + ",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
		serverFinal = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
	)
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	if err != nil {
		t.Fatal(err)
	}
	v, clientKey := derive(t, "pencil", salt, 4096)
	s := NewServer(v, nil)
	s.nonce = serverNonce
	if got, err := s.First(Mechanism, []byte(clientFirst)); err != nil || string(got) != serverFirst {
		t.Fatalf("%s, %v", got, err)
	}
	got, keys, err := s.Final([]byte(clientFinal))
	if err != nil || string(got) != serverFinal {
		t.Fatalf("%s, %v", got, err)
	}
	if keys.ClientKey != clientKey {
		t.Error("the ClientKey was not recovered")
	}

	c := NewClient(keys, nil)
	c.nonce = clientNonce
	if _, _, err := c.First([]string{Mechanism}); err != nil {
		t.Fatal(err)
	}
	c.clientFirst = []byte(clientFirst[3:])
	if got, err := c.Final([]byte(serverFirst)); err != nil || string(got) != clientFinal {
		t.Fatalf("%s, %v", got, err)
	}
	if err := c.Verify([]byte(serverFinal)); err != nil {
		t.Error(err)
	}
	keys.Zero()
	if keys.ClientKey != (Key{}) || keys.ServerKey != (Key{}) {
		t.Error("the keys are still there")
	}
}

// login lets a client with keys and a server with a verifier talk; between may change messages.
func login(v *Verifier, serverBinding []byte, k *Keys, clientBinding []byte, between func(step int, msg []byte) []byte) (*Keys, string, error) {
	s, c := NewServer(v, serverBinding), NewClient(k, clientBinding)
	mech, m1, err := c.First(s.Mechanisms())
	if err != nil {
		return nil, "", err
	}
	m2, err := s.First(mech, between(1, m1))
	if err != nil {
		return nil, mech, err
	}
	m3, err := c.Final(between(2, m2))
	if err != nil {
		return nil, mech, err
	}
	m4, keys, err := s.Final(between(3, m3))
	if err != nil {
		return nil, mech, err
	}
	return keys, mech, c.Verify(between(4, m4))
}

func untouched(_ int, m []byte) []byte { return m }

// TestKeysPassThrough: what one login gave logs in again, over another channel.
func TestKeysPassThrough(t *testing.T) {
	v, ck := derive(t, "secret", []byte("0123456789abcdef"), 10)
	k := &Keys{ck, v.ServerKey, v.Salt, v.Iterations}
	for range 3 {
		got, mech, err := login(v, []byte("client's leg"), k, []byte("client's leg"), untouched)
		if err != nil || mech != MechanismPlus {
			t.Fatal(mech, err)
		}
		k = got
	}
	if _, mech, err := login(v, nil, k, []byte("TLS, but no PLUS at the server"), untouched); err != nil || mech != Mechanism {
		t.Error(mech, err)
	}
	if _, mech, err := login(v, []byte("PLUS is offered to a client without"), k, nil, untouched); err != nil || mech != Mechanism {
		t.Error(mech, err)
	}
}

func TestRefused(t *testing.T) {
	v, ck := derive(t, "secret", []byte("0123456789abcdef"), 10)
	k := &Keys{ck, v.ServerKey, v.Salt, v.Iterations}
	_, wrong := derive(t, "wrong", v.Salt, v.Iterations)
	other, _ := derive(t, "secret", []byte("another salt 123"), 10)
	more, _ := derive(t, "secret", v.Salt, 11)
	if _, _, err := login(v, nil, &Keys{wrong, v.ServerKey, v.Salt, v.Iterations}, nil, untouched); !errors.Is(err, ErrPassword) {
		t.Error("wrong password:", err)
	}
	if _, _, err := login(Mock([]byte("s"), "u"), nil, &Keys{ck, v.ServerKey, Mock([]byte("s"), "u").Salt, 4096}, nil, untouched); !errors.Is(err, ErrPassword) {
		t.Error("no such user:", err)
	}
	for _, v := range []*Verifier{other, more} {
		_, _, err := login(v, nil, k, nil, untouched)
		if e, ok := errors.AsType[*VerifierError](err); !ok || e.HintText() == "" {
			t.Error("another verifier:", err)
		}
	}
	impostor := *v
	impostor.ServerKey[0]++
	if _, _, err := login(&impostor, nil, k, nil, untouched); err == nil || !strings.Contains(err.Error(), "does not prove") {
		t.Error("impostor:", err)
	}
	if _, _, err := login(v, []byte("one channel"), k, []byte("another channel"), untouched); err == nil || !strings.Contains(err.Error(), "somebody may be in between") {
		t.Error("another channel:", err)
	}
	// Somebody in between takes PLUS off the list.
	s, c := NewServer(v, []byte("b")), NewClient(k, []byte("b"))
	mech, m1, err := c.First([]string{Mechanism})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.First(mech, m1); err == nil || !strings.Contains(err.Error(), "somebody may be in between") {
		t.Error("downgrade:", err)
	}
	if _, _, err := c.First([]string{"SCRAM-SHA-512"}); err == nil {
		t.Error("a mechanism that we do not speak was chosen")
	}
	for _, m := range []struct{ mech, first string }{
		{"PLAIN", "n,,n=,r=abc"},
		{MechanismPlus, "n,,n=,r=abc"},
		{MechanismPlus, "p=tls-unique,,n=,r=abc"},
		{Mechanism, "p=tls-server-end-point,,n=,r=abc"},
		{Mechanism, "n,a=admin,n=,r=abc"},
		{Mechanism, "n,,m=x,n=,r=abc"},
		{Mechanism, "n,,n=,r="},
		{Mechanism, "n,,n=,r=a b"},
		{Mechanism, "n"},
		{Mechanism, ""},
	} {
		if _, err := NewServer(v, []byte("b")).First(m.mech, []byte(m.first)); err == nil {
			t.Errorf("%s %q was taken", m.mech, m.first)
		}
	}
}

// TestChangedMessagesAreRefused: whoever changes a byte on the way stops the login.
func TestChangedMessagesAreRefused(t *testing.T) {
	v, ck := derive(t, "secret", []byte("0123456789abcdef"), 10)
	k := &Keys{ck, v.ServerKey, v.Salt, v.Iterations}
	rapid.Check(t, func(t *rapid.T) {
		at, step := rapid.IntRange(0, 200).Draw(t, "at"), rapid.IntRange(1, 4).Draw(t, "step")
		mask := byte(rapid.IntRange(1, 255).Draw(t, "mask"))
		changed := false
		_, _, err := login(v, []byte("b"), k, []byte("b"), func(s int, m []byte) []byte {
			if s != step || at >= len(m) {
				return m
			}
			m = bytes.Clone(m)
			m[at] ^= mask
			changed = true
			return m
		})
		if changed == (err == nil) {
			t.Fatalf("changed: %v, error: %v", changed, err)
		}
	})
}

func TestMockIsLikeTheRest(t *testing.T) {
	secret := []byte("secret of this gateway")
	a, again, b := Mock(secret, "a"), Mock(secret, "a"), Mock(secret, "b")
	if !bytes.Equal(a.Salt, again.Salt) || a.Iterations != again.Iterations {
		t.Error("a user that does not exist shows by another salt each time")
	}
	if bytes.Equal(a.Salt, b.Salt) || bytes.Equal(a.Salt, Mock([]byte("other"), "a").Salt) {
		t.Error("the salt does not depend on user and secret")
	}
	if len(a.Salt) != 16 || a.Iterations != 4096 || a.StoredKey == again.StoredKey {
		t.Errorf("%+v", a)
	}
}

func TestVerifierText(t *testing.T) {
	v, _ := derive(t, "secret", []byte("0123456789abcdef"), 4096)
	got, err := ParseVerifier(v.String())
	if err != nil || got.String() != v.String() || got.StoredKey != v.StoredKey {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{
		"", "md5d41d8cd98f00b204e9800998ecf8427e", "SCRAM-SHA-256$4096:c2FsdA==", "SCRAM-SHA-256$0:c2FsdA==$YQ==:YQ==",
		strings.Replace(v.String(), "4096", "x", 1), v.String()[:len(v.String())-4], "SCRAM-SHA-256$4096:$YQ==:YQ==",
	} {
		if _, err := ParseVerifier(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

// FuzzConversation: nothing that a client or server sends makes the other side panic or log in.
func FuzzConversation(f *testing.F) {
	f.Add("n,,n=,r=abc", "c=biws,r=abc,p=AAAA")
	f.Add("p=tls-server-end-point,,n=,r=abc", "r=abc,s=AAAA,i=1")
	f.Add("y,,n=,r=abc", "v=AAAA")
	v, ck := derive(f, "secret", []byte("0123456789abcdef"), 10)
	k := &Keys{ck, v.ServerKey, v.Salt, v.Iterations}
	f.Fuzz(func(t *testing.T, one, two string) {
		for _, mech := range []string{Mechanism, MechanismPlus} {
			s := NewServer(v, []byte("b"))
			_, _ = s.First(mech, []byte(one))
			if _, _, err := s.Final([]byte(two)); err == nil {
				t.Error("logged in")
			}
		}
		c := NewClient(k, nil)
		_, _, _ = c.First([]string{Mechanism})
		_, _ = c.Final([]byte(one))
		if c.Verify([]byte(two)) == nil {
			t.Error("verified")
		}
		_, _ = ParseVerifier(one)
	})
}

package pgwire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgproto3"
)

// TestMessagesAreWhatOthersUnderstand: pgproto3 reads what is made here, and writes what is read here.
func TestMessagesAreWhatOthersUnderstand(t *testing.T) {
	var fromServer []byte
	fromServer = AppendNegotiate(fromServer, []string{"_pq_.x"})
	fromServer = AppendAuth(fromServer, AuthSASL, AppendMechanisms(nil, "SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"))
	fromServer = AppendAuth(fromServer, AuthOK, nil)
	fromServer = AppendParameterStatus(fromServer, Param{"TimeZone", "UTC"})
	fromServer = AppendBackendKeyData(fromServer, 7, []byte{1, 2, 3, 4})
	fromServer = AppendNotice(fromServer, &Error{Severity: "WARNING", Code: "01000", Message: "n", Routine: "r"})
	fromServer = AppendError(fromServer, &Error{Severity: "FATAL", Code: "57P01", Message: "m\x00m", Detail: "d", Hint: "h"})
	fromServer = AppendReadyForQuery(fromServer, Idle)
	f := pgproto3.NewFrontend(bytes.NewReader(fromServer), io.Discard)
	for _, want := range []pgproto3.BackendMessage{
		&pgproto3.NegotiateProtocolVersion{NewestMinorProtocol: Version30, UnrecognizedOptions: []string{"_pq_.x"}},
		&pgproto3.AuthenticationSASL{AuthMechanisms: []string{"SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"}},
		&pgproto3.AuthenticationOk{},
		&pgproto3.ParameterStatus{Name: "TimeZone", Value: "UTC"},
		&pgproto3.BackendKeyData{ProcessID: 7, SecretKey: []byte{1, 2, 3, 4}},
		&pgproto3.NoticeResponse{Severity: "WARNING", SeverityUnlocalized: "WARNING", Code: "01000", Message: "n", Routine: "r"},
		&pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: "57P01", Message: "mm", Detail: "d", Hint: "h"},
		&pgproto3.ReadyForQuery{TxStatus: Idle},
	} {
		got, err := f.Receive()
		if err != nil {
			t.Fatalf("want %T: %v", want, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}

	var fromClient []byte
	fromClient = AppendQuery(fromClient, "select 1")
	fromClient = AppendParse(fromClient, "s", []byte("select $1"), []byte{0, 1, 0, 0, 0, 23})
	fromClient = AppendTarget(fromClient, Describe, 'P', "p")
	fromClient = AppendTarget(fromClient, Close, 'S', "s")
	b := pgproto3.NewBackend(bytes.NewReader(fromClient), io.Discard)
	for _, want := range []pgproto3.FrontendMessage{
		&pgproto3.Query{String: "select 1"},
		&pgproto3.Parse{Name: "s", Query: "select $1", ParameterOIDs: []uint32{23}},
		&pgproto3.Describe{ObjectType: 'P', Name: "p"},
		&pgproto3.Close{ObjectType: 'S', Name: "s"},
	} {
		got, err := b.Receive()
		if err != nil {
			t.Fatalf("want %T: %v", want, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}

	bind, err := (&pgproto3.Bind{DestinationPortal: "p", PreparedStatement: "stmt", Parameters: [][]byte{[]byte("x")}}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	portal, statement, n, ok := ParseBind(bind[headerLen:])
	if string(portal) != "p" || string(statement) != "stmt" || n != 7 || !ok {
		t.Errorf("Bind: %q %q %d %v", portal, statement, n, ok)
	}
	exec, err := (&pgproto3.Execute{Portal: "p", MaxRows: 9}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	if portal, rows, err := ParseExecute(exec[headerLen:]); string(portal) != "p" || rows != 9 || err != nil {
		t.Errorf("Execute: %q %d %v", portal, rows, err)
	}
	row, err := (&pgproto3.DataRow{Values: [][]byte{[]byte("a"), nil, {}}}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	columns, err := ParseRow(row[headerLen:])
	if diff := cmp.Diff([][]byte{[]byte("a"), nil, {}}, columns); diff != "" || err != nil {
		t.Errorf("DataRow: %v\n%s", err, diff)
	}
	report := &Error{Severity: "ERROR", Code: "40001", Message: "m", Detail: "d", Hint: "h", Routine: "r"}
	if got, err := ParseError(AppendError(nil, report)[headerLen:]); err != nil || cmp.Diff(report, got) != "" {
		t.Errorf("ErrorResponse: %+v, %v", got, err)
	}
}

func TestStartupPackets(t *testing.T) {
	params := []Param{{"user", "app"}, {"database", "shop"}, {"_pq_.x", "1"}}
	later := AppendStartup(nil, params)
	later[7] = 2
	for _, c := range []struct {
		name string
		b    []byte
		want *Startup
		says string
	}{
		{"session", AppendStartup(nil, params[:2]), &Startup{Params: params[:2]}, ""},
		{"3.2", later, &Startup{Minor: 2, Params: params}, ""},
		{"SSL", AppendSSLRequest(nil), &Startup{Kind: StartupSSL}, ""},
		{"GSS", []byte{0, 0, 0, 8, 4, 210, 22, 48}, &Startup{Kind: StartupGSS}, ""},
		{"cancel", AppendCancel(nil, 5, []byte("four")), &Startup{Kind: StartupCancel, PID: 5, Secret: []byte("four")}, ""},
		{"cancel with a short key", AppendCancel(nil, 5, []byte("x")), nil, "key of 1 bytes"},
		{"nothing", nil, nil, "EOF"},
		{"HTTP", []byte("GET / HTTP/1.1\r\n\r\n"), nil, "length of"},
		{"version 2", []byte{0, 0, 0, 8, 0, 2, 0, 0}, nil, "version 2.0"},
		{"cut", AppendStartup(nil, params)[:20], nil, "unexpected EOF"},
		{"no end", []byte{0, 0, 0, 11, 0, 3, 0, 0, 'a', 0, 'b'}, nil, "no value"},
		{"content after the end", []byte{0, 0, 0, 10, 0, 3, 0, 0, 0, 'x'}, nil, "after its end"},
	} {
		src := bytes.NewReader(append(c.b, "not a part of it"...))
		if c.says != "" {
			src = bytes.NewReader(c.b)
		}
		got, err := ReadStartup(src)
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if diff := cmp.Diff(c.want, got); err != nil || diff != "" || src.Len() != len("not a part of it") {
			t.Errorf("%s: %v, %d bytes left\n%s", c.name, err, src.Len(), diff)
		}
	}
	s, err := ReadStartup(bytes.NewReader(later))
	if err != nil {
		t.Fatal(err)
	}
	if needed, options := s.Negotiate(); !needed || len(options) != 1 || options[0] != "_pq_.x" {
		t.Errorf("%v %q", needed, options)
	}
	if s.Get("database") != "shop" || s.Get("none") != "" {
		t.Error("wrong parameter")
	}
	if _, err := ReadStartup(bytes.NewReader(nil)); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

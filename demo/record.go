package demo

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// outcome is what a client knows of one payment.
type outcome byte

const (
	unknown    outcome = 'u' // COMMIT was sent and no answer came: in doubt
	committed  outcome = 'c' // acknowledged
	rolledBack outcome = 'r' // certainly not committed
)

// entry is one payment as its client recorded it.
type entry struct {
	client  int
	seq     int64
	id      string // UUID
	site    string // where it was written
	amount  int64  // KRW
	outcome outcome
}

// recorder is the client-side record of one client: a file to which lines are appended.
//
//	a SEQ ID SITE AMOUNT   attempt: COMMIT is about to be sent
//	c SEQ | r SEQ | u SEQ  its outcome
//
// What was rolled back may be tried again, maybe at another site: its last attempt counts.
//
// The attempt is on disk before COMMIT is sent. The outcome is written at once and fsynced with the next attempt: were it
// lost in a power failure, the payment would count as in doubt, which claims less than is true and never more.
// Not for concurrent use.
type recorder struct {
	f *os.File
}

// recordName is the file of one client in the folder of the records.
func recordName(client int) string { return fmt.Sprintf("client-%03d", client) }

func newRecorder(dir string, client int) (*recorder, error) {
	f, err := os.OpenFile(filepath.Join(dir, recordName(client)), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make the record of client %d: %w", client, err)
	}
	return &recorder{f}, nil
}

func (r *recorder) attempt(e entry) error {
	_, err := fmt.Fprintf(r.f, "a %d %s %s %d\n", e.seq, e.id, e.site, e.amount)
	if err == nil {
		err = r.f.Sync()
	}
	if err != nil {
		return fmt.Errorf("record an attempt: %w", err)
	}
	return nil
}

func (r *recorder) outcome(seq int64, o outcome) error {
	if _, err := fmt.Fprintf(r.f, "%c %d\n", o, seq); err != nil {
		return fmt.Errorf("record an outcome: %w", err)
	}
	return nil
}

func (r *recorder) close() error { return errors.Join(r.f.Sync(), r.f.Close()) }

// readRecords reads the records of all clients in a folder, in the order of client and attempt.
func readRecords(dir string) ([]entry, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the clients' records: %w", err)
	}
	var all []entry
	for _, f := range files {
		var client int
		if _, err := fmt.Sscanf(f.Name(), "client-%d", &client); err != nil {
			continue
		}
		b, err := fs.ReadFile(os.DirFS(dir), f.Name())
		if err != nil {
			return nil, fmt.Errorf("read the clients' records: %w", err)
		}
		entries, err := parseRecord(client, string(b))
		if err != nil {
			return nil, fmt.Errorf("read the record %s: %w", f.Name(), err)
		}
		all = append(all, entries...)
	}
	return all, nil
}

// parseRecord reads one client's record. A last line without its end was cut off while it was written and does not
// count: no COMMIT was sent for such an attempt. An attempt without an outcome is in doubt.
func parseRecord(client int, text string) ([]entry, error) {
	var entries []entry
	at := map[int64]int{}
	for n := 1; ; n++ {
		line, rest, whole := strings.Cut(text, "\n")
		if !whole {
			return entries, nil
		}
		text = rest
		if err := parseRecordLine(client, line, &entries, at); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
}

// triedAgain reports whether a further attempt may be of this payment.
func (e entry) triedAgain(id, amount string) bool {
	return e.outcome == rolledBack && e.id == id && strconv.FormatInt(e.amount, 10) == amount
}

func parseRecordLine(client int, line string, entries *[]entry, at map[int64]int) error {
	words := bufio.NewScanner(strings.NewReader(line))
	words.Split(bufio.ScanWords)
	var f []string
	for words.Scan() {
		f = append(f, words.Text())
	}
	if len(f) < 2 || len(f[0]) != 1 {
		return fmt.Errorf("%q is no entry", line)
	}
	seq, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		return fmt.Errorf("%q is no entry: %w", line, err)
	}
	i, known := at[seq]
	switch kind := f[0][0]; {
	case kind == 'a' && len(f) == 5 && (!known || (*entries)[i].triedAgain(f[2], f[4])):
		amount, err := strconv.ParseInt(f[4], 10, 64)
		if err != nil {
			return fmt.Errorf("%q is no entry: %w", line, err)
		}
		if known {
			(*entries)[i].site, (*entries)[i].outcome = f[3], unknown
			break
		}
		at[seq] = len(*entries)
		*entries = append(*entries, entry{client: client, seq: seq, id: f[2], site: f[3], amount: amount, outcome: unknown})
	case kind != 'a' && len(f) == 2 && known && strings.ContainsRune("cru", rune(kind)):
		(*entries)[i].outcome = outcome(kind)
	default:
		return fmt.Errorf("%q does not follow from what stands before it", line)
	}
	return nil
}

package journal

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"

	"github.com/duri-io/duri/wal"
)

func TestWhatIsAppendedIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		txns := genTxns(t, 0x100, rapid.IntRange(0, 8).Draw(t, "n"))
		o := Options{SegmentBytes: rapid.Int64Range(1, 20000).Draw(t, "segment")}
		fsys := newMemFS()
		j := create(t, fsys, o)
		appendAll(t, j, txns...)
		must(t, j.Flush())
		have, err := readAll(j, 0x100)
		must(t, err)
		if d := diffTxns(txns, have); d != "" {
			t.Fatal("before closing: ", d)
		}
		before := j.State()
		must(t, j.Close())
		j = open(t, fsys, o)
		defer j.Close()
		if have, err = readAll(j, 0x100); err != nil {
			t.Fatal(err)
		}
		if d := diffTxns(txns, have); d != "" {
			t.Fatal("after opening: ", d)
		}
		after := j.State()
		before.DiskBytes, before.Durable, after.DiskBytes = 0, after.End, 0
		if d := cmp.Diff(before, after); d != "" {
			t.Fatal("state: ", d)
		}
		if _, err := Verify(context.Background(), "dir", Options{FS: fsys}); err != nil {
			t.Fatal(err)
		}
	})
}

func TestReaderBeginsAtTheFirstRecordBeyondAnyPosition(t *testing.T) {
	j := create(t, newMemFS(), Options{SegmentBytes: 900})
	defer j.Close()
	for i := range 20 {
		appendAll(t, j, simpleTxn(i))
	}
	must(t, j.Flush())
	if n := j.State().Segments; n < 4 {
		t.Fatalf("%d segments, want several", n)
	}
	for from := wal.LSN(0x100); from < j.End(); from += 25 {
		r, err := j.NewReader(from)
		must(t, err)
		rec, ok, err := r.TryNext()
		must(t, err)
		want := simpleTxn(int(from-0x100) / 100)
		if d := diffTxn(want, rec.Txn); !ok || d != "" {
			t.Fatalf("from %s: %v %s", from, ok, d)
		}
		if rec.From != from || rec.To != want.EndLSN {
			t.Fatalf("from %s: record covers (%s,%s]", from, rec.From, rec.To)
		}
		must(t, r.Close())
	}
}

func TestIndexLeadsToTheSameRecords(t *testing.T) {
	j := create(t, newMemFS(), Options{SegmentBytes: 8 << 20})
	defer j.Close()
	big := wal.Value{Kind: wal.Text, Data: make([]byte, 100<<10)}
	for i := range 40 { // 4 MB: several index entries
		txn := simpleTxn(i)
		txn.Changes[0].New[2] = big
		appendAll(t, j, txn)
	}
	if n := len(j.seg.index); n < 3 {
		t.Fatalf("%d index entries, want at least 3", n)
	}
	// The last ones are not flushed: the index must not lead a reader there.
	for i := range 40 {
		from := simpleTxn(i).EndLSN - 100
		have, err := readAll(j, from)
		must(t, err)
		if len(have) > 0 && have[0].EndLSN != from+100 {
			t.Fatalf("from %s: first is %s", from, have[0].EndLSN)
		}
	}
	must(t, j.Flush())
	have, err := readAll(j, simpleTxn(35).EndLSN)
	must(t, err)
	if len(have) != 4 || have[0].XID != 736 {
		t.Fatalf("%d transactions from the middle", len(have))
	}
	to := create(t, newMemFS(), Options{})
	defer to.Close()
	must(t, to.AppendPosition(simpleTxn(35).EndLSN, nil, 0))
	to.in.at = tally{to: to.End(), chain: j.in.at.chain} // the chain is not the subject here
	r, err := j.NewReader(to.End())
	must(t, err)
	defer r.Close()
	f, err := r.NextFrames(context.Background(), 1<<20)
	must(t, err)
	must(t, to.AppendFrames(f.Data)) // the schemas from before the index entry came with it
}

func TestRecordsAtOrBelowTheEndAreDropped(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	appendAll(t, j, simpleTxn(0), simpleTxn(1), simpleTxn(0), simpleTxn(1))
	must(t, j.AppendPosition(simpleTxn(1).EndLSN, nil, 5))
	if s := j.State(); s.Txns != 2 || s.End != simpleTxn(1).EndLSN {
		t.Fatalf("state %+v", s)
	}
	// An overlap from below is accepted: after a keepalive in the middle of a transaction's range.
	must(t, j.AppendPosition(simpleTxn(2).EndLSN-50, nil, 5))
	appendAll(t, j, simpleTxn(2))
	if s := j.State(); s.Txns != 3 {
		t.Fatalf("state %+v", s)
	}
}

func TestPositionsAdvanceTheCoverage(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{})
	seen := []wal.Seen{{Site: 3, LSN: 77}}
	must(t, j.AppendPosition(0x500, seen, 42))
	must(t, j.Close())
	j = open(t, fsys, Options{})
	defer j.Close()
	if s := j.State(); s.End != 0x500 || s.Txns != 0 || s.Chain != (Chain{}) || !slices.Equal(s.Seen, seen) {
		t.Fatalf("state %+v", s)
	}
	r, err := j.NewReader(0x200)
	must(t, err)
	defer r.Close()
	rec, err := r.Next(context.Background())
	must(t, err)
	want := Record{From: 0x200, To: 0x500, Position: &Position{From: 0x100, To: 0x500, Time: 42, Seen: seen}}
	if d := cmp.Diff(want, rec); d != "" {
		t.Fatal(d)
	}
}

func TestTransactionsThatCannotBeEncodedLeaveNoTrace(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	defer j.Close()
	before := j.State()
	bad := map[string]func(*wal.Txn){
		"other origin":       func(x *wal.Txn) { x.Origin = 2 },
		"commit beyond end":  func(x *wal.Txn) { x.CommitLSN = x.EndLSN + 1 },
		"unsorted seen":      func(x *wal.Txn) { x.Seen = []wal.Seen{{Site: 3}, {Site: 2}} },
		"no relation":        func(x *wal.Txn) { x.Changes[2].Relation = nil },
		"unsealed relation":  func(x *wal.Txn) { r := *x.Changes[2].Relation; r.ID = wal.RelationID{}; x.Changes[2].Relation = &r },
		"too many columns":   func(x *wal.Txn) { x.Changes[2].Old = make(wal.Tuple, 2) },
		"unknown value kind": func(x *wal.Txn) { x.Changes[2].Old[0].Kind = 'b' },
		"unknown op":         func(x *wal.Txn) { x.Changes[2].Op = 'X' },
		"old tuple, no kind": func(x *wal.Txn) { x.Changes[2].OldKind = wal.OldNone },
		"insert with old":    func(x *wal.Txn) { x.Changes[0].OldKind = wal.OldKey },
		"delete with new":    func(x *wal.Txn) { x.Changes[2].New = x.Changes[2].Old },
		"options on delete":  func(x *wal.Txn) { x.Changes[2].Options = 1 },
	}
	for name, spoil := range bad {
		txn := simpleTxn(0)
		spoil(txn)
		if err := j.AppendTxn(txn); err == nil || errors.Is(err, ErrFailed) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	if d := cmp.Diff(before, j.State()); d != "" {
		t.Fatal(d)
	}
	appendAll(t, j, simpleTxn(0))
	must(t, j.Flush())
	have, err := readAll(j, 0x100)
	must(t, err)
	if d := diffTxns([]*wal.Txn{simpleTxn(0)}, have); d != "" {
		t.Fatal(d)
	}
}

func TestDirectoryIsOpenOnce(t *testing.T) {
	dir := t.TempDir()
	j, err := Create(dir, testHeader(), Options{SegmentBytes: 1 << 20})
	must(t, err)
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrInUse) {
		t.Fatalf("second open: %v", err)
	}
	must(t, j.Close())
	must(t, j.Close())
	if _, err := Create(dir, testHeader(), Options{}); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("create over a journal: %v", err)
	}
	if _, err := Open(t.TempDir(), Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("open nothing: %v", err)
	}
	if _, err := Open(dir+"/none", Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("open no directory: %v", err)
	}
	j, err = Open(dir, Options{SegmentBytes: 1 << 20})
	must(t, err)
	if d := cmp.Diff(testHeader(), j.Header()); d != "" {
		t.Fatal(d)
	}
	must(t, j.Close())
	if err := j.AppendTxn(simpleTxn(0)); !errors.Is(err, ErrClosed) {
		t.Fatalf("append after close: %v", err)
	}
	if err := j.Sync(); !errors.Is(err, ErrClosed) {
		t.Fatalf("sync after close: %v", err)
	}
}

func TestPruneDropsWholeFilesAndNeverTheLast(t *testing.T) {
	fsys := newMemFS()
	o := Options{SegmentBytes: 900}
	j := create(t, fsys, o)
	for i := range 20 {
		appendAll(t, j, simpleTxn(i))
	}
	must(t, j.Sync())
	early, err := j.NewReader(0x100)
	must(t, err)
	defer early.Close()
	if _, err := early.Next(context.Background()); err != nil {
		t.Fatal(err)
	}
	middle := simpleTxn(10).EndLSN
	must(t, j.Prune(middle))
	start := j.Start()
	if start <= 0x100 || start > middle {
		t.Fatalf("start %s after prune up to %s", start, middle)
	}
	var pruned *PrunedError
	if _, err := j.NewReader(start - 1); !errors.As(err, &pruned) || !errors.Is(err, ErrPruned) || pruned.Start != start {
		t.Fatalf("reader below the start: %v", err)
	}
	if _, err := j.HeaderAt(start - 1); !errors.Is(err, ErrPruned) {
		t.Fatalf("header below the start: %v", err)
	}
	for err == nil { // a reader within a removed file reads to its end, then hears of it
		_, err = early.Next(context.Background())
	}
	if !errors.As(err, &pruned) || pruned.Start != start {
		t.Fatalf("early reader ended with %v", err)
	}
	have, err := readAll(j, start)
	must(t, err)
	if last := have[len(have)-1]; last.XID != 719 {
		t.Fatalf("last transaction is %d", last.XID)
	}
	must(t, j.Prune(1<<60))
	if s := j.State(); s.Segments != 1 || s.End != simpleTxn(19).EndLSN {
		t.Fatalf("state %+v", s)
	}
	want := j.State()
	must(t, j.Close())
	j = open(t, fsys, o)
	defer j.Close()
	if have := j.State(); have.Chain != want.Chain || have.Start != want.Start || have.Txns != 20 {
		t.Fatalf("state after opening %+v", have)
	}
}

func TestReadersFollowAnAppenderAcrossFiles(t *testing.T) {
	const n, readers = 2000, 3
	dir := t.TempDir()
	j, err := Create(dir, testHeader(), Options{SegmentBytes: 20000})
	must(t, err)
	defer j.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var group errgroup.Group
	for k := range readers {
		group.Go(func() error {
			r, err := j.NewReader(0x100)
			if err != nil {
				return err
			}
			defer r.Close()
			if k == 0 {
				return followFrames(ctx, t, r, n)
			}
			return followTxns(ctx, r, n)
		})
	}
	done := make(chan struct{})
	group.Go(func() error { // the syncer
		for {
			select {
			case <-done:
				return nil
			default:
				if err := j.Sync(); err != nil {
					return err
				}
			}
		}
	})
	group.Go(func() error {
		defer close(done)
		for i := range n {
			if err := j.AppendTxn(simpleTxn(i)); err != nil {
				return err
			}
			if i%7 == 0 {
				if err := j.Flush(); err != nil {
					return err
				}
			}
		}
		return j.Sync()
	})
	must(t, group.Wait())
	if s := j.State(); s.Segments < 5 || s.Durable != s.End {
		t.Fatalf("state %+v", s)
	}
}

// A reader that trusts the chain must still go from file to file, from any beginning.
func TestReaderThatTrustsTheChainCrossesFiles(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{SegmentBytes: 2000})
	var want []*wal.Txn
	for i := range 100 {
		want = append(want, simpleTxn(i))
	}
	appendAll(t, j, want...)
	must(t, j.Flush())
	if n := j.State().Segments; n < 3 {
		t.Fatalf("%d segments, want several", n)
	}
	for _, skip := range []int{0, 37, 99} {
		from := j.Start()
		if skip > 0 {
			from = want[skip-1].EndLSN
		}
		r, err := j.NewReader(from)
		must(t, err)
		r.TrustChain()
		var have []*wal.Txn
		for {
			rec, ok, err := r.TryNext()
			must(t, err)
			if !ok {
				break
			}
			if rec.Txn != nil {
				have = append(have, rec.Txn)
			}
		}
		if d := diffTxns(want[skip:], have); d != "" {
			t.Errorf("from %s: %s", from, d)
		}
		must(t, r.Close())
	}
}

func followTxns(ctx context.Context, r *Reader, n int) error {
	for i := range n {
		rec, err := r.Next(ctx)
		if err != nil {
			return err
		}
		if d := diffTxn(simpleTxn(i), rec.Txn); d != "" {
			return errors.New(d)
		}
	}
	return nil
}

// followFrames copies into a second journal.
func followFrames(ctx context.Context, t *testing.T, r *Reader, n int) error {
	to, err := Create(t.TempDir(), testHeader(), Options{SegmentBytes: 13000})
	if err != nil {
		return err
	}
	defer to.Close()
	for to.End() < simpleTxn(n-1).EndLSN {
		f, err := r.NextFrames(ctx, 5000)
		if err != nil {
			return err
		}
		if f.From != to.End() {
			return errors.New("frames do not begin where the copy ends")
		}
		if err := to.AppendFrames(f.Data); err != nil {
			return err
		}
	}
	if err := to.Flush(); err != nil {
		return err
	}
	have, err := readAll(to, 0x100)
	if err == nil && len(have) != n {
		err = errors.New("the copy lacks transactions")
	}
	return err
}

func TestWaitingReaderEndsWithContextAndWithClose(t *testing.T) {
	j := create(t, newMemFS(), Options{})
	r, err := j.NewReader(0x100)
	must(t, err)
	defer r.Close()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := r.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	appendAll(t, j, simpleTxn(0))
	if _, ok, err := r.TryNext(); ok || err != nil {
		t.Fatalf("unflushed record was seen: %v %v", ok, err)
	}
	got := make(chan error, 1)
	go func() {
		_, err := r.Next(context.Background())
		if err == nil {
			_, err = r.Next(context.Background())
		}
		got <- err
	}()
	must(t, j.Close())
	if err := <-got; !errors.Is(err, ErrClosed) {
		t.Fatalf("closed: %v", err)
	}
	if _, err := j.NewReader(0x100); !errors.Is(err, ErrClosed) {
		t.Fatalf("reader of a closed journal: %v", err)
	}
}

func TestAppendsGoOnDuringAnFsync(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{})
	defer j.Close()
	entered, leave := make(chan struct{}), make(chan struct{})
	var once sync.Once
	fsys.onSync = func(string) {
		once.Do(func() {
			close(entered)
			<-leave
		})
	}
	appendAll(t, j, simpleTxn(0))
	synced := make(chan error, 2)
	go func() { synced <- j.Sync() }()
	<-entered
	appendAll(t, j, simpleTxn(1))
	must(t, j.Flush())
	if d := j.Durable(); d != 0x100 {
		t.Fatalf("durable %s during the first fsync", d)
	}
	go func() { synced <- j.Sync() }() // covers the second: must not be satisfied by the first fsync
	close(leave)
	must(t, <-synced)
	must(t, <-synced)
	if d := j.Durable(); d != simpleTxn(1).EndLSN {
		t.Fatalf("durable %s, want %s", d, simpleTxn(1).EndLSN)
	}
}

func TestSealsAreWrittenEverySecondWithTraffic(t *testing.T) {
	now := wal.Time(1000)
	j := create(t, newMemFS(), Options{Now: func() wal.Time { return now }})
	defer j.Close()
	count := func() (n int) {
		r, err := j.NewReader(0x100)
		must(t, err)
		defer r.Close()
		for {
			ok, err := r.group()
			must(t, err)
			if !ok {
				return n
			}
			if r.in.kind == TypeSeal {
				n++
			}
		}
	}
	for i, want := range []int{0, 1, 1, 2} {
		appendAll(t, j, simpleTxn(i))
		if i%2 == 1 {
			now += 1e6
		}
		must(t, j.Sync())
		if have := count(); have != want {
			t.Fatalf("after %d transactions %d seals, want %d", i+1, have, want)
		}
	}
	now += 5e6
	must(t, j.AppendPosition(1<<30, nil, 0))
	must(t, j.Sync())
	if have := count(); have != 2 {
		t.Fatalf("a keepalive alone was sealed: %d", have)
	}
}

func TestFailedFsyncAbandonsTheSegmentUntilReopened(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{})
	appendAll(t, j, simpleTxn(0))
	must(t, j.Sync())
	appendAll(t, j, simpleTxn(1))
	fsys.failSync = func(string) error { return errInjected }
	if err := j.Sync(); !errors.Is(err, ErrFailed) || !errors.Is(err, errInjected) {
		t.Fatalf("failed fsync: %v", err)
	}
	fsys.failSync = nil // the kernel reports an error once; a second try would succeed, wrongly
	for range 2 {
		if err := j.Sync(); !errors.Is(err, ErrFailed) {
			t.Fatalf("sync after a failed fsync: %v", err)
		}
	}
	if err := j.AppendTxn(simpleTxn(2)); !errors.Is(err, ErrFailed) {
		t.Fatalf("append after a failed fsync: %v", err)
	}
	if d := j.Durable(); d != simpleTxn(0).EndLSN {
		t.Fatalf("durable %s", d)
	}
	if err := j.Close(); !errors.Is(err, ErrFailed) {
		t.Fatalf("close: %v", err)
	}
	// The page cache shows the second transaction, the device does not have it: it must not count.
	j = open(t, fsys, Options{})
	defer j.Close()
	if e := j.End(); e != simpleTxn(0).EndLSN {
		t.Fatalf("end after opening %s, want %s", e, simpleTxn(0).EndLSN)
	}
	appendAll(t, j, simpleTxn(1))
	must(t, j.Sync())
}

func TestFullDiskAndShortWriteAreErrorsAndLoseNothingDurable(t *testing.T) {
	for name, fail := range map[string]func(string, int64, int) (int, error){
		"full disk":   func(_ string, _ int64, n int) (int, error) { return n / 2, syscall.ENOSPC },
		"short write": func(_ string, _ int64, n int) (int, error) { return n / 2, nil },
	} {
		fsys := newMemFS()
		j := create(t, fsys, Options{})
		appendAll(t, j, simpleTxn(0))
		must(t, j.Sync())
		appendAll(t, j, simpleTxn(1))
		fsys.failWrite = fail
		if err := j.Flush(); !errors.Is(err, ErrFailed) {
			t.Fatalf("%s: %v", name, err)
		}
		fsys.failWrite = nil
		if err := j.Sync(); !errors.Is(err, ErrFailed) {
			t.Fatalf("%s: sync: %v", name, err)
		}
		if err := j.Close(); !errors.Is(err, ErrFailed) {
			t.Fatalf("%s: close: %v", name, err)
		}
		j = open(t, fsys, Options{})
		have, err := readAll(j, 0x100)
		must(t, err)
		if d := diffTxns([]*wal.Txn{simpleTxn(0)}, have); d != "" {
			t.Fatalf("%s: %s", name, d)
		}
		appendAll(t, j, simpleTxn(1))
		must(t, j.Close())
	}
}

func TestFullDiskAtANewFileCanBeTriedAgain(t *testing.T) {
	fsys := newMemFS()
	j := create(t, fsys, Options{SegmentBytes: 900})
	defer j.Close()
	fsys.failAllocate = func(string, int64) error { return syscall.ENOSPC }
	i := 0
	var err error
	for ; err == nil; i++ {
		err = j.AppendTxn(simpleTxn(i))
	}
	i--
	if !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrFailed) {
		t.Fatalf("append: %v", err)
	}
	must(t, j.Sync())
	if d := j.Durable(); d != simpleTxn(i-1).EndLSN {
		t.Fatalf("durable %s", d)
	}
	fsys.failAllocate = nil
	appendAll(t, j, simpleTxn(i))
	must(t, j.Sync())
	have, err := readAll(j, 0x100)
	must(t, err)
	if len(have) != i+1 {
		t.Fatalf("%d transactions, want %d", len(have), i+1)
	}
}

func TestNewFileWhoseDirectoryEntryIsUncertainAbandonsTheJournal(t *testing.T) {
	fsys := newMemFS()
	o := Options{SegmentBytes: 900}
	j := create(t, fsys, o)
	fsys.failSyncDir = func(string) error { return errInjected }
	i := 0
	var err error
	for ; err == nil; i++ {
		err = j.AppendTxn(simpleTxn(i))
	}
	if !errors.Is(err, ErrFailed) {
		t.Fatalf("append: %v", err)
	}
	fsys.failSyncDir = nil
	if err := j.Close(); !errors.Is(err, ErrFailed) {
		t.Fatalf("close: %v", err)
	}
	j = open(t, fsys, o)
	defer j.Close()
	if e := j.End(); e != simpleTxn(i-2).EndLSN {
		t.Fatalf("end %s", e)
	}
}

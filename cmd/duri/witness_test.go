package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/internal/term"
	"github.com/duri-io/duri/quorum/etcdstore"
)

// newWitnessCluster makes the files of a cluster whose voters have free ports of this machine.
func newWitnessCluster(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "demo")
	spec := config.InitSpec{
		Name: "demo", Out: dir, Witness: "127.0.0.1:7490", Databases: []config.Database{{Name: "app"}},
		Sites: []config.InitSite{{Name: "seoul", Address: "127.0.0.1:7400"}, {Name: "busan", Address: "127.0.0.1:7402"}},
	}
	if err := config.InitCluster(spec); err != nil {
		t.Fatal(err)
	}
	var ports []string
	for _, old := range []string{"7480", "7481", "7482", "7483", "7490", "7491"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // all at the end, so that they differ
		ports = append(ports, "127.0.0.1:"+old, l.Addr().String())
	}
	for _, name := range []string{"seoul", "busan", config.WitnessFolder} {
		file := filepath.Join(dir, name, config.FileName)
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(strings.NewReplacer(ports...).Replace(string(b))), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// startVoter runs the voter of a site, as its agent does.
func startVoter(t *testing.T, dir, site string) {
	t.Helper()
	c, err := config.Load(filepath.Join(dir, site, config.FileName))
	if err != nil {
		t.Fatal(err)
	}
	voter, ok := etcdstore.MemberOf(c, slog.New(slog.DiscardHandler))
	if !ok {
		t.Fatalf("%s has no voter", site)
	}
	m, err := etcdstore.StartMember(t.Context(), voter)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
}

// witness runs duri witness until the function that it gives is called, which returns the exit code and what was
// written to stderr. line is what it prints when it serves.
func witness(t *testing.T, args ...string) (line string, stop func() (int, string)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	var stderr bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, append([]string{"witness"}, args...), in, &stderr)
		_ = in.Close()
	}()
	// As SIGTERM does in main; too long a wait ends it as well.
	timer := time.AfterFunc(time.Minute, cancel)
	line, _ = bufio.NewReader(out).ReadString('\n')
	return line, func() (int, string) {
		timer.Stop()
		cancel()
		return <-code, stderr.String()
	}
}

func TestWitnessServesEndsAndIsReplaced(t *testing.T) {
	dir := newWitnessCluster(t)
	startVoter(t, dir, "seoul")
	startVoter(t, dir, "busan")
	file := filepath.Join(dir, config.WitnessFolder, config.FileName)

	for _, again := range []string{"first", "again"} {
		line, stop := witness(t, "-c", file)
		code, stderr := stop()
		if !strings.HasPrefix(line, "duri: witness witness of cluster demo serves at 127.0.0.1:") || code != term.ExitOK {
			t.Fatalf("%s: %q, exit code %d\n%s", again, line, code, stderr)
		}
	}

	if err := os.RemoveAll(filepath.Join(dir, config.WitnessFolder, "data")); err != nil {
		t.Fatal(err)
	}
	line, stop := witness(t, "-c", file)
	if code, stderr := stop(); line != "" || code != term.ExitFailed || !strings.Contains(stderr, "hint: if it is really lost: duri witness --replace") {
		t.Errorf("without its data: %q, exit code %d\n%s", line, code, stderr)
	}
	line, stop = witness(t, "-c", file, "--replace")
	if code, stderr := stop(); line == "" || code != term.ExitOK {
		t.Errorf("replaced: exit code %d\n%s", code, stderr)
	}
}

package clients

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	ServeIfAsked()
	goleak.VerifyTestMain(m)
}

// TestProgramsSayTheSame is the short form of `make prove CASE=clients`.
func TestProgramsSayTheSame(t *testing.T) {
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	dirs := Dirs{Testdata: testdata}
	if dirs.Node, err = InstallNode(t.Context(), testdata); err != nil {
		t.Fatalf("%v\nhint: node and npm must be there, and a registry of npm reachable", err)
	}
	s := start(t, false)
	t.Cleanup(func() { // before the sites end
		if stats, err := s.Gateway.Stats(); err != nil || len(stats.Pins) > 0 {
			t.Errorf("left pinned: %v, %v", stats.Pins, err)
		}
	})
	for _, p := range Short {
		t.Run(p.Name, func(t *testing.T) {
			t.Parallel()
			res, err := s.Run(t.Context(), p, dirs)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("direct %.1fs, through the gateway %.1fs, %v", res.Took[0].Seconds(), res.Took[1].Seconds(), res.Routed)
			if os.Getenv("DURI_SHOW") != "" {
				t.Log(res.Direct)
			}
		})
	}
}

// TestCopyIsBoundedInMemory, and the next one, are short forms as well.
func TestCopyIsBoundedInMemory(t *testing.T) {
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	said, err := Copy(t.Context(), 60, Dirs{Testdata: testdata})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(said)
}

func TestIdleClientsCostLittle(t *testing.T) {
	for name, withTLS := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			said, err := Idle(t.Context(), 600, withTLS)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(said)
		})
	}
}

func TestTwoServers(t *testing.T) {
	said, err := TwoServers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Log(said)
}

func start(t *testing.T, two bool) *Sites {
	t.Helper()
	s, err := Start(t.Context(), two, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

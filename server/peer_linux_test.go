package server

import (
	"os/exec"
	"testing"
	"time"
)

// TestAProcessIsDead: when it has ended, whether or not its parent has asked how.
func TestAProcessIsDead(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
	}()
	m, err := mortalOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if m.dead(time.Millisecond) {
		t.Error("it lives")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if !m.dead(30 * time.Second) {
		t.Error("it is dead")
	}
	_ = cmd.Wait() // it was killed
	if _, err := mortalOf(cmd.Process.Pid); err == nil {
		t.Error("a process that is gone is watched")
	}
}

package main

import (
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

// TestGCFollowsTheHeap: the percentage falls when the live heap is large and rises again when it is not.
func TestGCFollowsTheHeap(t *testing.T) {
	t.Setenv("GOGC", "")
	before := debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetGCPercent(before) })
	tuneGC()
	large := make([]byte, 2*smallHeap)
	awaitPercent(t, largePercent)
	runtime.KeepAlive(large)
	awaitPercent(t, smallPercent)
}

func awaitPercent(t *testing.T, want int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		runtime.GC()
		got := debug.SetGCPercent(smallPercent)
		debug.SetGCPercent(got)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("GOGC is %d, want %d", got, want)
		}
		runtime.Gosched()
	}
}

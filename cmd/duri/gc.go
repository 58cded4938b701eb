package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// A small live heap may grow threefold between collections: what passes through the agent is much more than what it
// keeps, and each collection takes CPU from the PostgreSQL beside it. A large one, while a huge transaction passes, must
// not, because that multiplies the agent's memory.
const (
	smallHeap    = 64 << 20 // live bytes
	smallPercent = 200
	largePercent = 50
)

// gcPercent chooses GOGC for a live heap.
func gcPercent(live uint64) int {
	if live < smallHeap {
		return smallPercent
	}
	return largePercent
}

// tuneGC lets the collector follow the size of the live heap from now on, unless the operator has set GOGC.
func tuneGC() {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(smallPercent)
	afterGC(smallPercent)
}

// afterGC sets the percentage anew when the next collection has ended, and so on: the cleanup of an object that nothing
// holds runs then.
func afterGC(now int) {
	sentinel := new([16]byte)
	runtime.AddCleanup(sentinel, func(was int) {
		live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(live)
		next := gcPercent(live[0].Value.Uint64())
		if next != was { // setting it stops the world
			debug.SetGCPercent(next)
		}
		afterGC(next)
	}, now)
}

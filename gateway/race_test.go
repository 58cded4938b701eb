//go:build race

package gateway

// raceEnabled: with the race detector sync.Pool loses buffers on purpose.
const raceEnabled = true

//go:build !unix

package journal

import "os"

// lockFile does nothing where there is no flock: agents run on Unix, elsewhere journals are only read.
func lockFile(*os.File) error { return nil }

package trial

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// OffsetFile is the file beside a site's configuration that holds by how many microseconds its clock is ahead.
const OffsetFile = "clock-offset"

// clock is one site's, as its clients and its agent have it. Safe for concurrent use.
type clock struct {
	file   string
	offset atomic.Int64 // microseconds
}

// newClock makes a clock that is right.
func newClock(file string) (*clock, error) {
	c := &clock{file: file}
	return c, c.set(0)
}

// set changes the offset. The agent notices when it next asks the server's clock, as it would with a real step.
func (c *clock) set(d time.Duration) error {
	tmp := c.file + ".tmp"
	err := os.WriteFile(tmp, []byte(strconv.FormatInt(d.Microseconds(), 10)), 0o600)
	if err == nil {
		err = os.Rename(tmp, c.file)
	}
	if err != nil {
		return fmt.Errorf("set a site's clock: %w", err)
	}
	c.offset.Store(d.Microseconds())
	return nil
}

func (c *clock) get() time.Duration { return time.Duration(c.offset.Load()) * time.Microsecond }

// readOffset reads what set wrote; a file that cannot be read counts as a clock that is right.
func readOffset(file string) time.Duration {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	us, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0
	}
	return time.Duration(us) * time.Microsecond
}

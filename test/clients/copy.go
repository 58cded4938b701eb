package clients

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// copyMemoryMost is what the gateway's process may grow by while it copies, in bytes, however much that is.
const copyMemoryMost = 16 << 20

// Copy sends so many megabytes by \copy and gets them back, through the gateway, and compares.
func Copy(ctx context.Context, megabytes int, dirs Dirs) (string, error) {
	var said string
	err := with(ctx, false, func(s *Sites) error {
		if err := s.Database(ctx, "copy"); err != nil {
			return err
		}
		gateway := s.ways()[1]
		run := func(command string) (string, error) {
			return s.run(ctx, Program{Name: "copy", Command: command, Within: 15 * time.Minute}, gateway, "copy", dirs)
		}
		if out, err := run("psql -Xqc 'CREATE UNLOGGED TABLE big(n bigint, x text)' -c 'SELECT 1'"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		before, err := s.Gateway.Stats()
		if err != nil {
			return err
		}
		begin := time.Now()
		// 100 bytes a line.
		out, err := run(fmt.Sprintf(`
			lines() { seq -f '%%015.0f	01234567890123456789012345678901234567890123456789012345678901234567890123456789012' 1 %d; }
			lines | sha256sum
			lines | wc -c
			lines | psql -Xqc '\copy big FROM STDIN'
			psql -Xqc '\copy (SELECT lpad(n::text, 15, $$0$$), x FROM big ORDER BY n) TO STDOUT' | sha256sum`, megabytes*10_000))
		if err != nil {
			return fmt.Errorf("%w: %s", err, tail(out))
		}
		took := time.Since(begin)
		after, err := s.Gateway.Stats()
		if err != nil {
			return err
		}
		lines := strings.Fields(out)
		if len(lines) != 5 || lines[0] != lines[3] || lines[2] != fmt.Sprint(megabytes*1_000_000) {
			return fmt.Errorf("what came back is not what was sent: %s", out)
		}
		grown := after.Peak - before.RSS
		said = fmt.Sprintf("%d MB each way in %.0f s with equal checksums; the gateway's memory grew by %.1f MB at most", megabytes, took.Seconds(), float64(grown)/(1<<20))
		if grown > copyMemoryMost {
			return fmt.Errorf("%s, where %d are allowed", said, copyMemoryMost>>20)
		}
		return nil
	})
	return said, err
}

package clients

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
)

// Monitor runs what check_postgres (Nagios and its kin) asks of PgBouncer's console against the gateway's, and checks that it finds all well
// and tells of the pool that is there.
func Monitor(ctx context.Context) (said string, err error) {
	const program = "check_postgres"
	if _, err := exec.LookPath(program); err != nil {
		return "", fmt.Errorf("%s is not installed (apt-get install check-postgres)", program)
	}
	err = with(ctx, false, func(s *Sites) error {
		if err := s.Database(ctx, "peer"); err != nil {
			return err
		}
		host, port, err := net.SplitHostPort(s.Gateway.Address)
		if err != nil {
			return err
		}
		run := func(name string, args ...string) (string, error) {
			cmd := exec.CommandContext(ctx, name, args...)
			cmd.Env = append(os.Environ(), "PGPASSWORD="+password, "PGSSLMODE=disable")
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
			}
			return string(out), err
		}
		if _, err := run("psql", "-XAtqc", "SELECT 1", fmt.Sprintf("host=%s port=%s dbname=peer user=%s", host, port, appRole)); err != nil {
			return err
		}
		var lines []string
		for _, action := range []string{
			"pgb_pool_cl_active", "pgb_pool_cl_waiting", "pgb_pool_sv_active", "pgb_pool_sv_idle", "pgb_pool_sv_login", "pgb_pool_sv_tested",
			"pgb_pool_sv_used", "pgb_pool_maxwait", "pgbouncer_backends",
		} {
			limits := []string{"--warning=5", "--critical=9"}
			if action == "pgbouncer_backends" {
				limits = []string{"--warning=50%", "--critical=90%"}
			}
			out, err := run(program, append([]string{"--action=" + action, "--host=" + host, "--port=" + port, "--dbuser=" + bossRole, "--dbname=pgbouncer"}, limits...)...)
			if err != nil {
				return err
			}
			if !strings.Contains(out, " OK: ") || strings.HasPrefix(action, "pgb_pool") && !strings.Contains(out, "peer=") {
				return fmt.Errorf("%s tells nothing of the pool: %s", action, out)
			}
			lines = append(lines, strings.TrimSpace(out))
		}
		said = strings.Join(lines, "\n")
		return nil
	})
	return said, err
}

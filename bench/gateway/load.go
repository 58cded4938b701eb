package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/duri-io/duri/internal/pair"
)

// sample is what one load showed: transactions per second, latencies and the processor time of the process in between, in us; agent
// is that of the agent of the server's site, which decodes what is written, whichever way it came.
type sample struct{ tps, p50, p99, cpu, agent float64 }

// load runs pgbench through a system.
func (b *bench) load(ctx context.Context, s *system, sh shape) (sample, error) {
	host, port, err := net.SplitHostPort(s.address)
	if err != nil {
		return sample{}, err
	}
	seconds := int(b.time.Round(time.Second).Seconds())
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds)*time.Second+30*time.Second)
	defer cancel()
	prefix := filepath.Join(b.dir, "log")
	args := []string{
		"-n", "-h", host, "-p", port, "-U", user, "-M", sh.protocol, "-f", b.script(sh), "-c", strconv.Itoa(sh.clients),
		"-T", strconv.Itoa(seconds), "-l", "--log-prefix=" + prefix,
	}
	if sh.reconnect {
		args = append(args, "-C")
	}
	before, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	agentBefore, err := cpuTime(b.agent())
	if err != nil {
		return sample{}, err
	}
	cmd := exec.CommandContext(ctx, b.pgbench, append(args, database)...)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+password, "PGSSLMODE="+b.sslmode())
	out, err := cmd.CombinedOutput()
	if err != nil {
		return sample{}, fmt.Errorf("pgbench: %w: %s", err, out)
	}
	after, err := s.cpu()
	if err != nil {
		return sample{}, err
	}
	agentAfter, err := cpuTime(b.agent())
	if err != nil {
		return sample{}, err
	}
	log, err := pair.TakePgbenchLog(prefix)
	if err != nil {
		return sample{}, err
	}
	if len(log) == 0 {
		return sample{}, errors.New("pgbench logged no transaction")
	}
	us := make([]float64, len(log))
	for i, l := range log {
		us[i] = float64(l.Latency.Microseconds())
	}
	slices.Sort(us)
	return sample{
		tps: float64(len(us)) / float64(seconds), p50: us[len(us)/2], p99: us[len(us)*99/100],
		cpu:   float64((after - before).Microseconds()) / float64(len(us)),
		agent: float64((agentAfter - agentBefore).Microseconds()) / float64(len(us)),
	}, nil
}

// cpu is the processor time so far of the process in between.
func (s *system) cpu() (time.Duration, error) {
	if s.pid == nil {
		return 0, nil
	}
	return cpuTime(s.pid())
}

// splitStat gives the fields behind the name.
func splitStat(stat string) []string {
	return strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
}

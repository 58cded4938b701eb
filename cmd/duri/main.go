// Command duri makes PostgreSQL sites active-active: it runs a site's agent, and is the tool with which people set up,
// look at and steer a cluster. Each file holds one noun of the command line; what a command does is in the packages.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

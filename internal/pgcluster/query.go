package pgcluster

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// NullText is how QueryText shows SQL NULL, as COPY does, so that it differs from the empty text.
const NullText = `\N`

// Exec runs one or more statements in a database as the superuser, in a new connection over the Unix-domain socket.
// Several statements are one transaction unless they say otherwise; so VACUUM, CREATE DATABASE and ALTER SYSTEM must
// stand alone.
func (c *Cluster) Exec(ctx context.Context, db, sql string) error {
	_, err := c.query(ctx, db, sql)
	return err
}

// QueryText runs one or more statements as Exec does and gives the rows of the last one as text; NULL is NullText.
func (c *Cluster) QueryText(ctx context.Context, db, sql string) ([][]string, error) {
	results, err := c.query(ctx, db, sql)
	if err != nil || len(results) == 0 {
		return nil, err
	}
	var rows [][]string
	for _, values := range results[len(results)-1].Rows {
		row := make([]string, len(values))
		for i, v := range values {
			if row[i] = string(v); v == nil {
				row[i] = NullText
			}
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func (c *Cluster) query(ctx context.Context, db, sql string) ([]*pgconn.Result, error) {
	config, err := pgconn.ParseConfig(fmt.Sprintf("host=%s port=%d dbname=%s user=%s sslmode=disable",
		dsnQuote(c.SocketDir()), c.port, dsnQuote(db), dsnQuote(c.opts.Superuser)))
	if err != nil {
		return nil, fmt.Errorf("query PostgreSQL: %w", err)
	}
	conn, err := pgconn.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("query PostgreSQL: %w", err)
	}
	// After ctx has ended as well; the statement's own error tells all there is to know.
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("query PostgreSQL: %w: %s", err, firstLine(sql))
	}
	return results, nil
}

// firstLine shortens a statement for an error message.
func firstLine(sql string) string {
	const most = 120
	line, _, more := strings.Cut(strings.TrimSpace(sql), "\n")
	if len(line) > most {
		line, more = line[:most], true
	}
	if more {
		line += " ..."
	}
	return line
}

// Psql runs a script by the psql of the cluster's programs as the superuser and gives what it prints: unaligned,
// tuples only, ended at the first error. It is for scripts that need psql's own commands; Exec needs no psql.
func (c *Cluster) Psql(ctx context.Context, db, sql string) (string, error) {
	psql := filepath.Join(c.opts.BinDir, "psql")
	if _, err := exec.LookPath(psql); err != nil {
		if psql, err = exec.LookPath("psql"); err != nil {
			return "", &Error{"run psql", err, "install it: apt-get install postgresql-client."}
		}
	}
	cmd := exec.CommandContext(ctx, psql, "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1",
		"-h", c.SocketDir(), "-p", fmt.Sprint(c.port), "-U", c.opts.Superuser, "-d", db, "-f", "-")
	cmd.Env = environment()
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(sql), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("run psql: %w\n%s", err, tail(stderr.String(), 10))
	}
	return stdout.String(), nil
}

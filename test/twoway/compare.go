package twoway

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/duri-io/duri/internal/pg"
)

// examplesMax bounds Result.Examples.
const examplesMax = 5

// compare counts what differs between the dumps of both sites.
func (r *run) compare(ctx context.Context) error {
	r.res.Differing = map[string]int{}
	for _, t := range r.load.tables() {
		var dumps [2][]string
		for i, s := range r.system.Sites() {
			var err error
			if dumps[i], err = dump(ctx, s, t.name); err != nil {
				return fmt.Errorf("dump %s at site %s: %w", t.name, s.Name, err)
			}
		}
		keys, examples := different(dumps[0], dumps[1], t.keyed)
		if r.res.Differing[t.name] = len(keys); len(keys) > 0 {
			r.res.Examples = append(r.res.Examples, examples...)
		}
	}
	return nil
}

// dump gives the rows of a table as pg_dump writes them, sorted. Where the server's programs have no pg_dump, and an
// older one would refuse, COPY itself gives the same text.
func dump(ctx context.Context, s Site, table string) ([]string, error) {
	program := filepath.Join(s.Cluster.BinDir(), "pg_dump")
	if _, err := os.Stat(program); err != nil {
		return copyOut(ctx, s, table)
	}
	cmd := exec.CommandContext(ctx, program, "-h", "127.0.0.1", "-p", strconv.Itoa(s.Cluster.Port()), "-U", s.Cluster.Superuser(),
		"--data-only", "--table=public."+table, s.Database)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("pg_dump: %w: %s", err, stderr.Bytes())
	}
	_, rows, ok := strings.Cut(string(out), " FROM stdin;\n")
	rows, _, ended := strings.Cut(rows, `\.`+"\n")
	if !ok || !ended {
		return nil, fmt.Errorf("pg_dump wrote no rows: %.200s", out)
	}
	return sorted(rows), nil
}

func copyOut(ctx context.Context, s Site, table string) ([]string, error) {
	conn, err := pg.Connect(ctx, s.Cluster.DSN(s.Database, ""), "", nil)
	if err != nil {
		return nil, err
	}
	defer pg.Close(conn)
	var b bytes.Buffer
	if _, err := conn.CopyTo(ctx, &b, "COPY public."+pg.QuoteIdent(table)+" TO STDOUT"); err != nil {
		return nil, err
	}
	return sorted(b.String()), nil
}

// sorted splits a text into lines in the order of their bytes.
func sorted(text string) []string {
	lines := strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
	slices.Sort(lines)
	return lines
}

// different compares two dumps and gives the keys whose rows are not the same at both sites, and some of those rows. The
// key is the text before the first tab, or the whole row.
func different(a, b []string, keyed bool) (keys, examples []string) {
	at := map[string]*[2][]string{}
	for i, lines := range [2][]string{a, b} {
		for _, line := range lines {
			key := line
			if keyed {
				key, _, _ = strings.Cut(line, "\t")
			}
			if at[key] == nil {
				at[key] = &[2][]string{}
			}
			at[key][i] = append(at[key][i], line)
		}
	}
	for key, rows := range at {
		if !slices.Equal(rows[0], rows[1]) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys[:min(len(keys), examplesMax)] {
		examples = append(examples, fmt.Sprintf("%s: %q and %q", key, at[key][0], at[key][1]))
	}
	return keys, examples
}

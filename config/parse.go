package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/duri-io/duri/policy"
)

// maxFileBytes bounds what is read: a duri.yaml has a few hundred lines.
const maxFileBytes = 1 << 20

// Parse reads the text of a duri.yaml. name is the file's name: problems cite it and relative paths are relative to
// its folder. The environment is not consulted. The error is an *Error with all problems.
func Parse(name string, b []byte) (*Config, error) {
	return parse(name, filepath.Dir(name), b, func(string) (string, bool) { return "", false })
}

// Load reads a configuration file and applies the DURI_... overrides of the environment. The error is an *Error when
// the content is at fault.
func Load(path string) (*Config, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	// Absolute, so that paths stay right whatever becomes of the working directory.
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parse(path, filepath.Dir(abs), b, os.LookupEnv)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		hint := ""
		if errors.Is(err, fs.ErrNotExist) {
			hint = "name the file with --config, or make a cluster with: duri init"
		}
		return nil, &Problem{Msg: fmt.Sprintf("cannot read configuration: %v", err), Hint: hint, cause: err}
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return b, nil
}

func parse(name, folder string, b []byte, env func(string) (string, bool)) (*Config, error) {
	d := &decoder{file: name, origins: map[string]Origin{}, bad: map[string]bool{}}
	root, problem := parseTree(name, b)
	if problem != nil {
		return nil, &Error{Problems: []*Problem{problem}}
	}
	c := defaults()
	c.path, c.origins = name, d.origins
	if root != nil {
		d.value(root, reflect.ValueOf(c).Elem(), "")
	}
	d.environment(c, env)
	c.complete(folder)
	d.validate(c)
	if len(d.problems) > 0 {
		slices.SortStableFunc(d.problems, func(a, b *Problem) int { return a.At.Line - b.At.Line })
		return nil, &Error{Problems: d.problems}
	}
	return c, nil
}

// parseTree gives the one document of the text, nil for an empty one.
func parseTree(name string, b []byte) (*yaml.Node, *Problem) {
	at := Origin{Kind: FromFile, File: name}
	if len(b) > maxFileBytes {
		return nil, &Problem{At: at, Msg: fmt.Sprintf("the file is greater than %s", Size(maxFileBytes)), Hint: "is this a duri.yaml?"}
	}
	dec := yaml.NewDecoder(bytes.NewReader(b))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, syntaxProblem(at, err)
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		at.Line = second.Line
		return nil, &Problem{At: at, Msg: "a second document begins here", Hint: `remove the line "---": the file holds one document`}
	case !errors.Is(err, io.EOF):
		return nil, syntaxProblem(at, err)
	}
	if len(doc.Content) != 1 {
		return nil, nil
	}
	return doc.Content[0], nil
}

var yamlLine = regexp.MustCompile(`^line (\d+): `)

// syntaxProblem turns "yaml: line 3: ..." into a problem with a line.
func syntaxProblem(at Origin, err error) *Problem {
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	if m := yamlLine.FindStringSubmatch(msg); m != nil {
		at.Line, _ = strconv.Atoi(m[1])
		msg = strings.TrimPrefix(msg, m[0])
	}
	return &Problem{At: at, Msg: "not valid YAML: " + msg, Hint: "indent with spaces, equally within a group, and put text with special characters in quotes"}
}

// complete derives the values that depend on others and resolves paths against the file's folder. Values of maps are
// made anew, as they cannot be set in place.
func (c *Config) complete(folder string) {
	if c.Listen == "" {
		c.Listen = defaultListen(c.Self().Address)
	}
	if c.Alone() && c.Origin("gateway.mode").Kind == FromDefault {
		c.Gateway.Mode = GatewayTransaction
	}
	for _, db := range c.Databases {
		for name, t := range db.Tables {
			t.Mode = cmp.Or(t.Mode, policy.ModeRow)
			db.Tables[name] = t
		}
	}
	for _, p := range []*string{
		&c.DataDir, &c.Postgres.BinDir, &c.TLS.CA, &c.TLS.Cert, &c.TLS.Key, &c.Quorum.TLS.CA, &c.Quorum.TLS.Cert, &c.Quorum.TLS.Key, &c.Gateway.Cert, &c.Gateway.Key,
		&c.Gateway.ClientCA, &c.Gateway.LoginCA.Cert, &c.Gateway.LoginCA.Key,
	} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(folder, *p)
		}
	}
}

// Find gives the configuration file to use (style.md section 6): the one named (--config), the one in DURI_CONFIG,
// ./duri.yaml, $XDG_CONFIG_HOME/duri/duri.yaml, /etc/duri/duri.yaml. A file that was named is given back whether it
// exists or not; without any it is an error that lists where it was looked for.
func Find(explicit string) (string, error) {
	if explicit != "" {
		return explicit, nil
	}
	if env := os.Getenv("DURI_CONFIG"); env != "" {
		return env, nil
	}
	places := searchPlaces()
	for _, p := range places {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", &Problem{
		Msg:  "no configuration found (looked for " + strings.Join(places, ", ") + ")",
		Hint: "name the file with --config or DURI_CONFIG, or make a cluster with: duri init",
	}
}

func searchPlaces() []string {
	places := []string{FileName}
	// UserConfigDir knows XDG_CONFIG_HOME and the home directory; it fails when there is neither.
	if dir, err := os.UserConfigDir(); err == nil {
		places = append(places, filepath.Join(dir, "duri", FileName))
	}
	return append(places, filepath.Join("/etc/duri", FileName))
}

package e2e

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/duri-io/duri/catalog"
	"github.com/duri-io/duri/config"
	"github.com/duri-io/duri/fkey"
	"github.com/duri-io/duri/server"
	"github.com/duri-io/duri/verify"
)

// fields lists the JSON names of a type and of what it holds.
func fields(t reflect.Type, into map[string]bool) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		if t != reflect.TypeFor[json.RawMessage]() {
			fields(t.Elem(), into)
		}
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return
		}
		for field := range t.Fields() {
			name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			if name != "" && name != "-" {
				into[name] = true
				fields(field.Type, into)
			}
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/reference/" + file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEveryFieldIsDocumented keeps docs/reference/json.md complete.
func TestEveryFieldIsDocumented(t *testing.T) {
	names := map[string]bool{}
	for _, typ := range []reflect.Type{
		reflect.TypeFor[server.ClusterStatus](), reflect.TypeFor[verify.Report](), reflect.TypeFor[catalog.Conflict](),
		reflect.TypeFor[server.RepairReport](), reflect.TypeFor[server.ConflictDetail](), reflect.TypeFor[catalog.ConflictStats](),
		reflect.TypeFor[catalog.Restoration](), reflect.TypeFor[catalog.Table](), reflect.TypeFor[fkey.Status](), reflect.TypeFor[server.ParkedTable](),
		reflect.TypeFor[config.Problem](), reflect.TypeFor[config.Value](),
	} {
		fields(typ, names)
	}
	for _, args := range [][]string{
		{"version"}, {"grants"}, {"init", "--dry-run", "--site", "a=h:1", "--site", "b=h:2", "--database", "x", "--out", t.TempDir() + "/x"},
	} {
		for name := range document[map[string]any](t, 0, args...) {
			names[name] = true
		}
	}
	if len(names) < 80 {
		t.Errorf("only %d fields were found", len(names))
	}
	page := read(t, "json.md")
	for name := range names {
		if !strings.Contains(page, "`"+name+"`") && !strings.Contains(page, "."+name+"`") && !strings.Contains(page, "`"+name+"[]`") && !strings.Contains(page, "."+name+"[]`") {
			t.Errorf("docs/reference/json.md does not tell of field %q", name)
		}
	}
	file := example(t)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	full := strings.NewReplacer("mode: door ", "mode: transaction ", "routes: [] ", "routes: [{database: app, role: app, application_name: web, site: seoul}] ").Replace(string(text))
	if err := os.WriteFile(file, []byte(full), 0o600); err != nil {
		t.Fatal(err)
	}
	show := duri(t, "config", "show", "-o", "json", "-c", file)
	keys := map[string]bool{}
	fields(reflect.TypeFor[config.Config](), keys)
	for key := range keys {
		if !strings.Contains(show.stdout, `"`+key+`"`) {
			t.Errorf("config show has no %q: exit code %d\n%s%s", key, show.code, show.stdout, show.stderr)
		}
	}
}

// example writes the configuration that duri config example prints.
func example(t *testing.T) string {
	t.Helper()
	file := t.TempDir() + "/duri.yaml"
	if err := os.WriteFile(file, []byte(duri(t, "config", "example").stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

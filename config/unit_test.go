package config

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"pgregory.net/rapid"
)

func TestDurationText(t *testing.T) {
	for text, want := range map[string]string{
		"200ms": "200ms", "1h": "1h", "720h": "720h", "30d": "720h", "90m": "1h30m", "1h30m5s": "1h30m5s", "1m": "1m",
		"0s": "0s", "1.5s": "1.5s", "10m0s": "10m", "20s": "20s",
	} {
		d, err := ParseDuration(text)
		if err != nil || d.String() != want {
			t.Errorf("%q reads as %v, %v; want %s", text, d, err, want)
		}
	}
	for _, text := range []string{"", "1", "0", "d", "-1d", "1.5d", "99999d", "soon", "1 h"} {
		if d, err := ParseDuration(text); err == nil {
			t.Errorf("%q reads as %v, want an error", text, d)
		}
	}
}

func TestSizeText(t *testing.T) {
	for text, want := range map[string]string{
		"64MiB": "64MiB", "64MB": "64MiB", "8 GiB": "8GiB", "1000": "1000B", "1024B": "1KiB", "16kB": "16KiB", "0": "0B", "2TB": "2TiB",
	} {
		s, err := ParseSize(text)
		if err != nil || s.String() != want {
			t.Errorf("%q reads as %v, %v; want %s", text, s, err, want)
		}
	}
	for _, text := range []string{"", "B", "-1", "1.5GiB", "9999999TiB", "9223372036854775808", "1kb", "1 2MiB", "0x10"} {
		if s, err := ParseSize(text); err == nil {
			t.Errorf("%q reads as %v, want an error", text, s)
		}
	}
}

func TestUnitsReadBackWhatTheyPrint(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := Duration(rapid.Int64Range(0, int64(100000*time.Hour)).Draw(t, "duration"))
		if got, err := ParseDuration(d.String()); err != nil || got != d {
			t.Fatalf("%s reads back as %v, %v", d, got, err)
		}
		in := Journal{Keep: d, Budget: Size(rapid.Int64Range(0, 1<<62).Draw(t, "size"))}
		b, err := json.Marshal(in)
		if err != nil {
			t.Fatal(err)
		}
		var out Journal
		if err := json.Unmarshal(b, &out); err != nil || out != in {
			t.Fatalf("%s reads back as %+v, %v", b, out, err)
		}
	})
}

func TestRedactHidesPasswordsOnly(t *testing.T) {
	for dsn, want := range map[string]string{
		"": "", "host=x user=duri": "host=x user=duri",
		"host=x password=s3cret port=1":           "host=x password=*** port=1",
		`password = 'a\' b' host=x`:               `password = *** host=x`,
		"password=s3cret password=again":          "password=*** password=***",
		"sslpassword=s3cret":                      "sslpassword=***",
		"passfile=/home/x/.pgpass":                "passfile=/home/x/.pgpass",
		"postgres://duri:s3cret@h:1/?sslmode=off": "postgres://duri:***@h:1/?sslmode=off",
		"postgresql://duri@h":                     "postgresql://duri@h",
		"postgresql://h?password=s3cret&user=x":   "postgresql://h?password=***&user=x",
		"postgresql://h?pass%77ord=s3cret":        "postgresql://h?pass%77ord=***",
		"postgresql://u:s3cret@h:no-port":         "***",
		"host=x password='s3cret":                 "***",
		"s3cret":                                  "***",
	} {
		if got := Redact(dsn); got != want {
			t.Errorf("Redact(%q) = %q, want %q", dsn, got, want)
		}
	}
}

func TestNoPasswordSurvivesRedactionWhateverIsAroundIt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const secret = "s3cr3t"
		word := rapid.StringMatching(`[a-z '\\=]{0,8}`)
		value := quoteValue(word.Draw(t, "before") + secret + word.Draw(t, "after"))
		dsn := "host=" + quoteValue(word.Draw(t, "host")) + " password=" + value + " user=duri"
		got := Redact(dsn)
		if strings.Contains(got, secret) {
			t.Fatalf("Redact(%q) = %q", dsn, got)
		}
		before, err := DSNKeys(dsn)
		if err != nil {
			t.Fatal(err)
		}
		after, err := DSNKeys(got)
		if err != nil || after["host"] != before["host"] || after["user"] != "duri" || after["password"] != redacted {
			t.Fatalf("%q became %q (%v)", dsn, got, err)
		}
	})
}

// TestConnectionStringsReadAsPgxReadsThem: pgx is what connects, so its reading is the right one.
func TestConnectionStringsReadAsPgxReadsThem(t *testing.T) {
	for _, dsn := range []string{
		"host=h port=5433 user=duri password=x",
		`host = h  port=5433 user='duri' password='a\'b\\ c'`,
		"postgres://duri:p%20w@h:5433",
		"postgresql://duri@h:5433/?password=x",
	} {
		for _, db := range []string{"app", "한글", `we"ird's \name`, "a/b?c"} {
			full, err := WithDatabase(dsn, db)
			if err != nil {
				t.Fatal(err)
			}
			want, err := pgconn.ParseConfig(full)
			if err != nil {
				t.Fatalf("pgx cannot read %q: %v", full, err)
			}
			keys, err := DSNKeys(full)
			if err != nil {
				t.Fatal(err)
			}
			if want.Database != db || keys["dbname"] != db {
				t.Errorf("%q: database %q for pgx, %q for us, want %q", full, want.Database, keys["dbname"], db)
			}
			if keys["host"] != want.Host || keys["user"] != want.User || keys["password"] != want.Password || keys["port"] != "5433" {
				t.Errorf("%q: %v differs from pgx", full, keys)
			}
		}
	}
}

func TestDSNForAddsTheDatabase(t *testing.T) {
	p := Postgres{DSN: "host=h"}
	if got, err := p.DSNFor("app"); err != nil || got != "host=h dbname='app'" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := (Postgres{}).DSNFor("app"); err != nil || got != "dbname='app'" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := p.SetupDSNFor("app"); err != nil || got != "" {
		t.Errorf("got %q, %v for no setup_dsn", got, err)
	}
}

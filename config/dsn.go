package config

import (
	"errors"
	"net/url"
	"slices"
	"strings"
)

// redacted stands where a password was.
const redacted = "***"

// A connection string is libpq's: "host=... user=..." or "postgresql://user@host:port?...". This file reads only as
// much of it as duri has to: pgx does the rest, with environment, service file and pgpass. Its errors never quote the
// string, which may hold a password.

// errDSN is the one thing to say about a connection string that cannot be read.
var errDSN = errors.New(`connection string cannot be read (want "host=... port=... user=..." or "postgresql://user@host:port")`)

// isURL tells the two forms apart as libpq does.
func isURL(dsn string) bool {
	return strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")
}

// pair is one keyword of a connection string; start and end are the position of its value, quotes included.
type pair struct {
	key, value string
	start, end int
}

// parseKeywords splits the keyword form. An empty string is valid: everything then comes from the environment.
func parseKeywords(dsn string) ([]pair, error) {
	const space = " \t\n\r\f\v"
	var pairs []pair
	i := 0
	skip := func() {
		for i < len(dsn) && strings.IndexByte(space, dsn[i]) >= 0 {
			i++
		}
	}
	for skip(); i < len(dsn); skip() {
		eq := strings.IndexByte(dsn[i:], '=')
		if eq < 0 {
			return nil, errDSN
		}
		key := strings.TrimRight(dsn[i:i+eq], space)
		if key == "" || strings.ContainsAny(key, space+"'\\") {
			return nil, errDSN
		}
		i += eq + 1
		skip()
		start := i
		value, n, err := scanValue(dsn[i:])
		if err != nil {
			return nil, err
		}
		i += n
		pairs = append(pairs, pair{key, value, start, i})
	}
	return pairs, nil
}

// scanValue reads a value, quoted or not, and gives the number of bytes it took.
func scanValue(s string) (value string, n int, err error) {
	var b strings.Builder
	quoted := strings.HasPrefix(s, "'")
	if quoted {
		n = 1
	}
	for ; n < len(s); n++ {
		switch c := s[n]; {
		case c == '\\':
			if n++; n == len(s) {
				return "", 0, errDSN
			}
			b.WriteByte(s[n])
		case quoted && c == '\'':
			return b.String(), n + 1, nil
		case !quoted && strings.IndexByte(" \t\n\r\f\v", c) >= 0:
			return b.String(), n, nil
		default:
			b.WriteByte(c)
		}
	}
	if quoted {
		return "", 0, errDSN
	}
	return b.String(), n, nil
}

// quoteValue writes a value so that parseKeywords, libpq and pgx read it back.
func quoteValue(v string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(v) + "'"
}

// parseURL is url.Parse with an error that does not quote the URL.
func parseURL(dsn string) (*url.URL, error) {
	u, err := url.Parse(dsn)
	if err != nil {
		return nil, errDSN
	}
	return u, nil
}

// DSNKeys gives the settings that a connection string holds itself, by libpq's keywords (host, port, user, password,
// dbname, ...). What comes from environment, service file or pgpass is not in it.
func DSNKeys(dsn string) (map[string]string, error) {
	keys := map[string]string{}
	if !isURL(dsn) {
		pairs, err := parseKeywords(dsn)
		for _, p := range pairs {
			keys[p.key] = p.value
		}
		return keys, err
	}
	u, err := parseURL(dsn)
	if err != nil {
		return nil, err
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errDSN
	}
	password, _ := u.User.Password()
	parts := map[string]string{
		"host": u.Hostname(), "port": u.Port(), "user": u.User.Username(),
		"password": password, "dbname": strings.TrimPrefix(u.Path, "/"),
	}
	for k, v := range parts {
		if v != "" {
			keys[k] = v
		}
	}
	for k, v := range query {
		keys[k] = v[len(v)-1]
	}
	return keys, nil
}

// WithDatabase gives the connection string with the database set.
func WithDatabase(dsn, database string) (string, error) {
	if !isURL(dsn) {
		if _, err := parseKeywords(dsn); err != nil {
			return "", err
		}
		// The last of two equal keywords counts.
		return strings.TrimLeft(dsn+" dbname="+quoteValue(database), " "), nil
	}
	u, err := parseURL(dsn)
	if err != nil {
		return "", err
	}
	u.Path, u.RawPath = "/"+database, "/"+url.PathEscape(database)
	return u.String(), nil
}

// secretKeys are the keywords whose values are never shown.
func isSecret(key string) bool {
	return key == "password" || key == "sslpassword" || key == "scram_client_key"
}

// Redact gives the connection string for showing: passwords are replaced by ***. A string that cannot be read is
// hidden as a whole.
func Redact(dsn string) string {
	if isURL(dsn) {
		return redactURL(dsn)
	}
	pairs, err := parseKeywords(dsn)
	if err != nil {
		return redacted
	}
	for _, pair := range slices.Backward(pairs) {
		if p := pair; isSecret(p.key) {
			dsn = dsn[:p.start] + redacted + dsn[p.end:]
		}
	}
	return dsn
}

func redactURL(dsn string) string {
	u, err := parseURL(dsn)
	if err != nil {
		return redacted
	}
	if _, has := u.User.Password(); has {
		u.User = url.UserPassword(u.User.Username(), redacted)
	}
	params := strings.Split(u.RawQuery, "&")
	for i, p := range params {
		key, _, _ := strings.Cut(p, "=")
		if k, err := url.QueryUnescape(key); err != nil || isSecret(k) {
			params[i] = key + "=" + redacted
		}
	}
	u.RawQuery = strings.Join(params, "&")
	// url.String escapes the stars of the user part; people should see stars.
	return strings.Replace(u.String(), ":%2A%2A%2A@", ":"+redacted+"@", 1)
}

package pgcluster

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// defaults are what duri needs of a server, and what keeps a private one simple. Options.Settings overrides them.
var defaults = map[string]string{
	"wal_level":              "logical",
	"track_commit_timestamp": "on", // Row versions are commit timestamps (architecture.md decision 2).
	"max_wal_senders":        "20",
	"max_replication_slots":  "20",
	"listen_addresses":       "127.0.0.1",
	"fsync":                  "on",
	"log_destination":        "stderr",
	"logging_collector":      "off", // Our log file is the server's stderr, so even the words of a dying server reach it.
	"log_line_prefix":        "%m [%p] %q%u@%d %a ",
}

// reserved are settings that follow from Options and would break the Cluster's own idea of them.
var reserved = map[string]string{
	"port":                    "Options.Port",
	"unix_socket_directories": "Options.Dir",
	"data_directory":          "Options.Dir",
	"hba_file":                "Options.Password",
}

var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)

// renderConf is the text of duri.conf: the defaults, overridden by the caller's settings, then port and socket.
func renderConf(settings map[string]string, port int, socketDir string) (string, error) {
	all := maps.Clone(defaults)
	for name, value := range settings {
		key := strings.ToLower(name)
		if !settingName.MatchString(name) {
			return "", fmt.Errorf("setting %q is not a PostgreSQL parameter name", name)
		}
		if instead, no := reserved[key]; no {
			return "", fmt.Errorf("setting %s is not taken here; use %s", key, instead)
		}
		if strings.ContainsAny(value, "\n\r\x00") {
			return "", fmt.Errorf("setting %s has a line break or a zero byte in its value", key)
		}
		all[key] = value
	}
	all["port"] = strconv.Itoa(port)
	all["unix_socket_directories"] = socketDir
	var b strings.Builder
	b.WriteString("# Written by duri at the creation of the cluster; ALTER SYSTEM overrides it.\n")
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, confQuoter.Replace(all[name]))
	}
	return b.String(), nil
}

// confQuoter escapes a value inside single quotes in postgresql.conf, where a backslash is an escape as well.
var confQuoter = strings.NewReplacer(`\`, `\\`, `'`, `''`)

// renderHBA is the text of pg_hba.conf. Over the Unix-domain socket everybody is trusted: only the user that runs the
// server, and root, can reach the socket in its directory of mode 0700.
func renderHBA(password bool) string {
	tcp := "trust"
	if password {
		tcp = "scram-sha-256"
	}
	return "# Written by duri at the creation of the cluster.\n" +
		"local all         all              trust\n" +
		"local replication all              trust\n" +
		"host  all         all 127.0.0.1/32 " + tcp + "\n" +
		"host  replication all 127.0.0.1/32 " + tcp + "\n"
}

// dsnQuote quotes a value for a keyword/value connection string.
func dsnQuote(s string) string {
	if s != "" && !strings.ContainsAny(s, " '\\\t\n\r\v\f=") {
		return s
	}
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// tail gives the last n lines of a log, without empty ones.
func tail(log string, n int) string {
	lines := slices.DeleteFunc(strings.Split(log, "\n"), func(s string) bool { return strings.TrimSpace(s) == "" })
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}

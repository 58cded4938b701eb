package apply

import (
	"strconv"
	"strings"
)

// Replication origins belong to the whole server and admit one session each, so their names carry the database.

// OriginName is the replication origin under which a site's transactions in a database are applied.
func OriginName(database, site string) string { return "duri_" + database + "_" + site }

// RepairOriginName is the replication origin of rows that are written here by other means than applying a transaction,
// with the version that they have at a site: by `duri repair`, and when a parked row reappears. It says nothing of
// progress.
func RepairOriginName(database, site string) string { return OriginName(database, site) + ":repair" }

// ClockOriginName is the replication origin of a test's client session n: its transactions count as this site's own, at
// the commit time that the session sets by pg_replication_origin_xact_setup. It is the hook by which tests set clocks;
// an agent heeds it only when it is told to (server.Hooks).
func ClockOriginName(database string, n int) string { return clockPrefix(database) + strconv.Itoa(n) }

func clockPrefix(database string) string { return "duri_" + database + ":clock" }

// IsClockOrigin reports whether an origin is one of ClockOriginName.
func IsClockOrigin(database, origin string) bool {
	return strings.HasPrefix(origin, clockPrefix(database))
}

package apply

import (
	"bytes"
	"encoding/binary"
	"strconv"
	"strings"

	"github.com/duri-io/duri/wal"
)

// norm says how a key column's text is brought into one form per value. Two texts that PostgreSQL's equality treats
// as one value must give one form, or a tombstone or an earlier change of the same row would be missed.
type norm byte

const (
	normExact       norm = iota // text output is unique per value
	normNumeric                 // 1.0 = 1.00
	normFloat                   // -0 = 0
	normInterval                // 1 day = 24 hours
	normPadded                  // character(n): trailing blanks do not count
	normUnsupported             // equality cannot be told from text; enrolment refuses such a key
)

// OIDs of built-in types whose text is not unique per value, and of those that are known to be.
const (
	oidBpchar, oidNumeric, oidFloat4, oidFloat8, oidInterval = 1042, 1700, 700, 701, 1186
)

// exactTypes are the built-in base types with one text per value under the wire settings.
var exactTypes = map[uint32]bool{
	16: true, 17: true, 18: true, 19: true, 20: true, 21: true, 23: true, 24: true, 25: true, 26: true, 27: true,
	28: true, 29: true, 650: true, 774: true, 790: true, 829: true, 869: true, 1043: true, 1082: true, 1083: true,
	1114: true, 1184: true, 1266: true, 1560: true, 1562: true, 2202: true, 2205: true, 2206: true, 2950: true,
	3220: true, 3904: true, 3926: true, 3908: true, 3910: true, 3912: true, 4096: true, 4089: true, 5069: true,
}

// normOf chooses the norm for a base type (domains resolved). typtype is pg_type's: 'e' marks an enum.
func normOf(base uint32, typtype string, deterministic bool) norm {
	switch base {
	case oidNumeric:
		return normNumeric
	case oidFloat4, oidFloat8:
		return normFloat
	case oidInterval:
		return normInterval
	case oidBpchar:
		if deterministic {
			return normPadded
		}
	}
	if deterministic && (exactTypes[base] || typtype == "e") {
		return normExact
	}
	return normUnsupported
}

// appendKey appends the normal form of one key value to b, self-delimiting.
func appendKey(b []byte, n norm, v []byte) []byte {
	switch n {
	case normNumeric:
		v = normalNumeric(v)
	case normFloat:
		if string(v) == "-0" {
			v = v[1:]
		}
	case normInterval:
		v = normalInterval(v)
	case normPadded:
		v = bytes.TrimRight(v, " ")
	}
	return append(binary.AppendUvarint(b, uint64(len(v))), v...)
}

// normalNumeric drops the trailing zeros of a fraction; numeric's output has no other freedom.
func normalNumeric(v []byte) []byte {
	if bytes.IndexByte(v, '.') >= 0 {
		v = bytes.TrimRight(bytes.TrimRight(v, "0"), ".")
	}
	if string(v) == "-0" {
		v = v[1:]
	}
	return v
}

// normalInterval maps an interval in IntervalStyle postgres to PostgreSQL's comparison value: microseconds, with 30
// days to a month and 24 hours to a day (interval_cmp_value).
func normalInterval(v []byte) []byte {
	const second = int64(1e6)
	const day = 86400 * second
	hi, lo := int64(0), int64(0) // whole days and the rest, so that nothing overflows
	f := strings.Fields(string(v))
	for i := 0; i < len(f); i++ {
		if strings.Contains(f[i], ":") {
			lo += clockMicros(f[i])
			continue
		}
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil || i+1 == len(f) {
			return v // infinity (17+) and anything unforeseen stand for themselves
		}
		i++
		switch strings.TrimSuffix(f[i], "s") {
		case "year":
			hi += n * 360
		case "mon":
			hi += n * 30
		case "day":
			hi += n
		}
	}
	hi, lo = hi+lo/day, lo%day
	if lo < 0 {
		hi, lo = hi-1, lo+day
	}
	return strconv.AppendInt(append(strconv.AppendInt(nil, hi, 10), 'd'), lo, 10)
}

// clockMicros reads [-]hours:minutes:seconds[.fraction].
func clockMicros(s string) int64 {
	sign := int64(1)
	if strings.HasPrefix(s, "-") {
		sign = -1
	}
	s = strings.TrimLeft(s, "+-")
	parts := strings.SplitN(s, ":", 3)
	var total int64
	for i, unit := range []int64{3600e6, 60e6} {
		if i < len(parts) {
			n, _ := strconv.ParseInt(parts[i], 10, 64)
			total += n * unit
		}
	}
	if len(parts) == 3 {
		sec, frac, _ := strings.Cut(parts[2], ".")
		n, _ := strconv.ParseInt(sec, 10, 64)
		f, _ := strconv.ParseInt((frac + "000000")[:6], 10, 64)
		total += n*1e6 + f
	}
	return sign * total
}

// keyColumn is one column of a table's key: where it stands in the origin's tuples, and its norm.
type keyColumn struct {
	at   int
	norm norm
}

// keyOf appends the key of a tuple, in the table's key order. ok is false when a column is missing from the tuple.
func keyOf(b []byte, cols []keyColumn, t wal.Tuple) (_ []byte, ok bool) {
	for _, c := range cols {
		if t[c.at].Kind != wal.Text {
			return b, false
		}
		b = appendKey(b, c.norm, t[c.at].Data)
	}
	return b, true
}

// wholeRow stands for a key in a table without one.
func wholeRow(t wal.Tuple) string {
	var b []byte
	for _, v := range t {
		b = append(b, byte(v.Kind))
		b = appendKey(b, normExact, v.Data)
	}
	return string(b)
}

// normal brings the values of a key, in the table's key order, into normal form.
func (g *target) normal(values wal.Tuple) string {
	var b []byte
	for i, k := range g.key {
		b = appendKey(b, k.norm, values[i].Data)
	}
	return string(b)
}

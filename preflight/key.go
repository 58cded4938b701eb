package preflight

// Built-in types whose text is not unique per value, but can be brought into one form.
const oidBpchar = 1042

var normalized = map[uint32]bool{oidBpchar: true, 1700: true, 700: true, 701: true, 1186: true} // numeric, float4, float8, interval

// exact are the built-in types with one text per value under the wire settings: integers, text, bytea, uuid, dates and
// times, network addresses, discrete ranges and the like.
var exact = map[uint32]bool{
	16: true, 17: true, 18: true, 19: true, 20: true, 21: true, 23: true, 24: true, 25: true, 26: true, 27: true,
	28: true, 29: true, 650: true, 774: true, 790: true, 829: true, 869: true, 1043: true, 1082: true, 1083: true,
	1114: true, 1184: true, 1266: true, 1560: true, 1562: true, 2202: true, 2205: true, 2206: true, 2950: true,
	3220: true, 3904: true, 3926: true, 3908: true, 3910: true, 3912: true, 4096: true, 4089: true, 5069: true,
}

// keySupported reports whether apply can tell from the text of two values whether PostgreSQL takes them for equal.
func keySupported(k keyColumn) bool {
	return k.deterministic && (exact[k.base] || normalized[k.base] || k.typtype == "e")
}

// why says what is wrong with a key column's type.
func (k keyColumn) why() string {
	if !k.deterministic {
		return k.typ + " with a nondeterministic collation"
	}
	return k.typ
}

package link

import (
	"fmt"
	"slices"

	"github.com/duri-io/duri/link/linkpb"
	"github.com/duri-io/duri/wal"
)

// tuple gives a row the form that travels.
func tuple(t wal.Tuple) []*linkpb.Value {
	out := make([]*linkpb.Value, len(t))
	for i, v := range t {
		out[i] = &linkpb.Value{Kind: uint32(v.Kind), Data: v.Data}
	}
	return out
}

// parseTuple reads a row of rel.
func parseTuple(values []*linkpb.Value, rel *wal.Relation) (wal.Tuple, error) {
	if len(values) != len(rel.Columns) {
		return nil, fmt.Errorf("row with %d values for %d columns", len(values), len(rel.Columns))
	}
	t := make(wal.Tuple, len(values))
	for i, v := range values {
		switch k := wal.ValueKind(v.GetKind()); {
		case v.GetKind() > 255:
			return nil, fmt.Errorf("value of kind %d", v.GetKind())
		case k == wal.Text:
			// Never nil: an empty text is not NULL.
			t[i] = wal.Value{Kind: k, Data: append([]byte{}, v.GetData()...)}
		case k == wal.Null, k == wal.Unchanged, k == wal.Omitted:
			t[i] = wal.Value{Kind: k}
		default:
			return nil, fmt.Errorf("value of kind %d", v.GetKind())
		}
	}
	return t, nil
}

// checkKey sees that key names columns of rel.
func checkKey(key []string, rel *wal.Relation) error {
	if len(key) == 0 {
		return fmt.Errorf("no key column named")
	}
	for _, name := range key {
		if !slices.ContainsFunc(rel.Columns, func(c wal.Column) bool { return c.Name == name }) {
			return fmt.Errorf("key column %q is not a column of the table", name)
		}
	}
	return nil
}

package gateway

import (
	"encoding/hex"
	"testing"
)

// TestAnswersThatAreNone: what a server says that is no answer to what was asked for counts as knowing nothing, and ends nothing.
func TestAnswersThatAreNone(t *testing.T) {
	name := hex.EncodeToString([]byte("뷰"))
	for _, c := range []struct {
		row   []string
		knows bool
	}{
		{[]string{"r", name}, true}, {nil, false}, {[]string{"r"}, false}, {[]string{"r", name, "x"}, false}, {[]string{"r", "no hexadecimal"}, false},
	} {
		x := &tainted{names: map[string]bool{}, local: map[string]bool{}}
		x.taint(c.row)
		x.keepHome(c.row)
		if x.all == c.knows || x.allLocal == c.knows || c.knows && (!x.names["뷰"] || !x.local["뷰"]) {
			t.Errorf("%q: %+v", c.row, x)
		}
	}
}

package catalog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/duri-io/duri/conflict"
	"github.com/duri-io/duri/wal"
)

// Side is one of the two changes that met: the one that arrived, or what was here.
type Side string

// The sides. Nobody stands where a record tells of no winner.
const (
	Nobody Side = ""
	Local  Side = "local"
	Remote Side = "remote"
)

// Winner tells whose change stands.
func (c Conflict) Winner() Side {
	switch conflict.Code(c.Code) {
	case conflict.Won:
		return Remote
	case conflict.Lost:
		return Local
	}
	return Nobody
}

// Losing gives the image that gave way. deleted says that it was a delete, which has no image; ok is false when nothing
// gave way: an update that found no row, for example.
func (c Conflict) Losing() (image json.RawMessage, deleted, ok bool) {
	switch c.Winner() {
	case Local:
		return c.RemoteRow, c.RemoteRow == nil, true
	case Remote:
		deleted = c.LocalRow == nil && c.LocalTime != nil // a tombstone
		return c.LocalRow, deleted, c.LocalRow != nil || deleted
	}
	return nil, false, false
}

// winning gives the image that stood after the conflict; nil: no row did.
func (c Conflict) winning() json.RawMessage {
	if c.Winner() == Local {
		return c.LocalRow
	}
	return c.RemoteRow
}

// Rule is what decided, as a word for programs.
type Rule string

// The rules that a record can tell of.
const (
	RuleLater       Rule = "later"        // the greater commit time (replication.md section 2)
	RuleTie         Rule = "tie"          // equal commit times: the greater site number (rule 2)
	RuleUnknownTime Rule = "unknown_time" // a row without a known commit time is older than any change (rule 5)
	RuleMissing     Rule = "missing"      // no row was here
	RuleException   Rule = "exception"    // no conflict: superseded or filled
	RuleOther       Rule = "other"        // the record does not tell
)

// Verdict says who won, and why.
type Verdict struct {
	Winner Side   `json:"winner"`
	Rule   Rule   `json:"rule"`
	Text   string `json:"text"` // one sentence for people
}

// Explain tells from a record who won, and why. name gives a site's name. It is pure.
func (c Conflict) Explain(name func(wal.SiteID) string) Verdict {
	v := Verdict{Winner: c.Winner(), Rule: RuleOther}
	remote, local := name(c.Origin)+"'s "+c.remoteWord(), c.localPhrase(name)
	winner, loser := remote, local
	if v.Winner == Local {
		winner, loser = local, remote
	}
	won := winner + " won over " + loser
	switch {
	case conflict.Code(c.Code) == conflict.Filled:
		v.Rule, v.Text = RuleException, remote+" was completed with values from its origin; nobody lost"
	case conflict.Code(c.Code) == conflict.Superseded:
		v.Rule = RuleException
		v.Text = remote + " was left alone: what is here is newer and had seen it, or the row is gone at its origin"
	case v.Winner == Nobody && conflict.Kind(c.Kind) == conflict.DeleteMissing:
		v.Rule, v.Text = RuleMissing, remote+" found no row here; nobody lost"
	case v.Winner == Nobody:
		v.Text = fmt.Sprintf("%s ended as %q", remote, c.Code)
	case c.LocalTime == nil && c.LocalRow == nil && v.Winner == Remote:
		v.Rule, v.Text = RuleMissing, remote+" was written as a new row: none with this key was here; nobody lost"
	case c.LocalTime == nil && v.Winner == Remote:
		v.Rule, v.Text = RuleUnknownTime, won+": the commit time of what was here is not known any more, so it counts as older"
	case c.LocalTime == nil:
		v.Text = won
	default:
		v.Rule, v.Text = c.byVersion(v.Winner, won)
	}
	return v
}

// byVersion explains a decision between two known versions.
func (c Conflict) byVersion(winner Side, won string) (Rule, string) {
	ahead := c.RemoteTime.Sub(*c.LocalTime)
	high, low := c.Origin, c.LocalSite
	if winner == Local {
		ahead, high, low = -ahead, low, high
	}
	switch {
	case ahead > 0:
		return RuleLater, won + ": it was committed " + strconv.FormatFloat(ahead.Seconds(), 'f', -1, 64) + " s later"
	case ahead == 0 && high > low:
		return RuleTie, fmt.Sprintf("%s: both have the same commit time, and then the greater site number wins (%d over %d)", won, high, low)
	}
	return RuleOther, won + "; the commit times alone do not say why"
}

// remoteWord names what arrived, as far as the kind tells: what meets a tombstone is an insert or an update.
func (c Conflict) remoteWord() string {
	switch conflict.Kind(c.Kind) {
	case conflict.InsertExists:
		return "insert"
	case conflict.UpdateOriginDiffers, conflict.UpdateMissing:
		return "update"
	case conflict.DeleteOriginDiffers, conflict.DeleteMissing:
		return "delete"
	}
	return "change"
}

func (c Conflict) localPhrase(name func(wal.SiteID) string) string {
	switch {
	case c.LocalSite == 0:
		return "the row that was here"
	case c.LocalRow == nil:
		return name(c.LocalSite) + "'s delete"
	}
	return name(c.LocalSite) + "'s row"
}

// Image is a row as a record keeps it: column to the value's text under the settings of rule 21, nil for NULL. A column
// that was not sent (an unchanged out-of-line value) is not in it.
type Image map[string]*string

// parseImage reads an image; nil for none.
func parseImage(doc json.RawMessage) (Image, error) {
	if doc == nil {
		return nil, nil
	}
	var i Image
	if err := json.Unmarshal(doc, &i); err != nil {
		return nil, fmt.Errorf("read a row's image: %w", err)
	}
	return i, nil
}

// equal compares two values, of which nil is NULL.
func equal(a, b *string) bool { return a == b || a != nil && b != nil && *a == *b }

// ColumnPair is one column of both images. A value is left out where its image is missing or lacks the column.
type ColumnPair struct {
	Column  string          `json:"column"`
	Local   json.RawMessage `json:"local,omitempty"` // text or null
	Remote  json.RawMessage `json:"remote,omitempty"`
	Differs bool            `json:"differs"` // both images have the column, with other values
}

// Columns puts both images side by side, in the given order of columns; what it does not name follows by name. It is
// pure.
func (c Conflict) Columns(order []string) ([]ColumnPair, error) {
	local, remote := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	for _, side := range []struct {
		doc  json.RawMessage
		into *map[string]json.RawMessage
	}{{c.LocalRow, &local}, {c.RemoteRow, &remote}} {
		if side.doc == nil {
			continue
		}
		if err := json.Unmarshal(side.doc, side.into); err != nil {
			return nil, fmt.Errorf("read the images of conflict %d: %w", c.ID, err)
		}
	}
	names := slices.Concat(order, slices.Sorted(maps.Keys(local)), slices.Sorted(maps.Keys(remote)))
	var out []ColumnPair
	seen := map[string]bool{}
	for _, n := range names {
		l, hasLocal := local[n]
		r, hasRemote := remote[n]
		if seen[n] || !hasLocal && !hasRemote {
			continue
		}
		seen[n] = true
		// Both texts were written by PostgreSQL's jsonb, so equal strings are equal bytes.
		out = append(out, ColumnPair{n, l, r, hasLocal && hasRemote && !bytes.Equal(l, r)})
	}
	return out, nil
}

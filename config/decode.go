package config

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/duri-io/duri/internal/term"
)

// decoder fills a Config from a YAML tree and notes problems instead of stopping at the first.
type decoder struct {
	file     string
	problems []*Problem
	origins  map[string]Origin
	// bad are keys that have a problem already: validation does not add a second one that only follows from it.
	bad map[string]bool
}

func (d *decoder) at(n *yaml.Node) Origin { return Origin{Kind: FromFile, File: d.file, Line: n.Line} }

func (d *decoder) problem(n *yaml.Node, key, msg, hint string) {
	d.bad[key] = true
	d.problems = append(d.problems, &Problem{At: d.at(n), Key: key, Msg: msg, Hint: hint})
}

// value decodes n into v, which is addressable; key is its path.
func (d *decoder) value(n *yaml.Node, v reflect.Value, key string) {
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		d.problem(n, key, name(key)+" uses a YAML anchor or alias", "write the value out: what is read at three in the morning should stand where it counts")
	case n.Tag == "!!null":
		d.problem(n, key, name(key)+" has no value", "give a value or remove the key")
	case isLeaf(v):
		d.leaf(n, v, key)
	case v.Kind() == reflect.Struct:
		d.mapping(n, v, key)
	case v.Kind() == reflect.Slice:
		d.sequence(n, v, key)
	case v.Kind() == reflect.Map:
		d.entries(n, v, key)
	}
}

// entries decodes a group whose keys are names that the user chose.
func (d *decoder) entries(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.MappingNode {
		d.problem(n, key, fmt.Sprintf("%s is a %s, want names with values", name(key), shape(n)), `write each name on a line of its own, followed by ":"`)
		return
	}
	d.origins[key] = d.at(n)
	v.Set(reflect.MakeMap(v.Type()))
	lines := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		at := entry(key, k.Value)
		switch first, dup := lines[k.Value]; {
		case k.Kind != yaml.ScalarNode || k.Tag != "!!str" || k.Anchor != "":
			d.problem(k, key, fmt.Sprintf("a key of %s is a %s, want a name", key, shape(k)), "put the name in quotes")
			continue
		case dup:
			d.problem(k, at, fmt.Sprintf("key %q is given twice", k.Value), fmt.Sprintf("the first is in line %d: remove one of them", first))
			continue
		}
		lines[k.Value] = k.Line
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(val, item, at)
		if o, ok := d.origins[at]; ok {
			o.Line = k.Line
			d.origins[at] = o
		}
		v.SetMapIndex(reflect.ValueOf(k.Value), item)
	}
}

// entry is the path of an entry that a name stands for.
func entry(parent, name string) string { return parent + "[" + strconv.Quote(name) + "]" }

func (d *decoder) leaf(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.ScalarNode {
		d.problem(n, key, fmt.Sprintf("%s is a %s, want %s", name(key), shape(n), want(v)), "")
		return
	}
	if v.Kind() == reflect.String && n.Tag != "!!str" {
		d.problem(n, key, fmt.Sprintf("%s is a %s, want text", name(key), shape(n)), "put the value in quotes")
		return
	}
	d.origins[key] = d.at(n)
	if err := setText(v, n.Value); err != nil {
		d.problem(n, key, key+": "+err.Error(), "")
	}
}

func (d *decoder) mapping(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.MappingNode {
		d.problem(n, key, fmt.Sprintf("%s is a %s, want keys and values", name(key), shape(n)), "keys: "+strings.Join(fieldNames(v.Type()), ", "))
		return
	}
	if key != "" {
		d.origins[key] = d.at(n)
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, val := n.Content[i], n.Content[i+1]
		if first, dup := seen[k.Value]; dup {
			d.problem(k, join(key, k.Value), fmt.Sprintf("key %q is given twice", k.Value), fmt.Sprintf("the first is in line %d: remove one of them", first))
			continue
		}
		seen[k.Value] = k.Line
		if f, ok := field(v, k.Value); ok && k.Kind == yaml.ScalarNode {
			at := join(key, k.Value)
			d.value(val, f, at)
			if o, ok := d.origins[at]; ok {
				o.Line = k.Line // a list begins, for YAML, at its first entry; people look for the key
				d.origins[at] = o
			}
			continue
		}
		d.unknownKey(k, v.Type(), key)
	}
}

func (d *decoder) unknownKey(k *yaml.Node, t reflect.Type, parent string) {
	known := fieldNames(t)
	if k.Kind != yaml.ScalarNode {
		d.problem(k, parent, fmt.Sprintf("a key of %s is a %s, want a word", name(parent), shape(k)), "keys: "+strings.Join(known, ", "))
		return
	}
	msg := fmt.Sprintf("unknown key %q", k.Value)
	if parent != "" {
		msg += " in " + parent
	}
	if near := term.Closest(k.Value, known); near != "" {
		msg += fmt.Sprintf(" (did you mean %q?)", near)
		d.bad[join(parent, near)] = true // so that it is not reported as missing as well
	}
	d.problem(k, join(parent, k.Value), msg, "keys: "+strings.Join(known, ", "))
}

func (d *decoder) sequence(n *yaml.Node, v reflect.Value, key string) {
	if n.Kind != yaml.SequenceNode {
		d.problem(n, key, fmt.Sprintf("%s is a %s, want a list", name(key), shape(n)), `write each entry on a line of its own, after "- "`)
		return
	}
	d.origins[key] = d.at(n)
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		d.value(item, v.Index(i), fmt.Sprintf("%s[%d]", key, i))
	}
}

// setText sets a leaf from text, the same for file and environment.
func setText(v reflect.Value, text string) error {
	if u, ok := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr()); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Int:
		n, err := strconv.ParseInt(text, 10, 32)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		v.SetInt(n)
	case reflect.Uint16:
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return fmt.Errorf("%q is not a whole number from 0 to 65535", text)
		}
		v.SetUint(n)
	case reflect.Bool:
		if text != "true" && text != "false" {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		v.SetBool(text == "true")
	case reflect.Float64:
		x, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(x) || math.IsInf(x, 0) {
			return fmt.Errorf("%q is not a number", text)
		}
		v.SetFloat(x)
	default:
		return fmt.Errorf("unsupported kind %s", v.Kind())
	}
	return nil
}

func isLeaf(v reflect.Value) bool {
	_, text := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr())
	return text || v.Kind() != reflect.Struct && v.Kind() != reflect.Slice && v.Kind() != reflect.Map
}

func want(v reflect.Value) string {
	switch v.Addr().Interface().(type) {
	case *Duration:
		return "a duration such as 200ms"
	case *Size:
		return "a size such as 64MiB"
	}
	switch v.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Float64:
		return "a number"
	}
	return "a whole number"
}

// shape names what a node is, for people.
func shape(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "group of keys"
	case yaml.SequenceNode:
		return "list"
	}
	switch n.Tag {
	case "!!int", "!!float":
		return "number"
	case "!!bool":
		return "truth value"
	case "!!timestamp":
		return "date"
	case "!!str":
		return "text"
	}
	return "value of another kind"
}

func name(key string) string {
	if key == "" {
		return "the file"
	}
	return key
}

func join(parent, key string) string {
	if parent == "" {
		return key
	}
	return parent + "." + key
}

// field finds the field of a struct by its key.
func field(v reflect.Value, key string) (reflect.Value, bool) {
	i := slices.Index(fieldNames(v.Type()), key)
	if i < 0 {
		return reflect.Value{}, false
	}
	return v.Field(i), true
}

// fieldNames are the keys of a struct in order. Fields without a key (they have no tag) come last in it.
func fieldNames(t reflect.Type) []string {
	var names []string
	for field := range t.Fields() {
		if tag := field.Tag.Get("yaml"); tag != "" {
			names = append(names, tag)
		}
	}
	return names
}

// leaf is one value of the configuration.
type leaf struct {
	key   string
	value reflect.Value
}

// text prints the value as the file would spell it, without quotes.
func (l leaf) text() string {
	if list, ok := reflect.TypeAssert[[]string](l.value); ok {
		return strings.Join(list, ", ")
	}
	return fmt.Sprint(l.value.Interface())
}

// leaves lists the values of a Config in the order of its fields. A list of texts is one leaf.
func leaves(c *Config) []leaf { return appendLeaves(nil, reflect.ValueOf(c).Elem(), "") }

func appendLeaves(all []leaf, v reflect.Value, key string) []leaf {
	switch {
	case isLeaf(v) || v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.String:
		return append(all, leaf{key, v})
	case v.Kind() == reflect.Slice:
		for i := range v.Len() {
			all = appendLeaves(all, v.Index(i), fmt.Sprintf("%s[%d]", key, i))
		}
		return all
	case v.Kind() == reflect.Map:
		for _, k := range slices.SortedFunc(slices.Values(v.MapKeys()), func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) }) {
			item := reflect.New(v.Type().Elem()).Elem() // addressable, as isLeaf wants it
			item.Set(v.MapIndex(k))
			all = appendLeaves(all, item, entry(key, k.String()))
		}
		return all
	}
	for i, f := range fieldNames(v.Type()) {
		all = appendLeaves(all, v.Field(i), join(key, f))
	}
	return all
}

// envName is the environment variable that overrides a key, or "" for the parts of lists, which have none.
func envName(key string) string {
	if strings.Contains(key, "[") {
		return ""
	}
	return "DURI_" + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// environment overrides values by DURI_... variables.
func (d *decoder) environment(c *Config, lookup func(string) (string, bool)) {
	for _, l := range leaves(c) {
		env := envName(l.key)
		if env == "" || !l.value.CanAddr() || !isLeaf(l.value) {
			continue
		}
		text, ok := lookup(env)
		if !ok {
			continue
		}
		at := Origin{Kind: FromEnv, Env: env}
		delete(d.bad, l.key)
		d.problems = slices.DeleteFunc(d.problems, func(p *Problem) bool { return p.Key == l.key })
		d.origins[l.key] = at
		if err := setText(l.value, text); err != nil {
			d.bad[l.key] = true
			d.problems = append(d.problems, &Problem{At: at, Key: l.key, Msg: err.Error(), Hint: "correct the environment variable or unset it"})
		}
	}
}

package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Duration is a length of time that reads and prints as people write it: "200ms", "1h30m", "30d".
type Duration time.Duration

// Units of Duration.
const (
	Millisecond = Duration(time.Millisecond)
	Second      = Duration(time.Second)
	Hour        = Duration(time.Hour)
)

// Std converts to the standard library's type.
func (d Duration) Std() time.Duration { return time.Duration(d) }

// String prints the duration without parts that are zero: "720h", not "720h0m0s". ParseDuration reads it back.
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// ParseDuration reads a number with a unit (ms, s, m, h), several of them, or whole days ("30d").
func ParseDuration(s string) (Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err == nil {
			return Duration(n) * 24 * Hour, nil
		}
	}
	d, err := time.ParseDuration(s)
	if err != nil || s == "0" {
		return 0, fmt.Errorf("%q is not a duration (want a number with a unit, such as 200ms, 1h30m or 30d)", s)
	}
	return Duration(d), nil
}

// MarshalText makes a Duration text in YAML and JSON.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is ParseDuration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := ParseDuration(string(b))
	if err == nil {
		*d = v
	}
	return err
}

// Size is a number of bytes that reads and prints as people write it: "64MiB".
type Size int64

// Units of Size.
const (
	Byte Size = 1
	KiB       = 1024 * Byte
	MiB       = 1024 * KiB
	GiB       = 1024 * MiB
	TiB       = 1024 * GiB
)

// Bytes is the number of bytes.
func (s Size) Bytes() int64 { return int64(s) }

// sizeUnits begins with the greatest. PostgreSQL's own spellings mean the same here as in postgresql.conf: powers of
// 1024.
var sizeUnits = []struct {
	name, postgres string
	bytes          Size
}{{"TiB", "TB", TiB}, {"GiB", "GB", GiB}, {"MiB", "MB", MiB}, {"KiB", "kB", KiB}, {"B", "B", Byte}}

// String prints the size in the greatest unit that divides it: "64MiB", "1000B". ParseSize reads it back.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && s%u.bytes == 0 {
			return strconv.FormatInt(int64(s/u.bytes), 10) + u.name
		}
	}
	return "0B"
}

// ParseSize reads a whole number of bytes, or one with a unit: B, KiB, MiB, GiB, TiB, or PostgreSQL's kB, MB, GB, TB,
// which mean the same.
func ParseSize(text string) (Size, error) {
	number, unit := text, Byte
	for _, u := range sizeUnits {
		n, ok := strings.CutSuffix(text, u.name)
		if !ok {
			n, ok = strings.CutSuffix(text, u.postgres)
		}
		if ok {
			number, unit = strings.TrimRight(n, " "), u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(number, 10, 63)
	if err != nil || Size(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is not a size (want a whole number with a unit, such as 64MiB or 8GiB)", text)
	}
	return Size(n) * unit, nil
}

// MarshalText makes a Size text in YAML and JSON.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is ParseSize.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := ParseSize(string(b))
	if err == nil {
		*s = v
	}
	return err
}

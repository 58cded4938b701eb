package etcdstore

import (
	"context"
	"log/slog"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// newZap gives etcd a logger of the kind that it wants, which passes warnings and worse on to ours.
func newZap(log *slog.Logger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	// A voter that is away is worth a message, not one per heartbeat.
	return zap.New(zapcore.NewSamplerWithOptions(core{log.With("from", "etcd")}, time.Minute, 2, 0))
}

// core is a zapcore.Core that writes to slog.
type core struct{ log *slog.Logger }

// Enabled leaves out etcd's everyday messages, of which there are many.
func (core) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

// With adds fields to all that follows.
func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{c.log.With(attributes(fields)...)}
}

// Check takes a message that is enabled.
func (c core) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

// Write logs. What is only slow or not reachable now and then is a warning in etcd, and here too.
func (c core) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelWarn
	if e.Level >= zapcore.ErrorLevel {
		level = slog.LevelError
	}
	c.log.Log(context.Background(), level, e.Message, attributes(fields)...)
	return nil
}

// Sync has nothing to do.
func (core) Sync() error { return nil }

// attributes turns zap's fields into slog's.
func attributes(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	var attrs []any
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			attrs = append(attrs, slog.Any(f.Key, v))
		}
	}
	return attrs
}

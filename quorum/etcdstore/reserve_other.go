//go:build !linux

package etcdstore

func reserve(string) error { return nil }

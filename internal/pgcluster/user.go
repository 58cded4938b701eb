package pgcluster

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// runUsers are whom a server started by root may run as, in order of preference.
var runUsers = []string{"postgres", "nobody"}

// runAs is the system user that owns the files and runs the server. The zero value means the current user.
type runAs struct {
	name     string
	uid, gid uint32
	change   bool
}

// chooseUser decides whom to run as: the current user, unless that is root, which PostgreSQL refuses.
func chooseUser(euid int, lookup func(string) (*user.User, error)) (runAs, error) {
	if euid != 0 {
		return runAs{}, nil
	}
	for _, name := range runUsers {
		u, err := lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil && uid != 0 {
			return runAs{name: name, uid: uint32(uid), gid: uint32(gid), change: true}, nil
		}
	}
	return runAs{}, &Error{
		"choose a user for PostgreSQL",
		errors.New("PostgreSQL refuses to run as root, and this system has neither a user postgres nor nobody"),
		"run as an ordinary user, or add one: useradd --system postgres.",
	}
}

// credential is for syscall.SysProcAttr; nil keeps the current user.
func (u runAs) credential() *syscall.Credential {
	if !u.change {
		return nil
	}
	return &syscall.Credential{Uid: u.uid, Gid: u.gid}
}

// Credential is of the user that the server runs as, for another program that refuses to be root's; nil: this process's.
func (c *Cluster) Credential() *syscall.Credential { return c.as.credential() }

// own gives the path itself, not what is below it, to the user.
func (u runAs) own(path string) error {
	if !u.change {
		return nil
	}
	return os.Lchown(path, int(u.uid), int(u.gid))
}

// canSearch decides by the permission bits whether the user may pass through a directory. Access control lists are not
// looked at.
func (u runAs) canSearch(mode os.FileMode, uid, gid uint32) bool {
	switch {
	case u.uid == uid:
		return mode&0o100 != 0
	case u.gid == gid:
		return mode&0o010 != 0
	default:
		return mode&0o001 != 0
	}
}

// checkSearchable says which parent of dir the user may not pass through. Without this check initdb reports only that
// it could not access a directory several levels further down.
func (u runAs) checkSearchable(dir string) error {
	if !u.change {
		return nil
	}
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		st, err := os.Stat(parent)
		if err != nil {
			return fmt.Errorf("check that user %s can reach %s: %w", u.name, dir, err)
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if ok && !u.canSearch(st.Mode(), sys.Uid, sys.Gid) {
			return &Error{
				"use " + dir + " for PostgreSQL",
				fmt.Errorf("its parent %s is not searchable by user %s, whom PostgreSQL runs as", parent, u.name),
				"choose a directory below /tmp or /var/lib, or run chmod o+x " + parent + ".",
			}
		}
		if parent == filepath.Dir(parent) {
			return nil
		}
	}
}

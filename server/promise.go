package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/duri-io/duri/quorum"
)

// What the keeper writes down: promises that hold over restarts, and what was seen of the register.

// marker is the file that says whether this site has promised something that holds until the epoch changes: to give some
// site no receipts, to wait for one that comes back, to acknowledge nothing because it leaves. After a restart, the
// proposal that the promise was made for may still be under way (docs/adr/0006). It is there from the beginning and is
// written in place, so that a full disk is no obstacle.
func (k *keeper) marker() string { return filepath.Join(k.a.cfg.DataDir, "promised") }

// noPromise is what the marker says then; anything else, a torn write too, is a promise.
const noPromise = "nothing"

// markBytes is the marker's length: what a disk writes at once.
const markBytes = 512

// mark writes the marker.
func (k *keeper) mark(what string) error {
	content := fmt.Appendf(nil, "%-*.*s\n", markBytes-1, markBytes-1, what)
	f, err := os.OpenFile(k.marker(), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return writeDurably(k.marker(), content)
	}
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// marked reports whether the marker says that something is promised, or may.
func (k *keeper) marked() bool {
	b, err := os.ReadFile(k.marker())
	return err == nil && strings.TrimSpace(string(b)) != noPromise || err != nil && !errors.Is(err, fs.ErrNotExist)
}

// promise writes the marker before anything is promised. k.filesMu is held until it is, and k.mu is not: the disk may be what
// fails.
func (k *keeper) promise(what string) bool {
	k.mu.Lock()
	k.owed = true
	k.mu.Unlock()
	err := k.mark(what)
	if err != nil {
		k.fail("write down a promise", err)
	}
	return err == nil
}

// tidy takes the promise back when nothing is promised any more.
func (k *keeper) tidy() {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	k.mu.Lock()
	due := k.owed && len(k.frozen)+len(k.arming) == 0 && !k.leaving && !k.doubt
	k.owed = k.owed && !due
	k.mu.Unlock()
	if !due {
		return
	}
	if err := k.mark(noPromise); err != nil {
		k.fail("take back the mark of a promise", err)
	}
}

// writeDurably makes a file with a content that survives a loss of power.
func writeDurably(path string, content []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// seenFile holds the greatest value of the register that this site has seen: should the register be lost and begin anew,
// its first value would make members of all.
func (k *keeper) seenFile() string { return filepath.Join(k.a.cfg.DataDir, "register.json") }

// lostRegister reports that the register is older than what this site has seen.
func (k *keeper) lostRegister(epoch uint64) error {
	b, err := os.ReadFile(k.seenFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var seen quorum.Register
	if err == nil {
		err = json.Unmarshal(b, &seen)
	}
	if err != nil {
		return fmt.Errorf("read what this site has seen of the register: %w", err)
	}
	if epoch >= seen.Epoch {
		return nil
	}
	return &hinted{
		fmt.Sprintf("the register is at epoch %d, but this site has seen epoch %d (members %s): it was lost, or put back", epoch, seen.Epoch, strings.Join(seen.Members, " ")),
		"bring its voters' data back. If it is lost for good: stop all agents, remove " + k.seenFile() + " at the site that was a member last, start that one alone, and let the others join again",
	}
}

// remember writes down a value that was taken, unless another one has been taken since.
func (k *keeper) remember(r quorum.Register) error {
	k.filesMu.Lock()
	defer k.filesMu.Unlock()
	k.mu.Lock()
	latest := k.reg.Epoch == r.Epoch
	k.mu.Unlock()
	if !latest {
		return nil
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return writeDurably(k.seenFile(), b)
}

// Package pgcluster makes, starts, kills and removes real PostgreSQL clusters on this machine, each one a data
// directory and a postmaster of its own. `duri demo` and every test that needs PostgreSQL use it (style.md section 5).
//
// It does not download PostgreSQL, does not configure replication between clusters and does not manage clusters that
// somebody else made: a Cluster owns its directory and everything in it. It runs on Linux only, because it finds a
// server's processes through /proc.
//
// It guarantees:
//   - A failed Create leaves no file; Destroy leaves no process, no file and no shared memory, or says what is left.
//   - Kill returns when the postmaster and every process it forked are gone, so that Start may follow at once.
//   - A server ends with the program that started it, even when that program is killed, unless Options.Detach is set.
//   - Two programs that choose ports with this package at the same time do not choose the same one.
//
// PostgreSQL refuses to run as root. Started by root, this package runs initdb and postgres as the user "postgres",
// else "nobody", and gives the directory to that user.
//
// The layout of Options.Dir: data/ (PGDATA; duri.conf and pg_hba.conf are ours), log (the server's messages of all its
// lives) and the Unix-domain socket.
//
// A Cluster is safe for concurrent use. Locks: opMu orders Start and Destroy; mu guards the rest of the mutable
// fields and is never held while waiting. opMu is taken before mu.
package pgcluster

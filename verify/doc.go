// Package verify compares the replicated tables of one database at two sites row by row and says exactly which rows
// differ. It changes nothing; a repair is somebody else's decision.
//
// How. A table with a key is cut into ranges of its key by an index-only walk. Each site computes one digest per range
// inside PostgreSQL, from 64-bit hashes of the rows' text in key order; only digests travel. A range whose digests
// differ is cut smaller, until its rows' hashes are few enough to be compared one by one. A table without a usable
// order (no key, or keys that the two sites sort differently) is compared by parts of a hash of the key, or of the
// whole row, with multiplicities.
//
// What it guarantees. Every query is one short statement of its own in autocommit, so that no snapshot is held for long:
// a held snapshot kills hot-row apply (baselines.md, trap 1). The sites are therefore not read at one instant, and rows
// in flight differ at first; they are told apart from real differences by looking again after Options.Settle (see
// observation). A real difference is missed only when two different texts have the same hash, 2^-64 a row and run, see
// hashSQL.
//
// What it does not. It compares the text of values under the settings of replication.md rule 21: numeric 1.0 and 1.00
// are a difference, and as keys they are two rows. It does not compare sequences, indexes, constraints or anything else
// beside columns and rows.
package verify

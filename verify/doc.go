// Package verify compares the replicated tables of one database at two sites row by row and says exactly which rows
// differ: once and at full speed (Run), or over and over, slowly (Watch). Both change nothing. Repair makes rows equal
// that differ, by rule, when somebody decides so.
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
// suspect), where Settle makes sure that both sites have applied whatever the other showed. A real difference is missed
// only when two different texts have the same hash, 2^-64 a row and run, see hashSQL.
//
// Watch asks for one range at a time, paced by pacer, with a cheaper hash (AlgorithmRecord) that is added up over a range.
//
// Repair judges each row by its versions and the deletes in the journals (judge), and writes the wrong side's row as apply
// does: under a replication origin, with the right row's version, only if it is what was compared (DB.Mend). Each site's
// agent writes its own database only; the other one is asked through Remote and Serve.
//
// What it does not. It compares the text of values under the settings of replication.md rule 21: numeric 1.0 and 1.00
// are a difference, and as keys they are two rows. It does not compare sequences, indexes, constraints or anything else
// beside columns and rows.
package verify

// Package demo runs two sites on this machine and shows what duri does when one of them dies: two PostgreSQL clusters
// and two agents, and two gateways beside them, all real processes; a ledger of 243 local governments that clients write at
// both sites, partly on the same rows; kill -9 of one site; its return; and a verdict from three independent comparisons.
// `duri demo` prints what this package finds.
//
// How clients come in. Each connects once, to the gateway beside its application, and knows nothing of sites. It makes a
// transaction again when it is told 40001, and counts any other error, which is then part of the verdict. What a client
// waits, it measures itself (stall.go); where sessions are, the gateways tell.
//
// How the verdict is made. Every client keeps its own record in a file outside the databases: the attempt, fsynced,
// before it sends COMMIT, and the outcome behind it. Payments and their audit entries are only ever inserted, so what
// was acknowledged can be looked for, one by one, at both sites (judge.go). Sums are sums of payments. Balances that are
// updated in place (budget, settlement, fund) are resolved by the last writer, row by row; they must be equal at both
// sites, and they are not expected to have kept every update that two sites made at the same time. The report counts the
// budget lines in which such an update was lost.
//
// What this version does not claim. Replication is asynchronous: a payment acknowledged by a site just before its death
// may not have reached the other. The report says how many there were and for how long. The dead site comes back with
// its disk, so nothing may be missing in the end. A COMMIT that was under way there may end in 08007, as nobody else can
// tell what became of it; the client looks the payment up. With Options.RPO0 neither may happen.
//
// What it guarantees. Run leaves no process and no file when it returns, unless Options.Keep was set and there is no
// error. A demo that is killed takes its servers, agents and gateways with it, again unless Options.Keep is set; its files stay,
// and Stop removes them. Files and processes that the demo did not make are not touched. It runs on Linux
// only, as internal/pgcluster does.
package demo

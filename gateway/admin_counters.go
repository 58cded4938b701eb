package gateway

// showCounters tells what was counted since the gateway began and PgBouncer has no column for, so that a gateway that runs
// alone, which has no control socket, can be asked as well.
func showCounters(g *Server) (rows [][]any) {
	r := g.Report()
	var transactions, moves, reads, refused uint64
	for _, t := range r.Stats {
		transactions += t.Transactions
		moves += t.Moves
		reads += t.ReadsAway
	}
	for _, n := range r.Refused {
		refused += n
	}
	return [][]any{
		{"logins", r.Logins},
		{"refused", refused},
		{"transactions", transactions},
		{"moves", moves},
		{"reads_away", reads},
		{"slowed", r.Slowed},
		{"slowed_ms", uint64(r.SlowedS * 1e3)},
		{"in_doubt_committed", r.InDoubt["committed"]},
		{"in_doubt_aborted", r.InDoubt["aborted"]},
		{"in_doubt_unknown", r.InDoubt["unknown"]},
	}
}

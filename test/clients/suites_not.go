package clients

// pgxNot are tests of pgx that cannot pass through any gateway that moves sessions, each with its reason.
var pgxNot = map[string]string{}

// pqNot are those of lib/pq.
var pqNot = map[string]string{}

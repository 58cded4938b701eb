package clients

// Why a test of a driver cannot pass where sessions move between connections.
const (
	pidIsVirtual   = "it ends its own connection by pg_terminate_backend with the process id that the client was given, which is the gateway's and no server's"
	namesAreOwn    = "it looks into pg_prepared_statements for names that the client gave; at servers they have others"
	outlives       = "it ends its own backend and expects its connection to end; the session outlives it, with 40001 if a transaction is open"
	namesAreShared = "it counts pg_prepared_statements; statements stay at servers for others after the client has closed them"
)

// pgxNot are those of pgx.
var pgxNot = map[string]string{
	".TestFatalRxError":                                                 pidIsVirtual,
	".TestBeginTxFatalErrorKillsConn":                                   outlives,
	".TestFatalTxError":                                                 pidIsVirtual,
	".TestPrepareHandlesTimeoutBetweenParseAndDescribe":                 namesAreOwn,
	".TestPrepareWithDigestedNameHandlesTimeoutBetweenParseAndDescribe": namesAreOwn,
	"pgconn.TestConnCheckConn":                                          pidIsVirtual,
	"pgconn.TestConnPing":                                               pidIsVirtual,
	"pgxpool.TestPoolAcquireChecksIdleConns":                            pidIsVirtual,
	"pgxpool.TestConnDestroyedWhenBeginFailsFatally":                    outlives,
	"stdlib.TestCheckIdleConn":                                          pidIsVirtual,
	"stdlib.TestConnMultiplePrepareAndDeallocate":                       namesAreShared,
}

// pqNot are those of lib/pq.
var pqNot = map[string]string{
	".TestCopyRespLoopConnectionError": outlives,
	".TestPing":                        outlives,
}

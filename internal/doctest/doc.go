// Package doctest holds the tests that keep the documents true as far as files alone can tell: relative links and anchors
// resolve, the READMEs stay short, and no page names a path of one machine. Whether the commands in them exist is tested
// in cmd/duri, which knows the commands. It builds nothing, exports nothing and needs no PostgreSQL.
package doctest

// Package archtest holds the tests of the code's shape: which package may import which, each with the reason
// (architecture.md section 5, style.md section 9), and that every package says what it is. It reads source files only; it
// builds nothing, exports nothing and needs no tool beside go test.
package archtest

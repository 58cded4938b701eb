// Package linkpb is the protocol between agents as generated from link.proto. It holds no logic: package link speaks
// it, and link.proto documents each message.
package linkpb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative link.proto

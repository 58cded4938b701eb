# duri: make demo, make test. `make` alone lists the targets. Everything runs on two cores, as root or not.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help deps programs build demo check test-fast test console bench prove generate vuln release

# Products never use CGO; RACE=1 is for tests, and needs a C compiler.
export CGO_ENABLED := 0

VERSION  := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
# Where git refuses (a clone of another user's, no repository at all), Go must not ask it.
BUILDVCS := $(shell git status --porcelain >/dev/null 2>&1 && echo auto || echo false)
LDFLAGS   = -s -w -X main.version=$(VERSION)
GOBUILD   = go build -trimpath -buildvcs=$(BUILDVCS) -ldflags '$(LDFLAGS)'

ifeq ($(RACE),1)
RACEFLAG := -race
RACEENV  := CGO_ENABLED=1
endif

help: ## list the targets
	@echo 'duri $(VERSION)'
	sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

deps: ## install what build and test need: PostgreSQL (apt-get), Go modules
	@if ! command -v go >/dev/null; then
		echo 'make deps: go is not on PATH; install Go 1.26 or later from https://go.dev/dl' >&2; exit 1
	fi
	have_postgres() {
		[ -n "$${DURI_PG_BIN:-}" ] || command -v postgres >/dev/null || \
		compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || compgen -G '/usr/pgsql-*/bin/postgres' >/dev/null
	}
	if ! have_postgres; then
		by_hand='install PostgreSQL 15 or later by hand, or set DURI_PG_BIN to the directory of its programs'
		command -v apt-get >/dev/null || { echo "make deps: there is no apt-get here; $$by_hand" >&2; exit 1; }
		root=''
		if [ "$$(id -u)" != 0 ]; then
			command -v sudo >/dev/null || { echo "make deps: neither root nor sudo; $$by_hand" >&2; exit 1; }
			root='sudo'
		fi
		$$root apt-get update -q && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -qy postgresql postgresql-contrib || \
			{ echo "make deps: apt-get could not install PostgreSQL; $$by_hand" >&2; exit 1; }
	fi
	go mod download

programs: ## install the client programs that tests run through the gateway: drivers for Node.js, Python, Java (apt-get)
	@lacking=()
	lacks() { [ -e "$$1" ] || command -v "$$1" >/dev/null || lacking+=("$$2"); }
	python=/usr/lib/python3/dist-packages
	lacks /usr/bin/python3 python3; lacks node nodejs; lacks npm npm; lacks javac default-jdk-headless
	lacks $$python/psycopg python3-psycopg; lacks $$python/psycopg2 python3-psycopg2; lacks $$python/asyncpg python3-asyncpg
	lacks $$python/sqlalchemy python3-sqlalchemy; lacks /usr/share/java/postgresql.jar libpostgresql-jdbc-java
	lacks /usr/share/java/HikariCP.jar libhikaricp-java
	if [ $${#lacking[@]} -gt 0 ]; then
		command -v apt-get >/dev/null || { echo "make programs: there is no apt-get here; test/clients needs $${lacking[*]} as Debian has them" >&2; exit 1; }
		root=''; [ "$$(id -u)" = 0 ] || root='sudo'
		$$root apt-get update -q && $$root env DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$${lacking[@]}"
	fi

build: ## build bin/duri, static
	@$(GOBUILD) -o bin/duri ./cmd/duri
	bin/duri version

demo: deps build ## two sites on this machine, with load: watch them converge; Ctrl-C removes all
	@bin/duri demo $(ARGS)

check: ## format, vet, lint when installed, import rules, generated files, sizes
	@unformatted=$$(find . -name '*.go' -not -path '*/node_modules/*' -not -path './.*' -print0 | xargs -0 gofmt -l)
	if [ -n "$$unformatted" ]; then
		printf 'gofmt would change:\n%s\n' "$$unformatted" >&2; exit 1
	fi
	echo 'check: gofmt ok'
	go vet -buildvcs=false ./...
	echo 'check: go vet ok'
	if command -v golangci-lint >/dev/null && golangci-lint version 2>/dev/null | grep -q 'version v\?2\.'; then
		golangci-lint run ./...
		golangci-lint fmt --diff
		echo 'check: golangci-lint ok'
	else
		echo 'check: golangci-lint 2.x is not installed; gofmt and go vet were run in its place'
	fi
	go test -count=1 ./internal/archtest
	$(generated_current)
	$(sizes)

test-fast: ## the tests that need no PostgreSQL, within a minute
	@go test -short -timeout 2m $$($(pure_packages))

test: deps programs build ## all tests, with real PostgreSQL servers; RACE=1 adds the race detector
	@if [ -n '$(RACEENV)' ] && ! command -v "$${CC:-gcc}" >/dev/null; then
		echo 'make test: RACE=1 needs a C compiler (apt-get install gcc libc6-dev)' >&2; exit 1
	fi
	$(RACEENV) go test -count=1 -timeout 20m $(RACEFLAG) ./...

console: ## the web console
	@echo 'make console: this version of duri has no console yet.' >&2
	exit 1

bench: ## run a benchmark: make bench ASK=apply [ARGS=...]
	@$(call run_one,bench,ASK,$(ASK),bench)

prove: ## run a long proof: make prove CASE=converge [OPS=1000000] [SITES=3] [SEED=n] [ARGS=...]
	@$(call run_one,prove,CASE,$(CASE),test/prove)

generate: ## write the generated files again (go generate; protoc for .proto)
	@go generate ./...
	protos=$$($(find_protos))
	[ -z "$$protos" ] || { $(proto_tools); generate_protos "$$PWD"; }

vuln: ## known vulnerabilities in what duri imports (needs vuln.go.dev)
	@if ! curl -fsS -m 20 -o /dev/null https://vuln.go.dev/index/db.json; then
		echo 'make vuln: https://vuln.go.dev is not reachable from here; nothing was checked.' >&2; exit 1
	fi
	go run golang.org/x/vuln/cmd/govulncheck@v1.9.0 ./...

release: ## static binaries for linux/amd64 and linux/arm64 with checksums, in dist/
	@rm -rf dist
	for arch in amd64 arm64; do
		GOOS=linux GOARCH=$$arch $(GOBUILD) -o "dist/duri-$(VERSION)-linux-$$arch" ./cmd/duri
	done
	cd dist && sha256sum duri-* | tee SHA256SUMS

# --- how the targets do it -------------------------------------------------------------------------------------------

# Packages whose own tests import neither internal/pgtest nor internal/pgcluster, so that the list cannot go stale.
define pure_packages
go list -f '{{.ImportPath}} {{.TestImports}} {{.XTestImports}}' ./... | grep -vE 'internal/pg(test|cluster)|^[^ ]*/(bench|test)(/| )' | cut -d' ' -f1
endef

# run_one TARGET VARIABLE VALUE FOLDER: run the program FOLDER/VALUE, or list what there is.
define run_one
if [ -z '$(3)' ] || ! [ -d '$(4)/$(3)' ]; then
	{
		[ -z '$(3)' ] || echo 'make $(1): there is no $(4)/$(3).'
		echo 'usage: make $(1) $(2)=NAME, where NAME is one of:'
		found=$$(find '$(4)' -mindepth 2 -maxdepth 2 -name '*.go' -printf '%h\n' 2>/dev/null | sed 's|.*/||' | sort -u || true)
		if [ -n "$$found" ]; then sed 's/^/  /' <<<"$$found"; else echo '  (none in this version)'; fi
	} >&2
	exit 2
fi
go run './$(4)/$(3)' $(if $(OPS),-ops $(OPS)) $(if $(SITES),-sites $(SITES)) $(if $(SEED),-seed $(SEED)) $(if $(N),-n $(N)) $(ARGS)
endef

define find_protos
find . -name '*.proto' -not -path '*/node_modules/*' -not -path './.*' | sort
endef

# proto_tools defines generate_protos OUT, which writes the Go code of all .proto files below OUT, each as seen from its own
# folder. protoc-gen-go comes from the version in go.mod.
define proto_tools
tools="$$PWD/bin/tools"; mkdir -p "$$tools"; export PATH="$$tools:$$PATH"
command -v protoc >/dev/null || { echo 'generate: protoc is not installed (apt-get install protobuf-compiler)' >&2; exit 1; }
go build -o "$$tools/protoc-gen-go" google.golang.org/protobuf/cmd/protoc-gen-go
command -v protoc-gen-go-grpc >/dev/null || GOBIN="$$tools" go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
generate_protos() {
	for p in $$protos; do
		dir=$$(dirname "$$p"); out="$$1/$$dir"; mkdir -p "$$out"
		protoc -I "$$dir" --go_out="$$out" --go_opt=paths=source_relative --go-grpc_out="$$out" --go-grpc_opt=paths=source_relative "$$p"
	done
}
endef

# Comments are left out of the comparison: the generators write their own versions there.
define generated_current
protos=$$($(find_protos))
if [ -z "$$protos" ]; then
	echo 'check: no generated protocol code'
elif ! command -v protoc >/dev/null; then
	for p in $$protos; do
		[ -f "$${p%.proto}.pb.go" ] || { echo "check: $$p has no generated code; run make generate" >&2; exit 1; }
	done
	echo 'check: generated protocol code is there; not compared, because protoc is not installed'
else
	$(proto_tools)
	fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT
	generate_protos "$$fresh"
	for f in $$(cd "$$fresh" && find . -name '*.pb.go'); do
		if ! diff -q <(grep -v '^//' "$$f") <(grep -v '^//' "$$fresh/$$f") >/dev/null; then
			echo "check: $$f is stale; run make generate" >&2; exit 1
		fi
	done
	echo 'check: generated protocol code is current'
fi
endef

# Sizes are printed to be looked at; nothing fails on them.
define sizes
find . -name '*.go' -not -name '*.pb.go' -not -path '*/node_modules/*' -not -path './.*' -print0 | xargs -0 awk '
	function note(kind, n) { values[kind, ++count[kind]] = n; sum[kind] += n }
	FNR == 1      { if (file != "") note(kind ? "test" : "code", lines); file = FILENAME; kind = file ~ /_test\.go$$/; start = 0 }
	              { lines = FNR }
	/^func /      { start = FNR; if (/}$$/) { if (!kind) note("func", 1); start = 0 } }
	/^}/ && start { if (!kind) note("func", FNR - start + 1); start = 0 }
	function at(k, q,   i, j, v, a) {
		for (i = 1; i <= count[k]; i++) a[i] = values[k, i]
		for (i = 2; i <= count[k]; i++) { v = a[i]; for (j = i - 1; j > 0 && a[j] > v; j--) a[j + 1] = a[j]; a[j + 1] = v }
		i = int(q * count[k] + 0.999); return a[i < 1 ? 1 : i]
	}
	function row(name, k) { if (count[k]) printf "  %-16s %6d  lines: median %d, p90 %d, max %d\n", name, count[k], at(k, 0.5), at(k, 0.9), at(k, 1) }
	END {
		if (file != "") note(kind ? "test" : "code", lines)
		print "check: sizes"
		row("code files", "code"); row("functions", "func"); row("test files", "test")
		printf "  %d lines of code, %d of tests (%.2f per line of code)\n", sum["code"], sum["test"], sum["code"] ? sum["test"] / sum["code"] : 0
	}'
endef

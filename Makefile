# Two commands for people in a hurry: `make demo` and `make test`. Both install what is missing.

.PHONY: build demo interop test

demo:
	scripts/setup demo
	@echo "building weir: some minutes the first time"
	cargo build --locked --profile quick
	target/quick/weir demo

test:
	scripts/setup test
	scripts/test

build:
	scripts/setup build
	cargo build --locked --release

# Against other people's SDKs, which it fetches.
interop:
	scripts/setup test
	scripts/interop

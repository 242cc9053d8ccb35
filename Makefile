# Two commands for people in a hurry: `make demo` and `make test`. Both install what is missing.

.PHONY: build demo setup test

demo: setup
	cargo build --locked --profile quick
	target/quick/weir demo

test: setup
	scripts/test

build: setup
	cargo build --locked --release

setup:
	scripts/setup

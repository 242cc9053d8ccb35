# Two commands for people in a hurry: `make test` and `make build`. Both install what is missing.

.PHONY: test setup build

test: setup
	scripts/test


build: setup
	cargo build --locked --release

setup:
	scripts/setup

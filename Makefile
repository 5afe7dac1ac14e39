# Every target does its own set-up; ARGS is passed on, as in `make drill ARGS="--fs xfs --at 0.3"`.
BIN := build/venv/bin
ARGS ?=

.PHONY: drill test simulation schedules vm-test vm-drill check setup venv bench lock clean

drill: setup
	$(BIN)/landfall drill $(ARGS)

# ARGS are pytest's, as in `make test ARGS="-k E25"`.
test:
	@bash packaging/setup.sh --test
	$(BIN)/python -m tests $(ARGS)

# Partitions, pauses and kills from seeds: a thousand in one thread (also part of `make test`), and fifty of them on the nodes of a lab, which
# takes most of an hour. ARGS="--seed 468 --runs 1 --verbose" shows one.
simulation: venv
	$(BIN)/python -m tests.simulation --runs 1000 $(ARGS)

schedules:
	@bash packaging/setup.sh --test
	unshare --mount --propagation private $(BIN)/python -m tests.drills.schedules --runs 50 $(ARGS)

# Every test that needs device-mapper, in guests that have it: see tests/guest. ARGS selects, as in ARGS="-k E25".
vm-test:
	@bash packaging/setup.sh --guest
	$(BIN)/python -m tests.guest test -- $(ARGS)

# The drill on three virtual machines, from nothing to the verified result and back to nothing: see packaging/vm-drill.sh. Takes most of an hour
# where machines are emulated. tests/vm, which looks at those machines, is run by it and not by `make test`: there it would have nothing to ask.
vm-drill:
	@bash packaging/vm-drill.sh $(ARGS)

check: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	PATH="$(abspath $(BIN)):$$PATH" ansible-lint -q --offline playbooks

bench:
	@bash packaging/setup.sh --bench
	$(BIN)/python -m tests.bench $(ARGS)

setup:
	@bash packaging/setup.sh

venv:
	@bash packaging/setup.sh --venv-only

# Needs pip-tools (not part of the environment: it is wanted once a year). The switches keep machine settings out of the files.
# requirements.txt is what an installation needs, requirements-dev.txt that and what checks and tests need, at the same versions.
COMPILE := pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-emit-options \
    --no-emit-index-url --no-emit-find-links --no-emit-trusted-host pyproject.toml
lock:
	$(COMPILE) --extra dev --extra drill -o requirements-dev.txt
	$(COMPILE) -c requirements-dev.txt -o requirements.txt

clean:
	@if [ -x $(BIN)/landfall ] && [ "$$(id -u)" = 0 ]; then $(BIN)/landfall lab down; fi
	@if [ -d build/vm ]; then vagrant/lab down; fi
	rm -rf build *.egg-info

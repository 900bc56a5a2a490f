# The two commands to know: `make run` and `make test`. Both set up all they need below .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin

.PHONY: run test lint protos bench bench-cpu chaos sim clean

run: .venv/installed
	$(BIN)/tandem up --ask "What is the capital of France?" $(ARGS)

test: .venv/installed-dev
	$(BIN)/tandem pull
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
	cd protos && ../$(BIN)/buf lint

protos: .venv/installed-dev
	$(BIN)/python protos/generate.py

bench: .venv/installed-bench
	$(BIN)/python -m bench.serve $(ARGS)

bench-cpu: .venv/installed-bench
	$(BIN)/python -m bench.cpu $(ARGS)

chaos: .venv/installed-dev
	$(BIN)/python -m tests.faults.chaos $(ARGS)

sim: .venv/installed-dev
	$(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),2000)) $(ARGS)

clean:
	rm -rf .venv

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tandem needs Python 3.11 or newer; set PYTHON=/path/to/python3.11 and try again." >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv." >&2; exit 1; }
	@touch $@

.venv/installed: .venv/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH) -e . || { echo "Installing failed; the lines above say why. Without network, point pip at a mirror with PIP_ARGS and try again." >&2; exit 1; }
	@touch $@

.venv/installed-%: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[$*]' || { echo "Installing the $* extra failed; the lines above say why." >&2; exit 1; }
	@touch $@

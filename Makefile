# Every target makes .venv and installs what it needs first, and again only when pyproject.toml has changed.
# A machine needs Python >= 3.11 (with venv), make and a network.
#   make demo    text -> tokens -> training -> samples -> endpoint, in a few minutes on a laptop
#   make test    lint, types, import rule and the tests that CI runs
#   make lint    lint, types and import rule alone; make unit the tests alone; make slow the long tests
#   make serve   a trained model behind the OpenAI API and a chat page on http://127.0.0.1:8000; RUN=runs/demo
#   make ui      the MLflow page on http://127.0.0.1:5000
#   make head    a local Ray head for `ray job submit`, in the foreground
# Settings: PYTHON=python3.12 (used to make .venv), PIP_FLAGS=... (handed to pip install), PORT=5000 (make ui, serve),
# RUN=runs/demo (make serve), ARGS=... (more words for make demo and make serve)

SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test lint unit format slow serve ui head clean

help:
	@sed -n '/^#   make /s/^#   //p' Makefile

demo: $(VENV)/.installed
	@$(BIN)/python -m pipelines.demo $(ARGS)

test: lint unit

lint: $(VENV)/.installed-dev
	@status=0; \
	for check in "ruff format --check ." "ruff check ." "mypy" "lint-imports"; do \
	    echo "$$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadgroup

slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu"

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

serve: $(VENV)/.installed
	@$(BIN)/python -m serving.app run=$(RUN) port=$(or $(PORT),8000) $(ARGS)

ui: $(VENV)/.installed
	@$(BIN)/python -m pipelines.lib.tracking ui --port $(or $(PORT),5000)

head: $(VENV)/.installed
	@$(BIN)/python -m pipelines.lib.jobs head

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache coverage.xml .coverage

# The first interpreter that runs and is new enough (a pyenv shim may exist and still refuse to run). .venv/bin/python is
# a link, so an upgraded system Python counts as newer than the stamps below and the installation is looked at again.
$(BIN)/python:
	@set -e; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; fi; \
	echo "making $(VENV) with $$("$$found" --version) ($$(command -v "$$found"))"; \
	"$$found" -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "error: $$found has no venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml $(BIN)/python
	@echo "installing Novella into $(VENV): about 3 minutes and 3.5 GB the first time"
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(BIN)/python
	@echo "installing Novella and its development tools into $(VENV): about 3 minutes and 4 GB the first time"
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# Every target sets up what it needs: a machine with Python 3.11+ and make is enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: quickstart test test-slow test-all check format clean

quickstart: .venv/installed  ## train on the embedded footage, evaluate, draw the report
	$(BIN)/elastictok train quickstart --workdir runs/quickstart

test: check  ## static checks and the fast tests
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 --devices 8 tests/eight_devices

test-slow: .venv/installed-dev  ## the checks that take minutes
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m slow --devices 8 tests/eight_devices

test-all:  ## the fast tests on every Python from 3.11 to 3.13 that is here
	./tests/each_python.sh

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.py
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-dev: .venv/bin/python setup.py
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ .venv/installed

clean:
	rm -rf .venv .venv-* runs build *.egg-info

# Everything goes through .venv, which `make setup` makes; the other targets call it.
PY := .venv/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: setup demo test lint types format clean

setup:
	@sh tools/setup.sh

demo: setup
	$(PY) -m tools.demo

test: setup
	$(PY) -m pytest -n 2 --dist worksteal tests

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: setup
	$(PY) -m pyrefly check

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv demo_out .pytest_cache .ruff_cache .hypothesis

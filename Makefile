# make test | make lint | make env        PYTHON= the interpreter to build on, VENV= where the environment goes
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: test lint env clean

test: env
	$(BIN)/python -m pytest -q -n $(WORKERS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tools/environment.py
	$(PYTHON) tools/environment.py $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# Every target sets up its own virtual environment first. `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed

.PHONY: quickstart test test-slow check format clean

quickstart: $(SETUP)  ## the main job on the embedded default, offline
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

test: $(SETUP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(SETUP)  ## the tests that take minutes
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

check: $(SETUP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info

# constraints.txt pins every version, so that a CPU build of torch on the machine is taken where there is one
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(SETUP)

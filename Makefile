# Every target sets up its own virtual environment first. `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.installed
# the variable keeps the theme from writing an announcement over every build
BUILD_SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
VENV_LOWEST ?= .venv-lowest
SETUP_LOWEST := $(VENV_LOWEST)/.installed

.PHONY: quickstart test coverage test-lowest test-slow fuzz faults docs check audit format clean

quickstart: $(SETUP)  ## the main job on the embedded default, offline
	HF_HUB_OFFLINE=1 $(BIN)/python examples/quickstart.py

test: $(SETUP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# apart from `make test`, because following every call through torch's compiler takes half as much time again
coverage: $(SETUP)  ## the same tests, and the share of the package's lines that they run
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" --cov --cov-report=
	@echo "coverage: $$($(BIN)/python -m coverage report --format=total) % of the lines of tocom_hf"

test-lowest: $(SETUP_LOWEST)  ## the fast tests with the lowest versions that pyproject.toml admits
	$(VENV_LOWEST)/bin/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(SETUP)  ## the tests that take minutes
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

fuzz: $(SETUP)  ## hostile files and the algebra of plugins, over thousands of drawn cases
	FUZZ_EXAMPLES=2500 $(BIN)/python -m pytest --hypothesis-show-statistics tests/storage/test_hostile_files.py tests/plugins/test_properties.py

faults: $(SETUP)  ## inject every fault anew, and write the table in docs/faults.md
	PYTHONPATH=tests $(BIN)/python -m helpers.fault_table

docs: $(SETUP)  ## fill in the tables from the result files, and build the site into site/, offline
	$(BIN)/python docs/generate.py
	$(BUILD_SITE)

check: $(SETUP) audit  ## lint, format, types, directions of imports, known vulnerabilities, and the site
	$(BIN)/python docs/generate.py --check
	$(BUILD_SITE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# the pinned versions against the advisories of PyPI; skipped, and said so, where those cannot be had
audit: $(SETUP)
	@if $(BIN)/python -c "import urllib.request as u; u.urlopen('https://pypi.org/pypi/pip/json', timeout=5)" 2>/dev/null; \
	then $(BIN)/pip-audit --disable-pip --no-deps --requirement constraints.txt; \
	else echo "pip-audit skipped: no network"; fi

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV_LOWEST) build site *.egg-info

# constraints.txt pins every version, so that a CPU build of torch on the machine is taken where there is one
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(SETUP)

# what the lowest versions need in turn is chosen by pip
$(SETUP_LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt --editable '.[test]'
	touch $(SETUP_LOWEST)

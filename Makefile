# Two commands: `make demo` and `make test`. Everything lives in .venv and demo/, both removable.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(wildcard src/tensormill/ops/*/*.cpp src/tensormill/ops/*/*.h src/tensormill/native/*.h)

.PHONY: demo test check fast clean

demo: $(VENV)/.installed
	$(BIN)/tensormill compress builtin:python-lm --method awq --set calibration_samples=64 --max-tokens 32768 --curve 3,4,6 --output demo --overwrite

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadgroup

fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

check: $(VENV)/.installed-test
	$(PIP) --editable .[check]
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "tensormill needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable .[test]
	touch $@

clean:
	rm -rf $(VENV) build demo

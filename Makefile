# make        build .venv (once, and again when pyproject.toml changes)
# make demo   set-up, then the main job on generated scenes
# make test   set-up, then all tests
# make coverage   lines and branches of masks, caches and attention
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: all demo test test-fast coverage lint format clean

all: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,hf]"
	touch $@

demo: $(STAMP)
	$(BIN)/bitgen demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

coverage: $(STAMP)
	$(BIN)/python -m pytest tests/model --quiet --cov-branch --cov-report=term-missing \
		--cov-fail-under=98 --cov=bitgen.model.masks --cov=bitgen.model.cache \
		--cov=bitgen.model.attention

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

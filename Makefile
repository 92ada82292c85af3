# Everything runs in .venv, which is made on first use and again when the requirements change.
#
#   make demo     prune a small model end to end
#   make test     what CI runs: lint, types and the quick tests
#   make slow     the long suites, and a search for new examples of properties
#   make lint     check style and types          make format   put the code in its form
#   make clean    remove what was built and .venv

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.PHONY: demo test slow lint format clean

# Two processes of one thread each; nothing waits for a model hub.
test slow: export OMP_NUM_THREADS = 1
test slow: export MKL_NUM_THREADS = 1
test slow: export TOKENIZERS_PARALLELISM = false
test slow: export HF_HUB_OFFLINE = 1

demo: $(READY)
	$(BIN)/slimgraph demo

test: lint
	$(BIN)/pytest -n 2

slow: $(READY)
	$(BIN)/pytest -n 2 -m slow
	$(BIN)/pytest -n 2 -m hypothesis --hypothesis-profile default

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find slimgraph passes tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and at its pinned version, so that nothing else chooses another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Slimgraph needs Python 3.11 or newer, found $$($(PYTHON) --version): make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

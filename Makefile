# make serve          install what serving needs and start the server on this machine
# make test           install the test tools too and run every test
# make lint | format  check the code | put it in order
# make bench          start a server and measure its turns; for one model: ARGS='--model NAME=PATH'
# make bench-engine   our decode engine beside others, for a text checkpoint: ARGS='--model FOLDER'
# make bench-multiturn  turns about pictures beside other arrangements: ARGS='--vllm-venv FOLDER --results FOLDER'
# make bench-gpu      full-size models of random weights on a CUDA device
# make install        only install        make clean   remove what the other targets made
#
# PYTHON       the interpreter for the virtual environment (3.11 or newer)
# ARGS         more words for the command, e.g. make serve ARGS='--port 9000', make test ARGS=tests/engine
# TORCH_INDEX  where torch comes from. PyPI's Linux builds bring CUDA along (several GB); for a small CPU build:
#              make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' requirements.lock)

.PHONY: serve test lint format bench bench-engine bench-multiturn bench-gpu install clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve
	@$(BIN)/omnilmm serve $(ARGS)

bench: $(VENV)/.develop
	@$(BIN)/python tests/bench/turns.py $(ARGS)

bench-engine: $(VENV)/.develop
	@$(BIN)/python tests/bench/engine.py $(ARGS)

bench-multiturn: $(VENV)/.develop
	@$(BIN)/python tests/bench/multiturn.py $(ARGS)

bench-gpu: $(VENV)/.develop
	@$(BIN)/python tests/bench/gpu.py $(ARGS)

test: $(VENV)/.develop
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.develop
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.develop
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: $(VENV)/.develop

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp older than pyproject.toml or the lock means: install again.

$(VENV)/.serve: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "The venv module is incomplete; on Debian: apt install python3-venv"; exit 1; }
	@echo "Installing $(TORCH) (minutes, the first time)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "Installing Ray, transformers and the rest into $(VENV)"
	@$(PIP) install -c requirements.lock -e .
	@touch $@

$(VENV)/.develop: $(VENV)/.serve
	@echo "Installing the tools for tests and checks"
	@$(PIP) install -c requirements.lock -e '.[test,lint]'
	@touch $@

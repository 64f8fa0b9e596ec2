# One line each to the real tool. `make help` lists what there is; STACK=name for another stack than local.
STACK ?= local
RUN := toolchain/run
LOCK = $(RUN) uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate $(UPGRADE)

.DEFAULT_GOAL := help
.PHONY: help setup up down test lint format lock clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: .venv, pulumi, haproxy, prometheus, alertmanager, vLLM
	@toolchain/bootstrap --stack $(STACK)
	@$(RUN) python -m toolchain install

up: setup ## bring the fleet up on this machine, or up to date: pulumi up
	@$(RUN) python -m toolchain heal --stack $(STACK)
	@$(RUN) pulumi stack select --create $(STACK)
	@$(RUN) pulumi up --yes --skip-preview --show-full-output --stack $(STACK)

down: ## destroy it: nothing is left running
	@toolchain/down $(STACK)

test: ## every check and every test
	@toolchain/bootstrap --dev
	@$(RUN) python -m toolchain install --for test
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(RUN) pytest -n auto --maxprocesses 4 tests/unit tests/render tests/program
	@$(RUN) pytest tests/machine tests/stack tests/local tests/aws

lint: ## style and types, without the tests
	@toolchain/bootstrap --dev
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

format: ## put the sources into the one form that lint accepts
	@toolchain/bootstrap --dev
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

lock: ## recompile every requirements/*.txt; UPGRADE=--upgrade takes newer versions
	@toolchain/bootstrap --dev
	$(LOCK) requirements/uv.in -o requirements/uv.txt
	$(LOCK) pyproject.toml requirements/build.in -c requirements/uv.txt -o requirements/fleet.txt
	$(LOCK) pyproject.toml requirements/build.in --extra dev -c requirements/fleet.txt -o requirements/dev.txt
	$(LOCK) pyproject.toml requirements/build.in --extra aws -c requirements/dev.txt -o requirements/aws.txt
	$(LOCK) requirements/node.in -c requirements/dev.txt -o requirements/node.txt
	$(LOCK) requirements/haproxy.in -o requirements/haproxy.txt
	$(LOCK) requirements/bench.in -o requirements/bench.txt
	$(LOCK) requirements/s3.in -o requirements/s3.txt
	$(LOCK) requirements/moto.in -o requirements/moto.txt
	$(LOCK) requirements/policy.in -o requirements/policy.txt
	$(LOCK) requirements/checkov.in -o requirements/checkov.txt
	$(LOCK) requirements/go.in -o requirements/go.txt
	$(LOCK) requirements/torch.in --excludes requirements/torch-excludes.txt -o requirements/torch.txt
	$(LOCK) requirements/vllm.in --overrides requirements/torch-overrides.txt --excludes requirements/engine-excludes.txt --no-emit-package torch -o requirements/vllm.txt
	$(LOCK) requirements/vllm-cuda.in -o requirements/vllm-cuda.txt
	$(LOCK) requirements/quantize.in --overrides requirements/torch-overrides.txt --excludes requirements/engine-excludes.txt --no-emit-package torch -o requirements/quantize.txt

clean: down ## down, and remove everything that was installed here
	rm -rf .fleet .venv

# From a fresh clone: `make demo` or `make test`. Needs Python 3.10 to 3.13, make and a C++ compiler; all else is
# installed into .venv by tools/setup_env.py, once. Paths are relative, so a space in the clone's path is no matter.

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
TEST_EXTRAS := deepspeed,faces,metrics,test

.DEFAULT_GOAL := help
.PHONY: help demo demo-faces test test-slow test-faults test-cuda lint format env env-faces env-test clean

help:
	@echo "make demo         train a small NVAE on real MNIST digits and draw samples from it"
	@echo "make demo-faces   train on cartoon faces in colour; samples, reconstructions, a blend, a traverse"
	@echo "make test         lint, types, spelling and the whole test suite (PYTEST_ARGS=... is passed on)"
	@echo "make test-slow    the checks that take long, for every night rather than every change"
	@echo "make test-cuda    the tests of the CUDA paths, on this machine's card or on a phantom that stands in for one"
	@echo "make test-faults  kill trainings 200 times, at random and while they save; none may be lost"
	@echo "make lint         lint, types and spelling only"
	@echo "make format       put every file into the house style"
	@echo "make env          only make the environment in $(VENV)"
	@echo "make clean        remove the environments, builds and caches; runs/ stays"
	@echo
	@echo "PYTHON=python3.12   the Python to make the environment with"
	@echo 'NVAE_TORCH="..."    the torch to install: "torch==2.7.1", an index URL, or "torch==2.7.1 --index-url URL"'

env:
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --extras deepspeed

env-faces:
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --extras deepspeed,faces

env-test:
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --extras $(TEST_EXTRAS)

demo: env
	@$(call demonstrate,demo-mnist)

demo-faces: env-faces
	@$(call demonstrate,demo-faces)
	@$(RUN) launch/reconstruct.py --run latest
	@$(RUN) launch/blend.py --run latest --matrix 5 --split scale:2
	@$(RUN) launch/traverse.py --run latest

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

test-slow: env-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

test-cuda:
	@OMP_NUM_THREADS=1 $(PYTHON) tests/phantom/run_tests.py --jobs $(JOBS) $(PYTEST_ARGS)

# 200 kills of trainings and what became of them (docs/reliability.md): a quarter of an hour on two idle cores.
test-faults: env-test
	$(RUN) tests/faults/campaign.py --kills 200

lint: env-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m codespell_lib

format: env-test
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

clean:
	rm -rf $(VENV) .venv-cuda build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -maxdepth 1 -name '*.egg-info' -exec rm -rf {} +
	@if [ -d runs ]; then echo "runs/ stays: remove it yourself when you no longer need what was trained"; fi

# $(call demonstrate,PROFILE): trains by the profile into a new folder of runs/, draws samples, says where they are.
# The launcher's fixed default port would let only one training at a time run on a machine, hence a free one.
define demonstrate
set -e; \
if [ -x $(VENV)/bin/deepspeed ]; then \
    port=$$($(RUN) -c "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"); \
    launcher="$(VENV)/bin/deepspeed --quiet --master_port $$port"; \
else \
    launcher="$(RUN)"; \
fi; \
echo "$$launcher launch/train.py --profile profiles/$(1).toml --runs-dir runs"; \
$$launcher launch/train.py --profile profiles/$(1).toml --runs-dir runs; \
$(RUN) launch/sample.py --run latest; \
run=$$(ls -d runs/*-$(1)* | tail -n 1); \
echo; \
echo "pictures:    $$run/samples"; \
echo "TensorBoard: $(VENV)/bin/tensorboard --logdir runs"
endef

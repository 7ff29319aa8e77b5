# Two commands: `make demo` and `make test`. Each sets up .venv first, which costs nothing once it is up to date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that spin while they wait slow small models down several times; nothing here may ask a hub.
QUIET := OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint setup reliability bench-ppo bench-memory bench-plan bench-sft

help:
	@echo 'make demo   align a small model in a small world and print the table (CPU, offline, minutes)'
	@echo 'make test   lint, types and every test'
	@echo 'make lint   ruff and mypy only'
	@echo 'make reliability   kills, power cuts, full disks, flipped bits and more; writes RELIABILITY.md (CPU, under half an hour)'
	@echo 'make bench-ppo   PPO against TRL 1.12, which it installs into runs/bench (an hour on one idle core; ARGS="--quick" shows that it runs)'
	@echo 'make bench-plan   what align plan predicts against what stages allocate (CPU, about half an hour)'
	@echo 'make bench-sft   SFT against TRL: speed, memory, held-out loss (CPU, about half an hour)'
	@echo 'make bench-memory   peak memory of PPO beside LoRA SFT (CPU, about half an hour)'

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); this project needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/align demo

# Each case in a process of its own; writes runs/bench/ppo_memory.json.
bench-memory: $(STAMP)
	$(BIN)/python -m tests.bench.memory

# Predicted and measured peak of every stage, one process and ZeRO on two; writes runs/bench/plan.json.
bench-plan: $(STAMP)
	$(BIN)/python -m tests.bench.plan $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Cheap checks first, so that a mistake shows in seconds. OMP_NUM_THREADS=1: results do not depend on the number of cores.
# Two workers where a test is one process; tests of two processes run one by one.
test: lint
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 tests/unit
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 tests/security tests/stage
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 tests/chain
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/launch

# Rewrites RELIABILITY.md after every case; ARGS="--quick", ARGS="--only AREA" and ARGS="--seed N" are for trying things out.
reliability: $(STAMP)
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability $(ARGS)

# The peer lives in a folder of its own: the project itself uses a later trl, which has no PPO.
PEER := runs/bench/trl-1.12
$(PEER)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(PEER) trl==1.12.0
	@touch $@

bench-ppo: $(STAMP) $(PEER)/.installed
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.ppo --peer $(PEER) $(ARGS)

bench-sft: $(STAMP)
	$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.sft $(ARGS)

# Each target alone sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
TORCH := 2.13.0
# Of this checkout alone: in a shared cache, a compiler that was stopped half-way leaves broken files behind.
export TORCHINDUCTOR_CACHE_DIR ?= $(abspath $(VENV))/inductor

.PHONY: demo fuzz trainers test test-all test-compat check check-update lint clean

# What the demo needs.
$(RUNS): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet -e .
	touch $@

# And what tests and lint need.
$(STAMP): $(RUNS)
	$(BIN)/pip install --quiet -e '.[test,dev]'
	touch $@

demo: $(RUNS)
	$(BIN)/memo demo

# One thread a worker: two workers share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m ''

# A smoke set against the oldest and the newest torch, each in a virtual environment of its own. A version whose tests
# fail does not stop the other's: bench.compat reads both runs, and fails behind its table where one did.
COMPAT := 2.11.0 2.15.0
SMOKE := tests/test_contract.py tests/test_options.py tests/runtime/test_ops.py \
	tests/passes/transforms/test_partition.py tests/passes/transforms/test_masks.py \
	tests/passes/transforms/test_tile_places.py tests/codegen/emitted/test_body.py \
	tests/codegen/scheduler/test_fusion.py tests/codegen/test_kernels.py tests/codegen/scheduler/test_order.py \
	tests/codegen/scheduler/test_dependencies.py tests/codegen/test_workspace.py \
	tests/codegen/scheduler/test_lost_dependencies.py tests/passes/transforms/test_sums.py tests/trace/test_offline.py \
	tests/passes/transforms/test_slices.py tests/passes/analysis/test_bit_sensitive.py tests/placement/test_joins.py \
	tests/codegen/emitted/test_verifier.py tests/report/test_dumps.py

test-compat: $(STAMP) $(addprefix compat-,$(COMPAT))
	$(BIN)/python -m bench.compat $(foreach v,$(COMPAT),$(v)=$(VENV)-$(v)/smoke.xml)

compat-%:
	rm -f $(VENV)-$*/smoke.xml
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet torch==$*
	$(VENV)-$*/bin/pip install --quiet -e . 'pytest>=8' 'pytest-xdist>=3' 'hypothesis>=6' 'transformers>=4.57'
	-OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest -n 2 --junitxml=$(VENV)-$*/smoke.xml $(SMOKE)

# Memory and time of the model zoo against what was committed; `make check-update` after a change that is meant.
ZOO := $(addprefix bench.zoo:,llama llama_in_three_quarters llama_recomputed gpt_dropout hf_gpt2 hf_llama)

# Planning may take up to four times as long as when the baseline was made: machines differ, and are shared.
check: $(STAMP)
	$(BIN)/memo check --baseline bench/baselines/h100.json --tolerance planning=3 $(ZOO)

check-update: $(STAMP)
	$(BIN)/memo check --baseline bench/baselines/h100.json --hardware h100 --update $(ZOO)

# Programs drawn from a seed: hours, on all cores. Stopped, it goes on where it was.
SEED ?= 1
fuzz: $(STAMP)
	-OMP_NUM_THREADS=1 $(BIN)/python -m bench.fuzz --cases 10000 --seed $(SEED) --jobs 2
	-OMP_NUM_THREADS=1 $(BIN)/python -m bench.fuzz --cases 1000 --seed $(SEED) --jobs 2 --backend memo
	$(BIN)/python -m bench.fuzz --report

# Which trainers work in which settings: minutes. Those of peft, lightning and torchao run where these are installed.
trainers: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.trainers --write

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

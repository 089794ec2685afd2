# Two commands matter: `make quickstart` and `make test`. Both first set up what they need in $(VENV), once.
#
#   PYTHON=/path/to/python3.12   builds the environment on another interpreter
#   VENV=/path/to/venv           puts it elsewhere
#   TORCH_INDEX=url              the index for CPU builds of torch (see launchers/setup.sh); empty: only pip's own index
#   FAULTS="sigterm --again"      rows of `make test-faults`; by default those that have no results yet
#   PYTEST_ARGS="-k select -x"   is passed to pytest
#   PARTS="speed layouts"        what test-gpu2 runs; empty: all but "rows"
#   TABLE=docs/results/two_gpus.md  where test-gpu2 writes its results

VENV ?= .venv
OUT ?= outputs/quickstart
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
PARTS ?=
TABLE ?= docs/results/two_gpus.md
FAULTS ?=
# They go unquoted into commands, one of which is rm -rf.
ifneq ($(words $(VENV)),1)
$(error VENV=$(VENV) must be one folder without spaces in its name; try VENV=.venv)
endif
ifneq ($(words $(OUT)),1)
$(error OUT=$(OUT) must be one folder without spaces in its name; try OUT=outputs/quickstart)
endif

BIN := $(VENV)/bin
SETUP := pyproject.toml constraints.txt launchers/setup.sh launchers/requirements.py

# Keep the repository's root off sys.path: there, `kernels/` would pass for a package.
export PYTHONSAFEPATH := 1
export TORCH_INDEX PYTHON

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-faults test-gpu test-ranks test-gpu2 lint types format clean

help:  ## print this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(VENV)/.quickstart  ## set up, prepare real text, pretrain a small SSA Llama on two processes, evaluate, report
	@launchers/quickstart.sh --venv $(VENV) --out $(OUT)

test: $(VENV)/.dev  ## set up, run the tests (CPU)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu" $(PYTEST_ARGS)

test-faults: $(VENV)/.dev  ## run the fault matrix and write docs/fault-matrix.md; FAULTS="ROW… --again" chooses rows
	@PYTHONPATH=.:kernels:tests OMP_NUM_THREADS=1 $(BIN)/python -m faults $(FAULTS)

test-gpu:  ## run the GPU tests in an environment that already has CUDA torch: make test-gpu PYTHON=python3
	@$(or $(PYTHON),python3) -m pytest -m gpu $(PYTEST_ARGS)

test-ranks:  ## run the tests of layouts on GPUs, over NCCL; ranks share GPUs where there are too few: make test-ranks PYTHON=python3
	@SSA_TEST_ON_GPUS=1 $(or $(PYTHON),python3) -m pytest -m "not gpu" tests/distributed $(PYTEST_ARGS)

test-gpu2:  ## measure and test on two GPUs, in nine minutes: make test-gpu2 PYTHON=python3 PARTS="speed layouts save deepspeed"
	@PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests:$$PYTHONPATH \
		$(or $(PYTHON),python3) -m benchmarks.scaling --suite two_gpus --parts "$(PARTS)" --table $(TABLE) $(SCALING_ARGS)

lint: $(VENV)/.dev  ## run ruff (rules and format), import-linter, shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR launchers/*.sh launchers/*.sbatch .ci/run

types: $(VENV)/.dev  ## run pyright
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## rewrite files as ruff formats them
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean:  ## remove the environment, caches and the quickstart's output
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .import_linter_cache build ssa_pretrain.egg-info kernels/build kernels/ssa_kernels.egg-info

# make skips a set-up whose stamp is newer than its sources. The second set-up includes the first.
$(VENV)/.quickstart: $(SETUP)
	@launchers/setup.sh $(VENV) quickstart
	@touch $@

$(VENV)/.dev: $(SETUP)
	@launchers/setup.sh $(VENV) quickstart,llama3,gigatoken,deepspeed,hub,cluster,bench,evaluation,trackers,dev
	@touch $@ $(VENV)/.quickstart

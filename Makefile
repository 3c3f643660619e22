# Every target sets up what it needs in .venv first. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STRATEGIES := single dp=2 fsdp=2 tp=2 pp=2 dp=2,tp=2 fsdp=2,pp=2 auto
ENGINES := slurm-wlm munge openmpi-bin openssh-client default-jre-headless iproute2 util-linux
DEMO = $(BIN)/shardwise compare image --epochs 4 --set schedule_epochs=4 $(foreach strategy,$(STRATEGIES),--strategy '$(strategy)')

COMPAT := $(addprefix tests/,$(addprefix multiprocess/,test_keras.py test_script_objects.py test_horovod_operations.py \
	test_horovod_optimizer.py) cli/test_horovod_scripts.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo readme test compat horovod browser engines unit models plans pages docs check format bench clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1 - /'

setup: $(STAMP) ## makes .venv with the exact versions of requirements.txt

$(STAMP): requirements.txt pyproject.toml
	@echo "Setting up $(VENV) as requirements.txt says (torch is a large download the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP) ## trains one model under every kind of strategy and prints one table
	$(DEMO)

readme: $(STAMP) ## runs the demo and puts its table into README.md and its twin
	mkdir -p build
	$(DEMO) > build/demo.txt
	$(BIN)/python docs/insert_demo.py build/demo.txt README.md README.zh-CN.md

test: $(STAMP) ## runs all tests but those in a browser, on engines and of other software, in two processes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --ignore tests/browser --ignore tests/engines $(COMPAT:%=--ignore %)

compat: $(STAMP) ## runs the tests of Horovod's calls, Keras, Lightning and Accelerate
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(COMPAT)

horovod: $(STAMP) ## downloads Horovod's source and compares its calls with those of shardwise.compat.horovod
	$(BIN)/python -m benchmarks.horovod_calls

browser: $(STAMP) ## tests reports in headless Chromium (Debian: apt-get install chromium chromium-driver)
	SHARDWISE_BROWSER=required $(BIN)/python -m pytest tests/browser

engines: $(STAMP) ## installs Slurm, Open MPI, Ray and Spark (Debian, as root) and runs the tests on them
	for program in srun munged mpirun ssh java tc nsenter; do \
		command -v $$program >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(ENGINES) || exit 1; break; }; \
	done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-engines.txt
	SHARDWISE_ENGINES=required $(BIN)/python -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder tests/engines

unit: $(STAMP) ## runs the tests that start no process
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/unit

models: $(STAMP) ## tests all models of others under all strategies and writes docs/models.md
	SHARDWISE_ALL_MODELS=1 $(BIN)/python -m pytest --quiet tests/multiprocess/test_catalogue.py

plans: $(STAMP) ## writes docs/plans.md: plans for models of up to a trillion parameters
	$(BIN)/python docs/write_plans.py

pages: $(STAMP) ## draws the pictures of docs/ and puts what commands print into its pages
	$(BIN)/python docs/draw_pictures.py
	SHARDWISE_CLUSTER=off $(BIN)/python docs/write_outputs.py

docs: $(STAMP) ## builds the site of docs/ into build/site, without a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(STAMP) ## ruff, mypy --strict (over the tests too) and the import order of the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find tests -name conftest.py -print0 | xargs -0 -n 1 $(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/unit/test_layers.py tests/unit/test_public_names.py tests/processes/test_imports.py

format: $(STAMP) ## lets ruff lay out and sort the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## runs the benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks.digits
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.recording
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.hosting
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.layers
	$(BIN)/python -m benchmarks.tracing
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.this_machine
	$(BIN)/python -m benchmarks.dryrun
	$(BIN)/python -m benchmarks.regret

clean: ## removes what the targets made, except runs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

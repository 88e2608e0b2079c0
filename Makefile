# Every target does its own set-up in .venv: nothing but Python >= 3.10 is needed. `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
VENV_FLOOR ?= .venv-floor
PYTEST_ARGS ?=
# One thread for each process: the models are small, and threads that wait for each other slow a busy machine down.
FAST_TESTS := -m "not slow" -n auto --maxprocesses 8

PY := $(VENV)/bin/python
# pip prints errors only, and leaves compiling to the first import: most modules are never imported.
PIP := -m pip install -qq --no-compile
REQUIREMENTS := setup.cfg pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-floor style quality bench wheel-check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 makes .venv with that Python (after make clean); PYTEST_ARGS='-k name' goes to pytest."

demo: $(VENV)/.demo ## Train on real digits, save, load in a fresh process, draw: minutes on a CPU
	$(PY) examples/demo.py

test: $(VENV)/.dev ## Run the fast tests
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FAST_TESTS) $(PYTEST_ARGS)

# pytest exits with 5 where no test is selected.
test-slow: $(VENV)/.dev ## Run the slow tests: loading in fresh processes, killed runs, the README's blocks
	$(PY) -m pytest -m slow $(PYTEST_ARGS) || { status=$$?; test $$status -eq 5; }

test-floor: $(VENV_FLOOR)/.dev ## Run the fast tests on the oldest versions that setup.cfg allows
	OMP_NUM_THREADS=1 $(VENV_FLOOR)/bin/python -m pytest $(FAST_TESTS) $(PYTEST_ARGS)

style: $(VENV)/.lint ## Format the code and repair what ruff can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

quality: $(VENV)/.lint ## Check format, lint, docstrings and the rules of CONTRIBUTING.md
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/check_docstrings.py diffusers_dyna pipelines
	$(PY) tools/check_rules.py

bench: $(VENV)/.dev ## Measure the speed of the models and the accuracy of the schedulers
	$(PY) examples/benchmark.py
	$(PY) examples/benchmark_schedulers.py

wheel-check: $(VENV)/.dev ## Build sdist and wheel, import every module from the installed wheel
	$(PY) tools/check_wheel.py

clean: ## Remove the environments, caches and builds; outputs/ stays
	rm -rf $(VENV) $(VENV_FLOOR) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. Each file stands for what is installed; a change of the requirements installs again.

# $(call new-environment,folder)
define new-environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "'$(PYTHON)' is not a working Python >= 3.10. Name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot make environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Making $(1): only once"
	@$(PYTHON) -m venv $(1)
	@echo '*' > $(1)/.gitignore
	@$(1)/bin/python $(PIP) --upgrade pip
endef

$(VENV)/.python:
	$(call new-environment,$(VENV))
	@touch $@

$(VENV)/.lint: $(VENV)/.python constraints.txt
	@$(PY) $(PIP) --constraint constraints.txt ruff
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@$(PY) tools/install_torch.py --constraint constraints.txt
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(REQUIREMENTS)
	@echo "Installing diffusers-dyna for the demo"
	@$(PY) $(PIP) --constraint constraints.txt --editable ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(REQUIREMENTS)
	@echo "Installing diffusers-dyna with every extra"
	@$(PY) $(PIP) --constraint constraints.txt --editable ".[train,eval,lora,ode,dev]"
	@touch $(VENV)/.lint $(VENV)/.demo $@

$(VENV_FLOOR)/.dev: $(REQUIREMENTS) tools/lower_bounds.py
	$(call new-environment,$(VENV_FLOOR))
	@$(VENV_FLOOR)/bin/python tools/lower_bounds.py > $(VENV_FLOOR)/constraints.txt
	@$(VENV_FLOOR)/bin/python tools/install_torch.py --constraint $(VENV_FLOOR)/constraints.txt
	@echo "Installing diffusers-dyna with its lower bounds"
	@$(VENV_FLOOR)/bin/python $(PIP) --constraint $(VENV_FLOOR)/constraints.txt \
		--editable ".[train,eval,lora,ode,dev]"
	@touch $@

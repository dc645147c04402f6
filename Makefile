PYTHON ?= python3.11
RUN := .venv/bin
JOBS ?= 2
export RAY_AUTH_MODE ?= disabled
# Compiled modules are kept even where the environment says not to: Ray starts dozens of processes, each of which would compile all it imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint format setup setup-dev clean

demo: setup  ## phantoms, all stages, and where the report is
	$(RUN)/medsae phantom data/phantom --images 2400 --seed 1
	$(RUN)/medsae run configs/demo.yaml

test: setup-dev  ## all tests: real Ray, real Serve, real vLLM on a tiny model
	$(RUN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup-dev  ## style, format, types, import layering
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

format: setup-dev
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

setup:
	@$(PYTHON) requirements/install.py base

setup-dev:
	@$(PYTHON) requirements/install.py dev

clean:
	rm -rf .venv runs data/phantom

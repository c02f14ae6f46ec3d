# Two commands matter: `make demo` and `make test`. Both set up .venv first and are quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check bench format clean

demo: $(STAMP)
	$(BIN)/haori demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check src tests tools benchmarks docs/recipes
	$(BIN)/ruff check src tests tools benchmarks docs/recipes
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_lengths.py
	$(BIN)/python tools/check_cycles.py

bench: $(STAMP)
	$(BIN)/python benchmarks/cli_start/run.py
	$(BIN)/python benchmarks/demo/run.py
	$(BIN)/python benchmarks/train_speed/run.py
	$(BIN)/python benchmarks/images_train/run.py
	$(BIN)/python benchmarks/methods/run.py
	$(BIN)/python benchmarks/length_scaling/run.py
	$(BIN)/python benchmarks/gpu_train/run.py
	$(BIN)/python benchmarks/quality/run.py
	$(BIN)/python benchmarks/classification/run.py
	$(BIN)/python benchmarks/library/run.py
	$(BIN)/python benchmarks/serving/run.py
	$(BIN)/python benchmarks/service/run.py

format: $(STAMP)
	$(BIN)/ruff format src tests tools benchmarks docs/recipes
	$(BIN)/ruff check --fix src tests tools benchmarks docs/recipes

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help setup demo benchmark perf test coverage slow lowest fuzz lint docs notebook wheel release clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*##/ {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BIN)/lssl ## virtual environment in .venv, with the tested versions

$(BIN)/lssl: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch --constraint constraints.txt
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@

demo: setup ## pretrain on procedural heads and show what was learned: minutes on two cores
	$(BIN)/lssl fit --config configs/demo.yaml

benchmark: setup ## three strategies against scratch on procedural heads, about three hours on two cores: table, figure and page in runs/benchmark/demo
	$(BIN)/lssl benchmark --config configs/benchmark/demo.yaml --jobs 2 --report

perf: setup ## the measurements of benchmarks/ that take minutes, one after the other: views, reading, steps, growth, whole runs, precision, processes, start
	for script in views reading pairs operations growth strategies published end_to_end precision processes start; do \
		OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench_$$script.py || exit 1; done

test: lint ## lint, types, and all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

coverage: lint ## as test, and the share of lines that it ran
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=term:skip-covered

slow: setup ## the slow tests
	$(BIN)/python -m pytest -m slow

lowest: ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct \
		--editable ".[hdf5,torchio,trajectories,wandb]" "pytest>=9" "pytest-xdist>=3.6" "hypothesis>=6.100"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

fuzz: setup ## damaged files, odd tables and odd settings, minutes; LSSL_FUZZ=2000 tries more of each
	OMP_NUM_THREADS=1 LSSL_FUZZ=$${LSSL_FUZZ:-200} $(BIN)/python -m pytest -n 2 --dist load tests/fuzz

lint: setup ## ruff, mypy and bandit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml lssl strategies datamodules

docs: setup ## this documentation as a site in build/site; a broken link or name ends it
	$(BIN)/pip install --quiet --editable ".[docs]" --constraint constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebook: setup ## runs docs/notebooks in place, with their outputs: minutes
	$(BIN)/pip install --quiet --editable ".[docs]" --constraint constraints.txt
	place=$$(mktemp -d) && cp docs/notebooks/*.ipynb $$place && \
		OMP_NUM_THREADS=1 $(BIN)/jupyter execute --inplace $$place/*.ipynb && cp $$place/*.ipynb docs/notebooks

wheel: ## builds sdist and wheel in dist/, and tries the wheel in an empty environment
	PYTHON=$(PYTHON) .ci/wheel

release: ## as wheel, of a tagged commit; refuses if version, changelog, citation and tag disagree
	$(PYTHON) .ci/check_release.py --tag HEAD
	PYTHON=$(PYTHON) .ci/wheel

clean: ## removes caches and build products, not runs
	rm -rf .coverage* .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path "./.venv/*" -prune -exec rm -rf {} +

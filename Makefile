# Two commands do everything from a fresh clone: `make bench` (the main job) and `make test`.
# Options for pytest go in ARGS: make bench ARGS="--mp-preset full"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# The run that README shows.
PICTURED := 20261127T134739Z-amd-epyc-04e5
BIN := $(VENV)/bin
comma := ,
# The extra `gpu` installs TensorFlow's CUDA libraries: gigabytes, so only if there is a driver.
EXTRAS := dev$(if $(shell command -v nvidia-smi 2>/dev/null),$(comma)gpu)
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
# Tests, unlike benchmarks, may run in parallel; those of one file share fixtures that are slow to make.
# --no-loadscope-reorder keeps the order of tests/conftest.py: what takes long begins first.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: bench test test-all torture lint types package docs docs-site pictures clean

bench: $(INSTALLED)
	$(BIN)/pytest bench/ --benchmark-only $(ARGS)

test: $(INSTALLED)
	$(BIN)/pytest $(TWO) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/pytest $(TWO) $(ARGS)

# Takes more than an hour; docs/reliability.md has its figures. For example: make torture ARGS="kills --kills 10 --seed 1"
torture: $(VENV)/.installed-fuzz
	PYTHONPATH=tests $(BIN)/python -m torture $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml docs/examples/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(BIN)/pytest -q -p no:cacheprovider tests/test_architecture.py

types: $(INSTALLED)
	$(BIN)/mypy

package: $(INSTALLED)
	VENV=$(VENV) .ci/package

docs: $(INSTALLED)
	$(BIN)/python -m mpscale.core.columns > docs/metrics.md

# Into build/site; any warning fails, a link that leads nowhere among them.
docs-site: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# README's pictures, from the run that it names; needs Chromium.
pictures: $(INSTALLED)
	$(BIN)/python docs/tools/pictures.py $(PICTURED)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]" --constraint constraints.txt
	touch $@

$(VENV)/.installed-docs $(VENV)/.installed-fuzz: $(VENV)/.installed-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[$*]" --constraint constraints.txt
	touch $@

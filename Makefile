# The first call of a target sets up all it needs: the virtual environment .venv with pinned packages, and the C++
# extension where there is a compiler. Later calls redo only what changed.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
EXTENSION := nwfast/_C.abi3.so
CPP := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo info test lint format bench wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: .venv/installed $(EXTENSION)  ## virtual environment, pinned packages, C++ extension

demo: setup  ## the chapter, then a year of flights; options as in make demo ARGS="--n 100000"
	$(BIN)/python -m nwfast demo $(ARGS)

info: setup  ## versions, what can run here and what cannot, and why
	$(BIN)/python -m nwfast info

test: lint  ## lint, the whole suite, the doctests and one run of every benchmark, untimed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/python -m pytest benchmarks --benchmark-disable -q

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: setup  ## the benchmarks, timed; then the comparison that the README reports
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)
	$(BIN)/python benchmarks/compare.py

wheel: setup  ## one wheel for all Pythons in dist/, audited for the stable ABI of Python and of torch
	rm -rf dist build/wheel
	NWFAST_EXT=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/python -m zipfile --extract dist/*.whl build/wheel
	$(BIN)/torch-abi-audit --check both build/wheel/nwfast

clean:  ## remove everything that was made, .venv included
	rm -rf .venv build dist demo-output *.egg-info nwfast/*.so .*_cache .hypothesis .benchmarks
	find nwfast tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

.venv/requirements: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("nwfast needs Python 3.10 or later, $(PYTHON) is " + sys.version.split()[0] \
	    if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Makes the package importable, and puts the command nwfast into .venv; the extension is built apart, in place.
.venv/installed: .venv/requirements pyproject.toml
	NWFAST_EXT=0 $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Where it is skipped there is no file, so that the next call tries again.
$(EXTENSION): .venv/requirements setup.py $(CPP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@test ! -e $@ || touch $@

# The first call of a target sets up all it needs: the virtual environment .venv with pinned packages, and the C++
# extension where there is a compiler. Later calls redo only what changed.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
STEP := .ci/step
# Python 3.11 brings one that takes 13 seconds longer, all of them of the processor, to see which files fit.
PIP := pip==26.3
EXTENSION := nwfast/_C.abi3.so
KERNELS := build/kernels/made
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Bytecode is kept, wherever it is not by default: else each of the many processes compiles all that torch imports.
export PYTHONDONTWRITEBYTECODE =

# What the machine with the GPU has: python with torch, pytest and a compiler. No .venv is made there.
GPU_PYTHON ?= python3
GPU_JOBS ?= 12
GPU_TESTS := $(addprefix tests/op/test_,functional.py properties.py ops.py compile.py nn.py validation.py) \
    $(addprefix tests/op/edges/test_,extremes.py zero_weights.py) \
    $(addprefix tests/backends/test_,reference.py dispatch.py constants.py)

.PHONY: help setup demo info test test-full fuzz lint style format bench wheel clean kernels gpu gpu-build gpu-test gpu-checks gpu-suite \
    gpu-bench report regression docs
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## virtual environment, pinned packages, C++ extension
	@$(MAKE) --no-print-directory --jobs 2 .venv/installed $(KERNELS) $(EXTENSION)

demo: setup  ## the chapter, a year of flights, a map; options as in make demo ARGS="--n 100000"
	$(BIN)/python -m nwfast demo $(ARGS)

info: setup  ## versions, what can run here and what cannot, and why
	$(BIN)/python -m nwfast info

# Threads that wait would take the cores from the other worker's.
test test-full: export OMP_WAIT_POLICY = passive
# Memory that a test frees stays with the process: to get it from the system anew is a tenth of the time of all tests.
test test-full: export MALLOC_TRIM_THRESHOLD_ = 1073741824
test test-full: export MALLOC_MMAP_THRESHOLD_ = 33554432

PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: style  ## lint, the suite, the doctests and one run of every benchmark, untimed
	$(PYTEST) -o testpaths='tests nwfast README.md benchmarks' --benchmark-disable $(ARGS)

test-full: test  ## make test, then its long studies: all instruction sets, GPU targets and planted errors
	$(PYTEST) -m full $(ARGS)

fuzz: setup  ## random input against an oracle in longer precision, as make fuzz ARGS="--minutes 10 --seed 7"
	$(BIN)/python tests/fuzz $(ARGS)

lint: style  ## ruff, mypy, clang-format
	$(BIN)/mypy

# Lint without mypy, which tests/tools/test_types.py runs beside other tests.
style: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup  ## rewrite the sources as lint wants them, and the header of constants
	$(BIN)/python csrc/common/write_constants.py
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

bench: setup .venv/peers  ## all benchmarks against all peers, 20 minutes: benchmarks/results/<machine>.json
	$(BIN)/python benchmarks/run.py $(ARGS)

report: setup  ## docs/benchmarks.md, figures and the README's tables from the results
	$(BIN)/python benchmarks/pages/report.py $(ARGS)

regression: setup .venv/peers  ## fails where we are 20 percent slower than committed, by ratios to the peers
	$(BIN)/python benchmarks/regression.py $(ARGS)

kernels: .venv/installed  ## what the GPU kernels take of a GPU, compiled without one; fails over budget
	$(BIN)/python tests/kernels.py

GPU_PARTS := gpu-build gpu-checks gpu-suite gpu-bench

# Every part runs, whatever the one before said; the status tells whether all were well.
gpu:  ## on a machine with a GPU: build, test, benchmark; or gpu-build, gpu-test (gpu-checks, gpu-suite), gpu-bench
	@failed=; for part in $(GPU_PARTS); do echo "== $$part"; $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	    done; if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed"; exit 1; fi

gpu-build gpu-checks gpu-suite gpu-bench: export PYTHONUNBUFFERED = 1

gpu-build:
	@$(GPU_PYTHON) -c 'import importlib.util, sys; importlib.util.find_spec("torch") or sys.exit("make gpu: " + \
	    sys.executable + " has no torch; GPU_PYTHON=... names another Python")'
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: torch finds no GPU (torch " + \
	    torch.__version__ + ", Python " + sys.version.split()[0] + "): nothing can be built for it, tested or timed")'
	NWFAST_EXT=1 $(GPU_PYTHON) setup.py --quiet build_ext --inplace
	$(GPU_PYTHON) -m nwfast info
	@$(GPU_PYTHON) -c 'import sys, nwfast; found = nwfast.backends.available(); \
	    sys.exit("".join(f"backend {name}: {found[name]}\n" for name in ("cuda", "triton") if found[name] is not True))'

gpu-test:
	@$(MAKE) --no-print-directory gpu GPU_PARTS='gpu-checks gpu-suite'

# What only a GPU shows. Large sizes take turns: they fill the device's memory.
gpu-checks:
	@failed=0; set -x; \
	$(GPU_PYTHON) -m pytest -q tests/gpu/test_large.py --backend cuda,triton $(ARGS) || failed=1; \
	$(GPU_PYTHON) -m pytest -q tests/gpu --ignore tests/gpu/test_large.py --backend cuda,triton $(GPU_XDIST) $(ARGS) || \
	    failed=1; exit $$failed

# The suite of the CPU on CUDA tensors, without what is not installed there.
gpu-suite:
	@$(GPU_PYTHON) -c 'import importlib.util as u; [print("not installed, left out:", name) for name in \
	    ("hypothesis", "xdist") if not u.find_spec(name)]'
	$(GPU_PYTHON) -m pytest -q $(GPU_TESTS) --backend cuda,triton --device cuda $(GPU_XDIST) $(ARGS)

GPU_XDIST = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo '-n $(GPU_JOBS)')

gpu-bench:
	$(GPU_PYTHON) benchmarks/gpu/run.py $(ARGS)

docs: setup  ## the site, with the examples run, no network needed: build/docs/index.html
	$(BIN)/python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

wheel: setup  ## one wheel for all Pythons in dist/, audited for the stable ABI of Python and of torch
	rm -rf dist build/wheel
	NWFAST_EXT=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/python -m zipfile --extract dist/*.whl build/wheel
	$(BIN)/torch-abi-audit --check both build/wheel/nwfast
	$(BIN)/auditwheel show dist/*.whl
	@echo "The tag is linux_x86_64, not manylinux: libtorch is that of the installed torch and is not put into the wheel, and"
	@echo "the newest symbols of libc named above set the oldest system. For an index build in a manylinux image, and rename by"
	@echo "auditwheel repair --exclude 'libtorch*' --exclude 'libc10*'."

clean:  ## remove everything that was made, .venv included
	rm -rf .venv build dist demo-output docs/gallery *.egg-info nwfast/*.so .*_cache .hypothesis .benchmarks
	find nwfast tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

# pip and the compiler work at the same time: on the kernels at once, on what includes torch's headers once torch is
# there, which comes first.
.venv/build: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit("nwfast needs Python 3.10 or later, $(PYTHON) is " + sys.version.split()[0] \
	    if sys.version_info < (3, 10) else 0)'
	@test -x $(BIN)/python || $(STEP) "making .venv" build/venv.log $(PYTHON) -m venv .venv
	-@$(STEP) "installing pip" build/pip.log $(BIN)/python -m pip install --no-compile "$(PIP)"
	@mkdir -p build; sed -n '/^torch==\|^numpy==/p; /^# build/,/^$$/p' requirements-dev.txt > build/requirements.txt
	@$(STEP) "installing torch" build/torch.log $(BIN)/python -m pip install --no-compile -r build/requirements.txt
	@touch $@

.venv/requirements: .venv/build
	@$(STEP) "installing what requirements-dev.txt lists" build/requirements.log \
	    $(BIN)/python -m pip install --no-compile -r requirements-dev.txt
	@touch $@

# The peers of the benchmarks; where one does not install, the rest is measured and the report says which is absent.
.venv/peers: .venv/requirements requirements-bench.txt
	$(BIN)/python -m pip install --quiet -r requirements-bench.txt || \
	    sed -n 's/^\([a-z][^#]*\)$$/\1/p' requirements-bench.txt | while read -r package; do \
	    $(BIN)/python -m pip install --quiet "$$package" || echo "not installed: $$package"; done
	@touch $@

# Makes the package importable, and puts the command nwfast into .venv; the extension is built apart, in place.
.venv/installed: .venv/requirements pyproject.toml
	@NWFAST_EXT=0 $(STEP) "installing nwfast, editable" build/editable.log \
	    $(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

$(KERNELS): csrc/cpu/isa/compile.py $(CPP)
	@$(STEP) "compiling the kernels" build/kernels.log $(PYTHON) csrc/cpu/isa/compile.py
	@mkdir -p $(@D); touch $@

# Where it is skipped there is no file, so that the next call tries again.
$(EXTENSION): .venv/build $(KERNELS) setup.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(STEP) "compiling the C++ extension" build/extension.log \
	    $(BIN)/python setup.py build_ext --inplace
	@test ! -e $@ || touch $@

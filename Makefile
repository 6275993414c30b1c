# `make demo` and `make test` need Python 3.10+ and a C++ compiler, nothing else.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc kernels cmake -type f 2>/dev/null)
BUILD_TOOLS := "scikit-build-core>=0.11" nanobind==3.1.0 "cmake>=3.27" ninja

# NumPy's BLAS threads would compete with the backend under test.
export OPENBLAS_NUM_THREADS = 1

.PHONY: help demo test test-long sanitize mutants bench build clean

help:
	@echo "make demo       a real model answers on paged K and V"
	@echo "make test       the tests"
	@echo "make test-long  the tests that take minutes or gigabytes"
	@echo "make sanitize   the C++ part under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make mutants    planted faults, each of which a test must see"
	@echo "make bench      the benchmarks; records go to benchmarks/results"
	@echo "make build      the virtual environment and the native module alone"

demo: build
	$(PY) examples/demo.py

test: build
	$(PY) -m pytest

test-long: build
	$(PY) -m pytest -m "long or not long"

sanitize: build
	$(PY) tests/sanitize.py

mutants: build
	cd tests && $(abspath $(PY)) -m mutants

bench: build
	$(PY) -m benchmarks

build: $(VENV)/.built

$(VENV)/.tools: pyproject.toml
	@echo "[1/2] virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(BUILD_TOOLS)
	$(PY) cmake/install_requirements.py
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	@echo "[2/2] native module"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --config-settings=editable.rebuild=false --editable .
	@touch $@

clean:
	rm -rf $(VENV) build

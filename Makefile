# A fresh machine needs Python 3.11 or newer and a C++ compiler; everything else is installed into $(VENV).
#   make demo    make demo DATA=folder    make test    make lint    make bench

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# PyPI's torch for Linux is the CUDA build of several GB; without an NVIDIA GPU the CPU build is taken, from here.
TORCH_CPU := --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi 2>/dev/null),,$(TORCH_CPU)))

# Test files that run at once: more than a few cores would each wait for the longest of them.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); echo $$((cores > 8 ? 8 : cores)))

NATIVE := setup.py CMakeLists.txt $(shell find csrc -type f)
INSTALLED := $(VENV)/.installed

# Idle OpenMP threads that spin slow a busy machine down tenfold; where nothing else runs it makes no difference.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test lint format bench clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

install: $(INSTALLED) ## a virtual environment in .venv with everything built and installed

demo: $(INSTALLED) ## zips two networks on real data; DATA=folder of mnist/ and fashion-mnist/ for full size
	$(BIN)/mtzip demo $(if $(DATA),--data "$(DATA)")

test: $(INSTALLED) ## the whole test suite, a file to a core at a time; ARGS=... goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(INSTALLED) ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(INSTALLED) ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: $(INSTALLED) ## every benchmark; ARGS=... goes to python -m bench
	env -u OMP_WAIT_POLICY $(BIN)/python -m bench $(ARGS)

clean: ## removes what was built and installed
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info *.so demo-output

$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or newer, found none; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH_INDEX) "$(TORCH)"
	touch $@

$(INSTALLED): $(VENV)/.torch pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --editable '.[demo,plot,onnx,docs,test,lint,bench]'
	touch $@

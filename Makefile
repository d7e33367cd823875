# make train: set up .venv and train a small PaLM on the Python standard library.
# make test:  set up .venv and run every check and test.
# Only Python >= 3.11 is needed; everything else comes from the package registry, at the versions of requirements.lock.

# The first of these that runs and is new enough; the lock is resolved for 3.11. PYTHON=/path/to/python overrides.
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
LOCK := requirements.lock
LOCK_DEV := requirements-dev.lock
LOCK_GPU := requirements-gpu.lock
# Not in the lock: its CPU build has another hash than the one that brings CUDA, and the oracles run on either.
TORCH := torch==2.13.0
UV := $(shell grep -oE '^uv==[0-9.]+' $(LOCK))

MODEL_DIR ?= runs/palm_stdlib
ARGS ?=
WORKERS ?= 2

# uv leaves packages without bytecode. Where this is set, every process would compile jax anew and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test lint lock clean
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/palmjax train gin/exp/palm_stdlib.gin --gin.MODEL_DIR=$(MODEL_DIR) $(ARGS)

# A process takes a file at a time, those with slow tests first (tests/conftest.py), not those with the most tests.
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# uv does not read pip's settings: the index is handed over.
USE_INDEX = index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}}; \
	test -z "$$index" || export UV_DEFAULT_INDEX="$$index";

# Done once, and again when what is installed would change.
define install
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "palmjax needs Python 3.11 or newer and found none: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(USE_INDEX) $(BIN)/uv pip install --python $(BIN)/python --require-hashes -r $(1) && \
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
endef

$(READY): $(LOCK) pyproject.toml
	$(call install,$(LOCK))
	@touch $@

# What the tests need besides: linters, the TPU compiler, transformers and torch as oracles. The GPU compiler lies apart:
# where jax can import its CUDA plugin, every program looks for a GPU and complains that there is none.
$(READY_DEV): $(LOCK) $(LOCK_DEV) $(LOCK_GPU) pyproject.toml
	$(call install,$(LOCK_DEV))
	$(USE_INDEX) $(BIN)/uv pip install --python $(BIN)/python --no-deps --target $(VENV)/gpu-compiler \
		--require-hashes -r $(LOCK_GPU)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@ $(READY)

# Resolves anew for Python 3.11 on Linux; pass ARGS=--upgrade to move to the newest versions.
COMPILE = $(BIN)/uv pip compile pyproject.toml --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' $(ARGS)
lock: $(READY_DEV)
	$(COMPILE) --extra build --output-file $(LOCK)
	$(COMPILE) --extra dev --constraint $(LOCK) --output-file $(LOCK_DEV)
	$(subst pyproject.toml,--group gpu-compiler --no-deps,$(COMPILE)) --output-file $(LOCK_GPU)

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis dist

# Each target sets up what it needs in $(VENV) on a bare machine; a second run skips the set-up.
#   make demo    real sentences through a sentence encoder, Mamba and Mamba-2, three ways
#   make test    everything CI runs: the fast suite, then the slow tests
#   make lint    ruff and pyright
#   make bench   the measured table, into docs/results/
# PYTHON: 3.11 or later. TORCH: the release to install. DEMO, BENCH, TESTS: more arguments.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# one process a core, of one thread each; a test that needs more threads sets them
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-fast test-slow lint bench compiler clean
.NOTPARALLEL:

demo: $(VENV)/.test compiler
	$(RUN) examples/demo.py $(DEMO)

test: test-fast test-slow

test-fast: $(VENV)/.test compiler
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/.test compiler
	$(PYTEST) -m slow $(TESTS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright --pythonpath $(RUN) effpass

bench: $(VENV)/.test compiler
	$(RUN) examples/benchmarks/compare.py $(BENCH)
	$(RUN) examples/benchmarks/readme_table.py

# torch goes first and by version, so that the extras cannot pull in another build of it.
$(VENV)/.torch-$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "effpass needs Python 3.11 or later; $(PYTHON) is older: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot make $(VENV); on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install --quiet "torch==$(TORCH)"
	@touch $@

$(VENV)/.test: $(VENV)/.torch-$(TORCH) pyproject.toml
	$(PIP) install --quiet "torch==$(TORCH)" -e ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --quiet "torch==$(TORCH)" -e ".[dev]"
	@touch $@

# torch.compile on a CPU needs a C++ compiler and Python's headers; effpass's kernels only the former.
compiler: $(VENV)/.torch-$(TORCH)
	@command -v "$${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || \
	  echo "warning: no C++ compiler, so torch.compile cannot use Inductor and effpass's kernels" \
	       "fall back to their slow references; install one (Debian: apt-get install g++)" >&2
	@$(RUN) -c 'import os, sysconfig as s; os.stat(os.path.join(s.get_paths()["include"], "Python.h"))' \
	  2>/dev/null || echo "warning: Python.h is missing, so Inductor cannot compile for a CPU;" \
	       "install Python's headers (Debian: apt-get install python3-dev)" >&2

clean:
	rm -rf $(VENV) build dist *.egg-info

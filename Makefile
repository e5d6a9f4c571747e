# make demo        real SGLang servers, with and without HiCache: the outputs must not differ (no GPU needed)
# make test        all tests; make test-fast: those that need neither SGLang nor a GPU, in 3 minutes
# make properties  property tests ROUNDS (5) times, with examples that differ each time
# make lint        ruff, mypy, and who may import whom
# make stress      five minutes of load on each backend, with real servers (no GPU needed; not part of make test)
# make tables      the tables of README.md and docs/ again from the saved runs that they name
# make versions    the SGLang releases this project supports, unpacked for the tests
# make clean       remove what was built, not .venv; make distclean: that too
#
# PYTHON=...  the Python to build .venv with      MODEL=...  serve this model on this machine's GPU (make demo)
# ARGS=...    more options for hicache-io demo, or for pytest      WORKERS=...  tests at a time (2)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

SGLANG := 0.5.23
SUPPORTED := 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23

# SGLang publishes wheels for CPython 3.11, 3.12 and 3.13 (0.5.23).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)

# Each imports SGLang: 2 to 4 GB of memory.
WORKERS ?= 2
ROUNDS ?= 5

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Every version that gets installed.
PINNED := $(PIP) install -c constraints.txt
STEP := .ci/step
# Packages of which SGLang and these tests import most, 100 MB of 600.
COMPILED := sglang/srt torch networkx timm matplotlib torchvision
# Everything else is compiled once, by whoever imports it first, and so are the unpacked releases.
export PYTHONDONTWRITEBYTECODE :=
SOURCES := io_backends policy bench tests

.PHONY: demo test ready test-fast properties lint stress tables versions clean distclean

demo: $(VENV)/.package
	$(BIN)/hicache-io demo --cache .demo $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# Servers one at a time: each wants the machine. 5 is pytest's word for no test, where ARGS names some.
test:
	@$(MAKE) --no-print-directory -j ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not server" $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m server $(ARGS) || [ $$? -eq 5 ]

# The releases are fetched while pip installs, which takes one core.
ready: $(VENV)/.test versions

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not sglang and not server and not gpu" $(ARGS)

# The examples of property tests are the same in each run but here.
properties: $(VENV)/.test versions
	for round in $$(seq $(ROUNDS)); do $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		-m "hypothesis and not gpu" --hypothesis-profile search -q $(ARGS) || exit 1; done

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python -m sglang_hicache.bench.lab.typecheck
	$(BIN)/python -m pytest -q tests/test_import_rules.py tests/test_imports_resolve.py tests/test_where_sglang_is_known.py

stress: $(VENV)/.test
	$(BIN)/python -m sglang_hicache.bench.stress.on_cpu_engine --out .stress $(ARGS)

tables: $(VENV)/.package
	$(BIN)/python -m sglang_hicache.bench.lab.documents

versions: $(SUPPORTED:%=.sglang-versions/%/.complete)

# The tests read these trees, and start a server of one; nothing of them is installed.
.sglang-versions/%/.complete: | $(BIN)/python
	@mkdir -p .sglang-versions
	@rm -rf .sglang-versions/$* .sglang-versions/$*.part
	@$(STEP) "downloading sglang $*" $(PIP) download -q --no-deps --dest .sglang-versions/$*.part sglang==$*
	@$(STEP) "unpacking sglang $*" $(BIN)/python -m zipfile -e .sglang-versions/$*.part/*.whl .sglang-versions/$*
	@rm -rf .sglang-versions/$*.part
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(STEP) "creating $(VENV) with $(PYTHON)" "$(PYTHON)" -m venv $(VENV)

# The version is in the stamp's name, and what is there already is not installed again.
$(VENV)/.sglang-$(SGLANG): | $(BIN)/python
	@if ! $(BIN)/python -c 'from importlib.metadata import version as v; exit(v("sglang") != "$(SGLANG)")' 2>/dev/null; then \
		$(STEP) "installing sglang $(SGLANG) (11 GB, some minutes)" $(PINNED) --no-compile sglang==$(SGLANG); fi
	@# pip compiles all of it, on one core. Some packages hold templates that are no Python: status 1.
	@$(STEP) "compiling what is imported" sh -c \
		'cd $(VENV)/lib/python3*/site-packages && "$(CURDIR)/$(BIN)/python" -m compileall -q -j 0 $(COMPILED) || true'
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.sglang-$(SGLANG)
	@$(STEP) "installing this package" $(PINNED) -q -e .
	@touch $@

# The package and what its tests need at once: another run of pip would resolve all of it again.
$(VENV)/.test: pyproject.toml $(VENV)/.sglang-$(SGLANG)
	@$(STEP) "installing this package and what its tests need" $(PINNED) -q -e '.[test]'
	@touch $(VENV)/.package $@

clean:
	rm -rf build dist .demo .whl .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .sglang-versions *.egg-info

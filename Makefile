# Two commands do everything: `make quickstart` runs the main job, `make test` passes the tests.
# Both make a virtual environment in .venv if there is none. Needs Linux, Python 3.11 or 3.12, a C++17 compiler.
#
#   make quickstart ARGS="--fractions 0,0.02 --out mine"
#   make test ARGS="-k mixture"

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name))))
VENV ?= .venv
ARGS ?=
# Test files at a time: each may start a few processes of its own.
JOBS ?= 2
LANE := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(LANE).txt
SOURCES := setup.py pyproject.toml $(wildcard csrc/src/* csrc/include/xalign/*) $(CONSTRAINTS)

.PHONY: quickstart test lint lanes install clean-venv
quickstart: $(VENV)/.installed
	$(VENV)/bin/xalign quickstart $(ARGS)

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The distributed tests with every installation: make lanes LANES=".venv/bin/python .venv312/bin/python". Without LANES
# it makes an environment for each supported Python that is there, .venv3.11 and .venv3.12.
VERSIONS := $(foreach version,3.11 3.12,$(if $(shell python$(version) -c 'print(1)' 2>/dev/null),$(version)))
lanes:
ifndef LANES
	$(foreach version,$(VERSIONS),$(MAKE) VENV=.venv$(version) PYTHON=python$(version) .venv$(version)/.installed-dev &&) true
endif
	OMP_NUM_THREADS=1 tests/run_lanes.sh $(or $(LANES),$(VERSIONS:%=.venv%/bin/python)) $(if $(ARGS),-- $(ARGS))

install: $(VENV)/.installed

$(CONSTRAINTS):
	@echo "xalign needs Python 3.11 or 3.12; '$(PYTHON)' is $(LANE)." \
	  "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1

$(VENV)/bin/python: | $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)

# PIP_CONSTRAINT (not -c) also pins what the isolated build of csrc/ uses.
$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	PIP_CONSTRAINT=$(CURDIR)/$(CONSTRAINTS) $(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[quickstart]'
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	PIP_CONSTRAINT=$(CURDIR)/$(CONSTRAINTS) $(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean-venv:
	rm -rf $(VENV)

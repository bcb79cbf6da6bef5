# make install | make demo | make test | make lint: each creates the virtual environment when it is missing.
PYTHON := $(shell for p in python3.11 python3.12 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
ifneq ($(wildcard ../shared/photos),)
export EXTRAHEAD_SHARED ?= $(abspath ../shared)
endif

.PHONY: install demo test slow faults lint

install: $(BIN)/installed ## the virtual environment alone

demo: $(BIN)/installed ## everything, on a small world that is drawn here, in float32
	dvc repro
	@pipeline evaluate
	@echo; echo "Try next (the report is data/evaluation/report.html):"
	@echo '  .venv/bin/pipeline search "a red circle"'
	@echo '  .venv/bin/pipeline look manifests/demo/world/images/01839.jpg "a blue ring" "a green triangle"'
	@echo '  .venv/bin/pipeline export model'

test: $(BIN)/installed ## offline, on the CPU: a process a core, each of one thread
	OMP_NUM_THREADS=1 pytest --numprocesses auto --maxprocesses 4 --dist loadfile

slow: $(BIN)/installed ## full-size models and the whole pipeline: tens of minutes
	pytest -m slow

faults: $(BIN)/installed ## kill, fill the disk, damage files, in many rounds
	pytest -m faults

lint: $(BIN)/installed
	ruff check
	ruff format --check
	ty check

$(BIN)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "This project needs Python 3.11 or 3.12 on the PATH (found: $$(python3 --version 2>&1))."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

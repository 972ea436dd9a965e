# Two commands: `make repro` runs the study, `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3.11
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Progress bars and DVC's own output need no analytics and no colours in a log.
export DVC_NO_ANALYTICS := 1

.PHONY: repro test lint params lock clean
repro: .venv/ready
	dvc repro

test: .venv/ready
	pytest

# Compose params.yaml from conf/, as `dvc exp run` does.
params: .venv/ready
	python -c 'from dvc.utils.hydra import compose_and_dump as c; c("params.yaml", "$(CURDIR)/conf", None, "config", "", [])'

lint: .venv/ready
	ruff check .
	ruff format --check .
	mypy

.venv/ready: requirements.lock pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	pip install --quiet -r requirements.lock
	pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Resolve the ranges of pyproject.toml anew, for every platform (needs uv).
lock:
	uv pip compile --universal --python-version 3.11 --extra dev --constraint constraints.txt --no-annotate \
	  --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv

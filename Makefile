# Two commands: `make repro` runs the default study (`make repro STUDY=cifar10` another one), `make test` runs the tests.
# Both set up .venv first.
# The first Python from 3.11 up that can make an environment: `make PYTHON=/a/python` names another.
ABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
  $$p -c '$(ABLE)' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# The stages of dvc.yaml call `utilized-rank` by its name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: repro verify test test-faults test-large test-networks test-gpu test-cluster test-oldest mutants bench language-model docs lint lock sbom audit dist clean
repro: .venv/ready
	$(if $(STUDY),$(BIN)/utilized-rank study $(STUDY))
	$(BIN)/utilized-rank check $(if $(STUDY),--study $(STUDY))
	$(BIN)/dvc repro $(patsubst %,reports/%/dvc.yaml,$(filter-out digits,$(STUDY)))

# Run a part of the default study anew and compare what it gives with what is committed: two minutes on two cores. Of
# another study, as `make verify STUDY=cifar10`, whatever ran here is compared, and nothing is run.
PART := prepare train@vgg11 measure@vgg11 decompose@vgg11
verify: .venv/ready
	$(if $(STUDY),,$(BIN)/utilized-rank check)
	$(if $(STUDY),,$(BIN)/dvc repro --force --single-item $(PART))
	$(BIN)/utilized-rank verify $(if $(STUDY),--study $(STUDY))

# Files of tests side by side, a thread each: most are too small for more.
test: export OMP_NUM_THREADS := 1
test: .venv/ready
	$(BIN)/pytest --cov -n logical --maxprocesses 4 --dist loadgroup

# Networks of timm and torchvision at their published width, cut to two blocks: minutes each.
test-large: .venv/ready
	$(BIN)/pytest -m large

# One network of each family that may be a user's own, at small size: a few minutes.
test-networks: .venv/ready
	$(BIN)/pytest -m networks

# What needs a GPU; torch, timm, pandas and pytest are enough: `python -m pytest --noconftest -m gpu tests/test_gpu.py`.
test-gpu: .venv/ready
	$(BIN)/pytest --noconftest -m gpu tests/test_gpu.py

# Work on a Ray cluster of two nodes on this machine, one of which is killed: a few minutes. Ray is installed for it alone.
test-cluster: .venv/ready
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements-cluster.lock
	$(BIN)/pytest -m cluster tests/test_cluster.py

# Kill every stage at random moments, fill a disk, damage files, ask for what cannot be: reports/reliability.md
# (under half an hour on two cores).
test-faults: export OMP_NUM_THREADS := 1
test-faults: .venv/ready
	$(BIN)/pytest -m "faults or told" -n 2 --dist loadgroup --junitxml=data/faults.xml
	$(BIN)/python tests/reliability.py data/faults.xml

# The same tests on the oldest versions that pyproject.toml allows, in .venv-oldest.
test-oldest: export PATH := $(CURDIR)/.venv-oldest/bin:$(PATH)
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/pytest

# Make small mistakes in the library and see whether its tests notice: reports/mutants.md (under an hour of one core). What
# survived is asked again, what was killed only where its file has changed; `make mutants SEED=1` makes other mistakes.
SAMPLE := 79
SEED := 0
mutants: .venv/ready .venv-mutants/ready
	.venv-mutants/bin/python tests/mutants.py $(BIN)/python $(SAMPLE) $(SEED)

# Measure what the package costs (about an hour on two cores); `make bench ONLY="search moments"` for some of it.
# Threads that wait spin briefly, as in the stages.
bench: .venv/ready
	GOMP_SPINCOUNT=3000 $(BIN)/python -m benchmarks $(ONLY)

# Train a small GPT on Python's own reference, measure it and make it smaller: reports/language_model/
# (23 minutes on one core that others used too; what was trained is kept in data/language_model/).
language-model: .venv/ready
	$(BIN)/python -m examples.language_model

# The guide and reference, into site/: its examples run, and a warning is an error (with --quiet mkdocs would count none).
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: requirements.lock constraints.txt
.venv-oldest/ready: requirements-oldest.lock constraints-oldest.txt
.venv/ready .venv-oldest/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 up that has venv: install python3.11 and python3.11-venv (or newer)."; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-deps --require-hashes -r $(filter %.lock,$^)
	$(@D)/bin/pip install --quiet -r $(filter %.txt,$^)
	$(@D)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The tool that makes mistakes needs nothing of the project, and the project nothing of it.
.venv-mutants/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet cosmic-ray==8.7.0
	touch $@

# Resolve the ranges of pyproject.toml anew, for every platform (needs uv): the newest versions, and the oldest. What torch
# needs for a GPU is locked, too; a build of torch that needs other files brings them when it is installed.
RESOLVE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
  --no-emit-package torch --no-emit-package torchvision --custom-compile-command "make lock" pyproject.toml
lock:
	$(RESOLVE) --extra dev --constraint constraints.txt --output-file requirements.lock
	$(RESOLVE) --extra dev --constraint constraints-oldest.txt --resolution lowest-direct --output-file requirements-oldest.lock
	$(RESOLVE) --extra cluster --constraint constraints.txt --constraint requirements.lock --output-file requirements-cluster.lock
	$(MAKE) sbom

# What is locked, as CycloneDX, beside the lock.
sbom:
	$(PYTHON) .ci/sbom.py > sbom.cdx.json

# Known vulnerabilities of what is locked. That the index of advisories is out of reach is said, and is no failure.
ADVISORIES := https://api.osv.dev/v1/query
AUDIT = $(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off \
  --vulnerability-service osv --osv-url $(ADVISORIES)
audit: .venv/ready
	@if $(BIN)/python -c 'from urllib.request import urlopen; \
	  urlopen("$(ADVISORIES)", b"{\"package\": {\"purl\": \"pkg:pypi/torch\"}}", 20)' 2>/dev/null; then \
	  $(AUDIT) -r requirements.lock && $(AUDIT) -r requirements-cluster.lock && $(AUDIT) -r constraints.txt; \
	else echo "Not audited: the index of advisories, $(ADVISORIES), is out of reach."; fi

# Build the wheel, and measure a network with it in an empty environment outside of the project (minutes: torch is installed).
dist: .venv/ready
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python tests/installed.py dist/*.whl

clean:
	rm -rf .venv .venv-oldest .venv-mutants dist site

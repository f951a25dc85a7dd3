# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs
# A line for each package as it comes; pip's exit code counts, not the filter's.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
CALMLY := | awk '/^Collecting/ {print "  " $$2; fflush()} /^Installing collected/ {print "  installing ..."; fflush()}'

.DEFAULT_GOAL := help
.PHONY: help install demo serve test chaos check docs ui peers browser clean

help: ## list what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | awk -F': *' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv with everything that jobs and tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt torch $(CALMLY)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' $(CALMLY)
	@touch $@

demo: install ## build the embedded data, train a small CLIP on it, evaluate and register it
	@$(BIN)/rayclip demo

serve: install ## serve what `make demo` trained, on 127.0.0.1:8000, with a page to try it
	@$(BIN)/rayclip serve serve_demo

REST := chaos or e2e or statistics

test: install peers browser ## run the tests, but for those of `make chaos`
	@$(BIN)/python -m pytest -n 2 --durations=20 -m "not ($(REST))"

chaos: install peers browser ## run the long tests: kills, nodes that come and go, the tutorial, statistics
	@$(BIN)/python -m pytest -n 2 --durations=20 -m "$(REST)"

check: install ## style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: $(DOCS) ## build the documentation into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	@echo "build/site/index.html  ($(BIN)/python -m http.server -d build/site shows it, with its search)"

$(DOCS): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

ui: install ## open MLflow over the embedded database, on 127.0.0.1:5000
	@$(BIN)/rayclip ui

peers: $(PEERS) ## add what benchmarks and parity tests compare with

# open_clip imports torchvision, which pins a torch of its own: neither may bring its dependencies along.
$(PEERS): $(STAMP) benchmarks/site/torchvision_without_operators.py
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps \
		open_clip_torch clip_benchmark torchvision timm webdataset braceexpand regex transformers
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		cp benchmarks/site/torchvision_without_operators.py "$$site" && \
		echo 'import torchvision_without_operators' > "$$site/torchvision_without_operators.pth"
	@$(BIN)/python -c 'import open_clip; from transformers import CLIPModel'
	@touch $@

# For the tests of the page. Debian's package, since a driver's own download needs more network than a package registry.
browser: ## install chromium where there is none
	@test -x /usr/bin/chromium || { echo "installing chromium ..."; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1; } \
		|| echo "no chromium: the tests of the page are skipped"

clean: ## remove the environment, data sets, runs and the MLflow store
	rm -rf $(VENV) build data runs mlflow .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

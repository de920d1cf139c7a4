# `make demo` and `make test` need nothing before them: they make a virtual environment in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := export calibration runtime benchmarks

.PHONY: demo test check lint types bench-peers clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/latentedge export-and-build examples/emoji -o emoji.bundle --precision fp32,fp16 --overwrite
	$(BIN)/latentedge generate emoji.bundle --prompts examples/emoji/prompts/demo.txt --sheet demo.png
	@echo "the contact sheet is $(CURDIR)/demo.png"

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow and not gpu and not aarch64"

check: lint types

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow setuptools' package-dir, so it is shown a folder of links with the import names.
types: $(VENV)/installed
	mkdir -p .types/latentedge
	for package in $(PACKAGES); do ln -sfn ../../$$package .types/latentedge/$$package; done
	$(BIN)/mypy $(foreach package,$(PACKAGES),-p latentedge.$(package))

clean:
	rm -rf .venv .types build dist *.egg-info

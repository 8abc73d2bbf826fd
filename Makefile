# Needs Python 3.10 or newer and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIST := worksteal
OLDEST := .venv-oldest

.PHONY: demo docs test test-all test-oldest bench lint clean

# Trains the embedded model for some minutes and leaves before_after.png and a LoRA in a new folder of runs/.
demo: $(VENV)/installed
	$(BIN)/draftune train --output runs/demo-$$(date +%Y%m%d-%H%M%S)

# Runs ruff, mypy, codespell and the tests that are not marked slow, full_size, gpu or network.
test: lint
	$(BIN)/python -m pytest -n 2 --dist $(DIST) -m "not slow and not gpu and not network and not full_size"

# Runs ruff, mypy, codespell and all tests but those marked full_size, gpu or network. OPTIONS are for pytest.
test-all: lint
	$(BIN)/python -m pytest -n 2 --dist $(DIST) $(OPTIONS)

# Runs the tests that are not marked slow with the oldest dependencies, on Python 3.10: make test-oldest PYTHON=python3.10.
test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist $(DIST) -m "not slow and not gpu and not network and not full_size"

# The SmolVLM of transformers 4 needs torchvision, the test client of starlette 0.46 httpx.
$(OLDEST)/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]' torchvision httpx
	touch $@

# Runs short versions of the CPU benchmarks in at most ten minutes, each figure beside the published one.
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Builds the site in site/. References are generated from the code, so the package is installed too.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/figures/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist runs site

# Two commands: `make demo` learns handwritten digits, `make test` checks the library.
# `make demo-detection` finds the digits in scenes, `make demo-segmentation` outlines them.
# Both make .venv first; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# Threads that wait by spinning slow everything down as soon as two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-detection demo-segmentation test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/linsight demo

# mmdet comes for it alone.
demo-detection: $(INSTALLED)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[det]'
	$(VENV)/bin/linsight demo detection

demo-segmentation: $(INSTALLED)
	$(VENV)/bin/linsight demo segmentation

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist worksteal --ignore tests/test_readme.py
	$(VENV)/bin/python -m pytest tests/test_readme.py  # one after the other, as a reader would

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "linsight needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build work_dirs *.egg-info

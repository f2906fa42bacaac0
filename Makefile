# `make demo` learns handwritten digits, `make test` checks the library.
# `make demo-detection` finds the digits in scenes, `make demo-segmentation` outlines them.
# Each of them makes .venv first; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
# What the demonstrations need, and what tests and development need besides.
LEARNS := $(VENV)/.learns
DETECTS := $(VENV)/.detects
INSTALLED := $(VENV)/.installed
UPSTREAM := .venv-upstream
PAGE := .venv-app
IMPORTS := build/imports/linsight

# Threads that wait by spinning slow everything down as soon as two processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-detection demo-segmentation test test-all test-app test-upstream lint docs clean

demo: $(LEARNS)
	$(VENV)/bin/linsight demo

demo-detection: $(DETECTS)
	$(VENV)/bin/linsight demo detection

demo-segmentation: $(LEARNS)
	$(VENV)/bin/linsight demo segmentation

# Files run in parallel, the tests of one file in its order: the README's build on one another.
# Kernels run in a second run, because Triton's interpreter is chosen when Triton is imported.
PYTEST = $(VENV)/bin/python -m pytest -n auto

test: $(INSTALLED)
	$(PYTEST) --dist loadfile --no-loadscope-reorder $(SLOW)
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(PYTEST) -m triton tests/kernels $(SLOW)

# With the tests that try at more sizes and models what `make test` tries at some.
test-all:
	$(MAKE) test SLOW=--slow

# `linsight app` in a real browser, which no package of Python's brings.
test-app: $(PAGE)/.installed
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ echo "make test-app needs Chromium or Chrome: apt install chromium" >&2; exit 1; }
	$(PAGE)/bin/python -m pytest tests/tools/test_app.py tests/app/in_browser.py

# Tests of detection on OpenMMLab's own packages, in place of the forks that linsight declares.
test-upstream: $(UPSTREAM)/.installed
	$(UPSTREAM)/bin/python -m pytest tests/detection tests/heads/test_backbone.py \
		tests/heads/test_checkpoint.py tests/data/test_coco.py tests/kernels/mmcv_operators

lint: $(INSTALLED) $(IMPORTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The documentation site; open build/site/index.html.
docs: $(INSTALLED)
	$(VENV)/bin/mkdocs build --strict

$(LEARNS): EXTRA := train
$(LEARNS): SIZE := 6 GB
$(DETECTS): EXTRA := det
$(DETECTS): SIZE := 6 GB
$(INSTALLED): EXTRA := dev
$(INSTALLED): SIZE := 7.5 GB

$(LEARNS) $(DETECTS) $(INSTALLED): pyproject.toml | $(IMPORTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "linsight needs Python 3.10 or newer, this is " + sys.version)'
	@echo "Installing linsight[$(EXTRA)] into $(VENV): on Linux about $(SIZE) on the disk, of which PyTorch"
	@echo "with CUDA is 5.3 GB, and some minutes. What is there already is not fetched again."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '.[$(EXTRA)]'
	touch $@

# An editable install finds the folders by an import hook, which type checkers and editors do not
# run; they follow these links.
$(IMPORTS): pyproject.toml
	mkdir -p $@
	ln -sfn $(addprefix ../../../,$(wildcard linsight/*) backbones configs data heads kernels tools) $@
	ln -sfn ../../command build/imports/linsight_command
	touch $@

# This environment is without linsight[det], whose forks have the same import names.
$(UPSTREAM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python -m pip install --disable-pip-version-check --editable . \
		mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 "setuptools<81" scikit-learn tensorboard pytest hypothesis
	touch $@

# Gradio holds other packages back, so the page has an environment of its own.
$(PAGE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(PAGE)
	$(PAGE)/bin/python -m pip install --disable-pip-version-check --editable '.[det,app]' \
		playwright pytest pytest-timeout hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(UPSTREAM) $(PAGE) build work_dirs *.egg-info

# On a fresh machine with Python >= 3.11 and nothing else, `make demo` and `make test` install what they need into
# .venv and run. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

DEMO_SIZE := 256
DEMO_EPOCHS := 40

# On a CPU, threads that spin while they wait take the cores from the loader.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all check opencv-reference clean

# Draw a small dataset, train a small network on it, measure it, and leave pictures of what it finds.
demo: $(INSTALLED)
	rm -rf runs/demo
	$(RUN) -m utils.scenes --output data/demo
	$(RUN) train.py --data data/demo/demo.data --cfg cfg/demo.cfg --img-size $(DEMO_SIZE) --epochs $(DEMO_EPOCHS) --name demo
	$(RUN) test.py --weights runs/demo/last.pt --noplots
	$(RUN) detect.py --weights runs/demo/last.pt --source data/demo/images/valid --output runs/demo/pictures
	@echo "Look at the pictures in runs/demo/pictures and at the charts in runs/demo"

# What every change must pass, in minutes.
test: check
	$(RUN) -m pytest -m "not slow" -n auto --dist loadfile

# Everything, however long it takes.
test-all: check
	$(RUN) -m pytest

# Format, lint and types.
check: $(INSTALLED)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy models

# What OpenCV 4 computes of the stock cfgs, for tests/test_opencv.py; its own environment, as OpenCV 5 reads no cfg.
opencv-reference: .opencv-venv/.installed
	.opencv-venv/bin/python -m tests.opencv_reference

.opencv-venv/.installed:
	$(PYTHON) -m venv .opencv-venv
	.opencv-venv/bin/python -m pip install "opencv-python-headless<5" numpy
	touch $@

# Remove what these commands made. Other runs, weights and data stay.
clean:
	rm -rf $(VENV) .opencv-venv tests/.opencv runs/demo data/demo .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Makefile: '$(PYTHON)' is not a Python >= 3.11 (name one: make PYTHON=python3.12 $(MAKECMDGOALS))" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

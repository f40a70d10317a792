# On a fresh machine with Python >= 3.11 and nothing else, `make demo` and `make test` install what they need into
# .venv and run. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

DEMO := runs/demo
DEMO_SIZE := 256
DEMO_EPOCHS := 20
DEMO_BATCH := 16

.PHONY: demo test test-all check clean

# Draw a small dataset, train a small network on it, measure it, and leave pictures of what it finds.
demo: $(INSTALLED)
	$(RUN) -m utils.scenes --output $(DEMO)/data
	$(RUN) train.py --data $(DEMO)/data/demo.data --cfg cfg/demo.cfg --img-size $(DEMO_SIZE) \
		--epochs $(DEMO_EPOCHS) --batch-size $(DEMO_BATCH) --name demo
	$(RUN) test.py --weights $(DEMO)/last.pt
	$(RUN) detect.py --weights $(DEMO)/last.pt --source $(DEMO)/data/images/valid --output $(DEMO)/pictures

# What every change must pass, in minutes.
test: check
	$(RUN) -m pytest -m "not slow"

# Everything, however long it takes.
test-all: check
	$(RUN) -m pytest

# Format, lint and types.
check: $(INSTALLED)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy models

# Remove what these commands made. Other runs, weights and data stay.
clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Makefile: '$(PYTHON)' is not a Python >= 3.11 (name one: make PYTHON=python3.12 $(MAKECMDGOALS))" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements-dev.txt
	touch $@

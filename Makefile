# make demo PAIR=tiny     the whole job on the embedded pair      make test       the tests, in .venv
# make lint types format  ruff, pyright                           make test-tl4   models against TransformerLens 4, without SAE-Lens, in .venv-tl4
SHELL  := /bin/bash
PYTHON ?= python3
PAIR   ?= tiny
VENV   := .venv
TL4    := .venv-tl4

.PHONY: demo test test-tl4 lint types format clean

demo: $(VENV)/.installed
	$(VENV)/bin/tl-crosscoder demo --pair $(PAIR)

# Two workers of one thread each; a file stays with one worker, so its fixtures are made once.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-tl4: $(TL4)/.installed
	OMP_NUM_THREADS=1 $(TL4)/bin/python -m pytest tests/models tests/hub/test_sae_lens_absent.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check

types: $(VENV)/.installed
	$(VENV)/bin/pyright

format: $(VENV)/.installed
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

clean:
	rm -rf $(VENV) $(TL4) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: pip then takes a CPU build where one is offered, and nothing later asks for another.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $$(grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[demo,nnsight,sae-lens,test]'
	touch $@

# sae-lens wants transformer-lens below 4, so TransformerLens 4 has an environment of its own.
$(TL4)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TL4)
	sed 's/^transformer-lens==.*/transformer-lens==4.3.0/' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python -m pip install $$(grep '^torch==' constraints.txt)
	$(TL4)/bin/python -m pip install -c $(TL4)/constraints.txt -e '.[demo,nnsight,test]'
	touch $@

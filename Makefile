# The workshop of bertnb. `make` lists what can be made.

PYTHON ?= python3
PORT ?= 8000
PY := .venv/bin/python
READY := .venv/ready
SOURCE := _build/source
HTML := _build/html
SPEED := book/runs/speed-cpu.json
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test notebooks package lint bench serve clean

help: ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

book: $(READY) ## execute every notebook afresh and render the book
	@echo "== 1/4 Is the package what the notebooks say?"
	@$(PY) tools/extract.py --check
	@echo "== 2/4 MathJax; the ledger: has each equation of the package a test? The results"
	@rm -rf $(SOURCE) $(HTML)
	@mkdir -p $(SOURCE)
	@$(PY) tools/vendor.py
	@cp -R _config.yml _toc.yml index.md book $(SOURCE)
	@$(PY) tools/ledger.py --into $(SOURCE)/book
	@$(PY) tools/results.py --into $(SOURCE)/book
	@echo "== 3/4 Executing the notebooks (some minutes)"
	@$(PY) tools/nb.py --into $(SOURCE)/notebooks
	@echo "== 4/4 Rendering, any warning is an error"
	@.venv/bin/jupyter-book build $(SOURCE) --path-output . -W -n --keep-going --all -q
	@echo "The book: $(HTML)/index.html (or \`make serve\`)"

test: $(READY) ## run every test, the notebooks' outputs included
	@$(PY) tests/run.py

notebooks: package ## the author's step: extract, execute, store the outputs
	@$(PY) tools/nb.py

package: $(READY) ## write bertnb/ from the notebooks
	@$(PY) tools/extract.py

lint: $(READY) ## check style, types and prose
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) tools/portable.py

bench: $(READY) ## time training beside transformers on this CPU (10 minutes)
	@rm -f $(SPEED)
	$(PY) benchmarks/roofline.py mini --record $(SPEED)
	$(PY) benchmarks/training_step.py mini --record $(SPEED)
	$(PY) benchmarks/training_step.py mini --compile --dropout 0 --record $(SPEED)
	$(PY) benchmarks/training_step.py small --rounds 6 --record $(SPEED)
	$(PY) benchmarks/training_step.py base --rounds 4 --record $(SPEED)
	$(PY) benchmarks/ladder.py mini --rounds 8 --record $(SPEED)
	$(PY) benchmarks/packing.py mini --rounds 4 --record $(SPEED)
	$(PY) benchmarks/data_pipeline.py --record $(SPEED)
	$(PY) benchmarks/training_step.py mini --curve 200 --length 64 --batch 2 --record $(SPEED)

serve: ## show the built book on http://localhost:8000
	@test -e $(HTML)/index.html || { echo "There is no book yet: \`make book\`"; exit 1; }
	@$(PYTHON) -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

clean: ## remove what was made, .venv excepted
	rm -rf _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bertnb needs Python 3.10 or later: make PYTHON=/path/to/python3 ..."; exit 1; }
	@echo "== Installing the book's environment into .venv (some minutes)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@# in the environment, the constraints bind what a build asks for, too: seqeval
	@# comes as source, and cannot be built with the latest setuptools-scm
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PY) -m pip install -e ".[test]"
	@touch $(READY)

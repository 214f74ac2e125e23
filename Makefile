# make demo   export the built-in demo checkpoint at retain ratio 0.2, verify it, draw a clip, ask about it
# make test   the quick tests            make slow   the long ones
# make test-integrations   those that make environments of their own: the wheel, lmms-eval, older transformers
# make lint   ruff and mypy              make clean  remove what was made; make distclean: .venv too
#
# Each sets up .venv first, once, and again when pyproject.toml or constraints.txt change.
# Needs Python 3.10 or newer with venv, and a package index: make PYTHON=python3.12 demo

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.installed
PACKAGES := earlytom engines export scripts

.PHONY: demo test slow test-integrations lint setup clean distclean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/earlytom-export --retain 0.2 --output build/demo --force
	@echo; echo "A clip, and the right answers:"
	$(BIN)/earlytom-clip build/demo.mp4 --index 1 --questions
	@echo; echo "What the demo says, and sees:"
	$(BIN)/earlytom-infer --bundle build/demo --video build/demo.mp4 --explain build/demo-kept.png \
	  --prompt "What colour does the diamond turn: yellow, purple, black or red?" \
	  --prompt "Which shape comes first: cross, diamond, circle or star?" --prompt "What happens in this video?"

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

test-integrations: $(STAMP)
	$(BIN)/python -m pytest -q -rs -m integration tests/integrations

lint: $(STAMP)
	$(BIN)/ruff check $(PACKAGES) tests
	$(BIN)/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

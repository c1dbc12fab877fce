# The verbs a person types.  Everything they make is below build/, which git ignores.
PYTHON ?= python3
VENV := build/venv
LINT := build/lint
DOCS := build/docs

.PHONY: demo test bench lint docs

# Builds and installs the package as a user would, and the reference, llama-cpp-python, from its source release.
# `pytest`, not `python -m pytest`: that would import the sources instead of what was installed.
test:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet 'pip>=23.1'
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" $(VENV)/bin/pip install --disable-pip-version-check \
	    --no-binary llama-cpp-python '.[test]'
	$(VENV)/bin/pytest

lint:
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install --disable-pip-version-check --quiet 'ruff==0.17.6' 'mypy==2.4.1' 'cython-lint==0.22.1' \
	    'import-linter==2.16' jinja2 llguidance numpy prompt_toolkit rich
	$(LINT)/bin/ruff check
	$(LINT)/bin/ruff format --check
	PATH="$(CURDIR)/$(LINT)/bin:$$PATH" cython-lint --max-line-length 120 pyggml_adapt/ggml
	$(LINT)/bin/mypy
	PYTHONPATH=. $(LINT)/bin/lint-imports

# The tiny models of examples/tiny, four tasks from one foundation, beside the same as separate files.
demo:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet 'pip>=23.1'
	$(VENV)/bin/pip install --disable-pip-version-check .
	$(VENV)/bin/python examples/tiny/demo.py

# About half an hour on two cores, which should have nothing else to do; BENCH=--quick takes two minutes.
bench:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet 'pip>=23.1'
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" $(VENV)/bin/pip install --disable-pip-version-check \
	    --no-binary llama-cpp-python '.[bench]'
	$(VENV)/bin/python benchmarks/run.py $(BENCH)

docs:
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --disable-pip-version-check --quiet 'mkdocs>=1.6,<2' 'mkdocs-material>=9.5,<10' \
	    'mkdocstrings[python]>=1.0,<2' ruff
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --site-dir build/site

# The verbs a person types.  Everything they make is below build/, which git ignores.
PYTHON ?= python3
VENV := build/venv
LINT := build/lint
DOCS := build/docs
ASAN := build/asan

.PHONY: demo test asan bench lint docs

# Builds and installs the package as a user would, and the reference, llama-cpp-python, from its source release.
# `pytest`, not `python -m pytest`: that would import the sources instead of what was installed.
test:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --quiet 'pip>=23.1'
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" $(VENV)/bin/pip install --disable-pip-version-check \
	    --no-binary llama-cpp-python '.[test]'
	$(VENV)/bin/pytest

# The ggml tests, and the fuzzes of its ops, its graphs and its owners, with ggml and the extension modules under
# AddressSanitizer and UBSan: in a venv and a build folder of their own.  The sanitizers' libraries must be loaded
# before Python, and Python's own leaks are none of ours; libstdc++ is there so that exceptions find the sanitizer.
# ggml itself shifts into the sign bit, and reads enums from files before it checks them: these two are not looked
# for.  The sanitizer keeps freed memory, writes of refused allocations on stderr, and bears no limit of its address
# space: some tests look at just that.
# CASES and PROGRAMS are how many the fuzzes have.
CASES ?= 20000
PROGRAMS ?= 300
SANITIZERS = $(foreach lib,libasan.so libubsan.so libstdc++.so.6,$(shell $(CC) -print-file-name=$(lib)))
SANITIZED = LD_PRELOAD="$(SANITIZERS)" PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

asan:
	$(PYTHON) -m venv $(ASAN)/venv
	$(ASAN)/venv/bin/pip install --disable-pip-version-check --quiet 'pip>=23.1' 'pytest>=8'
	CFLAGS='-O1 -g -DNDEBUG -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=shift,enum' \
	CXXFLAGS='-O1 -g -DNDEBUG -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=shift,enum' \
	    $(ASAN)/venv/bin/pip install --disable-pip-version-check -Cbuild-dir=$(ASAN)/cmake \
	    -Ccmake.build-type=None -Cinstall.strip=false .
	$(SANITIZED) $(ASAN)/venv/bin/pytest tests/ggml -m 'not slow' $(foreach needs_more,stubs quants_equal limits,\
	    --ignore=tests/ggml/test_$(needs_more).py) --deselect tests/ggml/test_context.py::test_memory_stays_flat \
	    --deselect tests/ggml/test_status.py::test_nothing_on_stderr_by_default
	$(SANITIZED) $(ASAN)/venv/bin/python tests/ggml/fuzz_ops.py --cases $(CASES)
	$(SANITIZED) $(ASAN)/venv/bin/python tests/ggml/fuzz_graphs.py --graphs $(PROGRAMS)
	$(SANITIZED) $(ASAN)/venv/bin/python tests/ggml/fuzz_life.py --programs $(PROGRAMS)

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

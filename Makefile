PY := .venv/bin/python
PY_JAX := .venv-jax/bin/python
QUICK := tests/test_array.py tests/test_dialects.py tests/test_identity.py tests/test_layer_messages.py tests/test_memory.py \
	tests/test_reference.py tests/test_spec.py tests/test_threads.py

# a file's tests in one process, since they share what takes long to make
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

PYTHON ?= python3

.PHONY: atlas conform coverage environments fuzz gpu lint quick soak test test-jax versions

conform: environments
	.venv/bin/multibn conform --python $(PY_JAX)
	.venv/bin/multibn conform --ranks 3

environments:  # both at the same time
	$(MAKE) -j2 .venv/ready .venv-jax/ready

atlas: .venv/ready
	$(PY) -m multibn_conformance.atlas.make

test: .venv/ready .venv-jax/ready
	$(MAKE) -j2 lint test-jax
	$(PY) -m pytest $(IN_PARALLEL)

coverage: .venv/ready  # the tests again, in 1.6 times the time, with the lines that none runs
	$(PY) -m pytest $(IN_PARALLEL) --cov --cov-report=term-missing:skip-covered

test-jax: .venv-jax/ready  # JAX needs NumPy 2, MXNet NumPy 1
	$(PY_JAX) -m pytest -n auto tests/with_jax 'tests/test_docs.py::test_the_blocks_of_a_page[docs/jax.md]'

quick: .venv/ready  # in under a minute: lint of what changed, the quick cases, the tests that need no framework and no process
	files=$$(git diff --name-only --diff-filter=d HEAD -- '*.py'; git ls-files -o --exclude-standard '*.py'); \
	test -z "$$files" || { .venv/bin/ruff check $$files && .venv/bin/ruff format --check $$files; }
	.venv/bin/lint-imports --no-logo
	.venv/bin/multibn conform --quick
	$(PY) -m pytest -q -n auto -p no:cacheprovider $(QUICK)

versions: .venv/ready  # with other versions, see noxfile.py, two sessions at once; on pyenv's Pythons too
	export PATH="$$PATH:$$(echo $$HOME/.pyenv/versions/3.1*/bin | tr ' ' ':')"; unset CI; \
	sessions=$$(.venv/bin/nox --list --json | grep -o '"session": "[^"]*"' | cut -d '"' -f 4); \
	test -n "$$sessions" && echo "$$sessions" | xargs -n 1 -P 2 .venv/bin/nox --session

gpu:  # on a machine with a GPU, PyTorch and NumPy; nothing is installed or fetched
	timeout 240 $(PYTHON) tests/gpu_check.py build/gpu.json

soak: .venv/ready  # ten minutes of random programs in threads, forks and processes; not in CI
	$(PY) tests/soak.py 600

fuzz: .venv/ready  # damaged checkpoints, about a minute
	$(PY) tests/fuzz_port.py 100000

docs/report.png: .venv/ready  # the picture in the README; needs chromium
	mkdir -p build
	.venv/bin/multibn conform --html build/report.html
	$(PY) docs/screenshot.py build/report.html

docs/article.png: .venv/ready  # another; trains networks for some minutes
	mkdir -p build
	.venv/bin/multibn article --out build/article.html
	$(PY) docs/article_screenshot.py build/article.html

docs/trust.md: .venv/ready  # what came of wrong arguments, damaged files and random programs; about half an hour
	$(PY) docs/make_trust.py 600

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy tests
	.venv/bin/lint-imports

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-jax/ready: pyproject.toml constraints-jax.txt
	test -x $(PY_JAX) || python3 -m venv .venv-jax
	$(PY_JAX) -m pip install --disable-pip-version-check -q -c constraints-jax.txt -e '.[dev-jax]'
	touch $@

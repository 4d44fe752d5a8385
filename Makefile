PY := .venv/bin/python

.PHONY: conform test lint atlas

conform: .venv/ready
	.venv/bin/multibn conform

atlas: .venv/ready
	$(PY) -m multibn_conformance.atlas.make

test: .venv/ready lint
	$(PY) -m pytest -n auto --cov --cov-report=term-missing:skip-covered

docs/report.png: .venv/ready  # the picture in the README; needs chromium
	mkdir -p build
	.venv/bin/multibn conform --html build/report.html
	$(PY) docs/screenshot.py build/report.html

docs/article.png: .venv/ready  # another; trains networks for some minutes
	mkdir -p build
	.venv/bin/multibn article --out build/article.html
	$(PY) docs/article_screenshot.py build/article.html

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy tests

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

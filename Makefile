PY := .venv/bin/python

.PHONY: conform test lint

conform: .venv/ready
	.venv/bin/multibn conform

test: .venv/ready lint
	$(PY) -m pytest --cov --cov-report=term-missing:skip-covered

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy tests

.venv/ready: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

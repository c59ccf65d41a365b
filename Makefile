# `make` without arguments lists the targets.

.PHONY: help dev test lint docs gallery dist

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

dev: ## everything a developer needs, into the active virtual environment
	pip install -e ".[dev,docs]"

test: ## the whole suite, in a few minutes
	OMP_NUM_THREADS=1 python -m pytest -n 2

lint: ## style, format and types
	ruff check .
	ruff format --check .
	copy=$$(mktemp -d) && pip install -q --no-deps --target $$copy . \
	&& (cd $$copy && mypy --config-file $(CURDIR)/pyproject.toml -p lightning_curv) && rm -r $$copy

docs: ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

gallery: ## the pictures of the documentation, anew (the dashboard needs Chromium)
	python docs/make_concepts.py
	python docs/make_gallery.py
	python docs/make_dashboard.py

dist: ## wheel and source distribution, into dist/
	python -m build

# `make` without arguments lists the targets.

.PHONY: help dev test lint types docs density nightly gallery dist

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Strict: a folder of links, which type checkers and editors can read. To be repeated after a file was added or moved.
dev: ## everything a developer needs, into the active virtual environment
	pip install -e ".[dev,docs]" --config-settings editable_mode=strict
	pip install --no-deps -r .ci/peers.txt

test: ## the whole suite, in a few minutes
	OMP_NUM_THREADS=1 python -m pytest -n 2

lint: ## style and format
	ruff check .
	ruff format --check .

# On an installed copy, which holds no matter how, and whether, the package is installed here.
types: ## mypy, strict
	rm -rf build/lib build/bdist.*
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy" build/lib build/bdist.*' EXIT \
	&& pip install --quiet --no-deps --target "$$copy" . \
	&& (cd "$$copy" && mypy --config-file $(CURDIR)/pyproject.toml -p lightning_curv)

docs: ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

density: ## how dense the source is, room by room
	python benchmarks/density.py

nightly: ## searches that take hours: samples that change a private step too much, quantities that are wrong
	OMP_NUM_THREADS=1 python benchmarks/sensitivity.py --cases 2000 --seed $$(date +%Y%m%d)
	OMP_NUM_THREADS=1 python benchmarks/models.py --out models.json
	OMP_NUM_THREADS=1 python benchmarks/fuzz.py --cases 2000 --first $$(date +%Y%m%d)

gallery: ## the pictures of the documentation, anew (dashboard and report need Chromium)
	python docs/make_concepts.py
	python docs/make_gallery.py
	python docs/make_dashboard.py
	python docs/make_report.py

dist: ## wheel and source distribution, into dist/
	python -m build

"""Packages that only some tests need."""

import importlib
import os

import pytest


def needs(name):
    """The module `name`. Without it the tests are skipped, with the reason; in CI, which installs it, they fail."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)

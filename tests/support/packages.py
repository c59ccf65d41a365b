"""Packages that only some tests need."""

import importlib
import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def needs(name):
    """The module `name`. Without it the tests are skipped, with the reason; in CI, which installs it, they fail."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)


def needs_compiler():
    """A C++ compiler. Without one the test is skipped, with the reason; in CI it fails.

    Where CI cannot have one, it says so, and `WITHOUT_COMPILER`.
    """
    if shutil.which("c++") is not None:
        return
    reason = "no compiler: no command c++"
    if os.environ.get("CI") == "true" and os.environ.get("WITHOUT_COMPILER") != "true":
        pytest.fail(reason)
    pytest.skip(reason)


def needs_browser():
    """The path of a Chromium. Without one the test is skipped, with the reason; in CI it fails.

    Where CI cannot have one, it says so, and `WITHOUT_BROWSER`.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is not None:
        return found
    reason = f"no browser: none of {', '.join(BROWSERS)}"
    if os.environ.get("CI") == "true" and os.environ.get("WITHOUT_BROWSER") != "true":
        pytest.fail(reason)
    pytest.skip(reason)

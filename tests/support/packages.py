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


def needs_command(*names):
    """Commands of the system. Without one the test is skipped, with the reason; in CI it fails."""
    for name in names:
        if shutil.which(name) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"no command {name}")
            pytest.skip(f"no command {name}")


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

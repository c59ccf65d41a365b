import importlib
import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)
if device := os.environ.get("CURV_TEST_DEVICE"):
    torch.set_default_device(device)  # tables of tests make tensors when they are imported


def needs(name):
    """The module `name`. Without it the tests are skipped, with the reason; in CI, which installs it, they fail."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture(autouse=True)
def _seeded_float32():
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

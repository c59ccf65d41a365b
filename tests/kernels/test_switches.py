"""The environment switches the tricks for speed off, one by one or all together."""

import subprocess
import sys

import pytest
import torch

from lightning_curv.kernels import huge_pages, onednn, switches

CHECK = """
import sys, torch
import lightning_curv
from lightning_curv import BatchGrad, curvature
from lightning_curv.kernels import huge_pages, onednn
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
x, y = torch.randn(64, 300), torch.arange(64) % 10
with curvature(BatchGrad()):
    torch.nn.functional.cross_entropy(net(x), y).backward()
print(huge_pages._madvise() is not None, onednn._onednn() is not None)
torch.save([p.grad_batch for p in net.parameters()], sys.argv[1])
"""


@pytest.fixture
def unread(monkeypatch):
    """The environment has not been read yet, and will be read again after the test."""
    caches = (switches.enabled, huge_pages._madvise, onednn._onednn)
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("", {"huge_pages", "onednn"}),
        ("plain", set()),
        ("onednn", {"onednn"}),
        ("huge_pages", {"huge_pages"}),
        ("onednn, huge_pages", {"huge_pages", "onednn"}),
    ],
)
def test_kernels_are_on_that_the_environment_names(unread, value, on):
    unread.setenv(switches.VARIABLE, value)
    assert {kernel for kernel in switches.KERNELS if switches.enabled(kernel)} == on
    if "huge_pages" not in on:
        assert huge_pages._madvise() is None
    if "onednn" not in on:
        assert onednn._onednn() is None


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_onednn_is_left_alone_where_mkl_is_as_fast(unread, vendor, capability):
    """On its maker's processors, and on those whose vectors are no wider than MKL uses elsewhere."""
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without one of both libraries")
    described = f"processor\t: 0\nvendor_id\t: {vendor}\n\nprocessor\t: 1\n"
    unread.setattr(onednn.Path, "read_text", lambda path: described)
    unread.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    by_default = (vendor, capability) == ("AuthenticAMD", "AVX512")
    for value, used in (("", by_default), ("onednn", True)):
        unread.setenv(switches.VARIABLE, value)
        for cached in (switches.enabled, onednn._onednn):
            cached.cache_clear()
        assert (onednn._onednn() is not None) == used


def test_unknown_kernels_are_refused(unread):
    unread.setenv(switches.VARIABLE, "mkl")
    with pytest.raises(ValueError, match="found 'mkl'"):
        switches.enabled("onednn")


def test_results_are_the_same_without_them(tmp_path, monkeypatch):
    found = []
    for value in ("", "plain"):
        monkeypatch.setenv(switches.VARIABLE, value)
        path = tmp_path / f"{value or 'all'}.pt"
        out = subprocess.run(
            [sys.executable, "-c", CHECK, str(path)], capture_output=True, text=True, check=True
        ).stdout
        assert value == "" or out.split() == ["False", "False"]
        found.append(torch.load(path))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)

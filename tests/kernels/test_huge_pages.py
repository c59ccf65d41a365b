"""Large results are in memory that the system was asked to back with huge pages."""

import pytest
import torch
from torch import nn

from lightning_curv import BatchDiagGGNMC, BatchGrad, SqrtGGNMC, curvature
from lightning_curv.kernels import huge_pages

ADVISED = 14  # MADV_HUGEPAGE of <sys/mman.h>


@pytest.fixture
def asked(monkeypatch):
    """The ranges of memory that advice was given for, ``[start, stop)``."""
    ranges = []

    def advise(start, length, advice):
        assert advice == ADVISED
        assert start % 4096 == 0
        ranges.append((start, start + length))
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: advise)
    return ranges


def covered(tensor, ranges):
    return any(a <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= b for a, b in ranges)


def test_a_large_tensor_is_covered_from_its_first_to_its_last_byte(asked):
    tensor = huge_pages.empty(torch.zeros(1, dtype=torch.float64), 3, 2**18)
    assert tensor.shape == (3, 2**18)
    assert tensor.dtype == torch.float64
    assert covered(tensor, asked)
    assert len(asked) == 1


def test_small_and_very_large_tensors_are_left_alone(asked):
    huge_pages.empty(torch.zeros(1), huge_pages.LARGE // 4 - 1)
    huge_pages.empty(torch.zeros(1), huge_pages.LARGEST // 4 + 1)
    huge_pages.empty(torch.zeros(1, device="meta"), huge_pages.LARGE)
    assert not asked


@pytest.mark.parametrize("found", [None, lambda *_: -1])
def test_nothing_changes_where_the_system_has_no_such_call_or_refuses(monkeypatch, found):
    monkeypatch.setattr(huge_pages, "_madvise", lambda: found)
    assert huge_pages.empty(torch.zeros(1), 2**21).fill_(1.0).sum() == 2**21


@pytest.mark.parametrize("size", [0, 3, 1500])
def test_products_and_stacks(size):
    a, b = torch.rand(2, size, 1), torch.rand(2, 1, size)
    assert huge_pages.multiply(a, b).equal(a * b)
    assert huge_pages.bmm(a, b).equal(a @ b)
    assert huge_pages.stack([a, 2 * a]).equal(torch.stack([a, 2 * a]))


@pytest.mark.parametrize("extension", [BatchGrad(), SqrtGGNMC(), BatchDiagGGNMC()])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(1024, 600), (2, 1024)),
        (nn.Linear(512, 512), (5, 3, 512)),
        (nn.Conv2d(64, 64, 5), (12, 64, 6, 6)),
    ],
)
def test_per_sample_quantities_are_in_such_memory(asked, extension, layer, size):
    with curvature(extension):
        output = layer(torch.rand(size))
        nn.functional.mse_loss(output, torch.zeros_like(output)).backward()
    assert covered(getattr(layer.weight, extension.savefield), asked)


@pytest.mark.parametrize("size", [3, 1500])
def test_products_are_differentiated(size):
    a, b = torch.rand(2, size, 1), torch.rand(2, 1, size)
    for product in (huge_pages.multiply, huge_pages.bmm):
        _, derivative = torch.func.jvp(lambda a, product=product: product(a, b), (a,), (2 * a,))
        assert derivative.equal(2 * a * b)

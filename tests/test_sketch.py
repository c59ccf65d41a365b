"""Quantiles of samples that are spread over processes."""

import pytest
import torch

from lightning_curv.callbacks.sketch import SIZE, pooled, quantiles, shared_sketch

LEVELS = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)


def of_processes(*samples):
    world = len(samples)
    return pooled(sum(shared_sketch(values, rank, world) for rank, values in enumerate(samples)))


def test_up_to_the_size_nothing_is_lost():
    samples = [torch.randn(size, dtype=torch.float64) for size in (SIZE, 3, 1, 0, 40)]
    values, weights = of_processes(*samples)
    assert torch.equal(values, torch.cat(samples).sort().values)
    assert torch.equal(weights, torch.ones_like(values))
    torch.testing.assert_close(quantiles(values, weights, LEVELS), torch.cat(samples).quantile(LEVELS))


def test_more_samples_than_are_sent():
    """The ranks of the quantiles are right to a fraction of the distance of two order statistics."""
    samples = [torch.randn(size, dtype=torch.float64).exp() for size in (2000, 500, 100)]
    values, weights = of_processes(*samples)
    together = torch.cat(samples)
    assert weights.sum() == pytest.approx(len(together))
    for level, quantile in zip(LEVELS.tolist(), quantiles(values, weights, LEVELS)):
        assert abs((together <= quantile).double().mean().item() - level) < 2 / SIZE
    assert values[-1] == together.max()
    assert values[0] == together.min()


def test_no_samples_have_no_quantiles():
    assert quantiles(*of_processes(torch.zeros(0)), LEVELS.float()).isnan().all()


def test_a_process_that_failed_gives_nothing():
    rows = shared_sketch(torch.ones(3), 0, 2) + torch.full((2, 1 + SIZE), torch.nan)
    assert quantiles(*pooled(rows), LEVELS.float()).isnan().all()

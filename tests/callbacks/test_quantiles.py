"""Quantiles of samples that are spread over processes."""

import numpy as np
import pytest
import torch

from lightning_curv.callbacks.monitoring.quantiles import SIZE, pooled, quantiles, shared_sketch

LEVELS = [0.0, 0.05, 0.5, 0.95, 1.0]


def of_processes(*samples):
    world = len(samples)
    rows = sum(shared_sketch(values, rank, world) for rank, values in enumerate(samples))
    return tuple(part.numpy() for part in pooled(rows))


def test_up_to_the_size_nothing_is_lost():
    samples = [torch.randn(size, dtype=torch.float64) for size in (SIZE, 3, 1, 0, 40)]
    values, weights = of_processes(*samples)
    together = torch.cat(samples).numpy()
    assert (values == np.sort(together)).all()
    assert (weights == 1).all()
    np.testing.assert_allclose(
        quantiles(values, weights, LEVELS), np.quantile(together, LEVELS), rtol=1e-12
    )


def test_more_samples_than_are_sent():
    """The ranks of the quantiles are right to a fraction of the distance of two order statistics."""
    samples = [torch.randn(size, dtype=torch.float64).exp() for size in (2000, 500, 100)]
    values, weights = of_processes(*samples)
    together = torch.cat(samples)
    assert weights.sum() == pytest.approx(len(together))
    for level, quantile in zip(LEVELS, quantiles(values, weights, LEVELS)):
        assert abs((together <= quantile).double().mean().item() - level) < 2 / SIZE
    assert values[-1] == together.max()
    assert values[0] == together.min()


def test_no_samples_have_no_quantiles():
    assert np.isnan(quantiles(*of_processes(torch.zeros(0)), LEVELS)).all()


def test_a_process_that_failed_gives_nothing():
    rows = shared_sketch(torch.ones(3), 0, 2) + torch.full((2, 1 + SIZE), torch.nan)
    values, weights = pooled(rows)
    assert np.isnan(quantiles(values.numpy(), weights.numpy(), LEVELS)).all()

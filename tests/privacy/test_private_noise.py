"""Noise of private steps: it is Gaussian, drawn by its own generator, and gives no bits of the sum away."""

import math
import os

import numpy as np
import pytest
import torch

from lightning_curv.optimizers.privacy.gaussian import BOXES, RoundedGaussian
from lightning_curv.optimizers.privacy.noise import NoiseSource
from lightning_curv.optimizers.privacy.noisy_sum import grid, summed_over_ranks


def released(total, std, **settings):
    return summed_over_ranks([total], [std], NoiseSource(**settings))[0]


def normal(count, **settings):
    drawn = NoiseSource(**settings).rounded([count // 2, count - count // 2], 1.5 * 2**34)
    return torch.cat([numbers / (1.5 * 2**34) for numbers in drawn])


def phi(x):
    """The share of normal numbers below x."""
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("settings", [{}, {"secure": True}], ids=["library", "system"])
def test_noise_is_standard_normal(settings):
    z = normal(200_001, **settings)
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs(z.pow(moment).mean() - expected) < 0.12
    assert (
        phi(z.sort().values) - torch.linspace(0, 1, len(z))
    ).abs().max() < 0.005  # Kolmogorov; 0.005 √N = 2.2
    for distance in (1, 2, 100_000):  # numbers are independent
        pairs = torch.stack([z[:-distance], z[distance:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.015
        assert abs(torch.corrcoef(pairs.square())[0, 1]) < 0.015


DEVIATIONS = [2.0**34, 1.3 * 2**34, 2.0**35 - 1]


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_table_and_rest_are_the_normal_distribution(deviation):
    """Every bar is its share of the table plus what rejection finds between the table and the density."""
    gaussian = RoundedGaussian(deviation)
    numbers = torch.arange(-gaussian.side, gaussian.side + 1, dtype=torch.float64) * gaussian.width
    edges = numbers / deviation
    assert len(gaussian._table) == len(gaussian._proposals) == 2**16
    bars = (gaussian._table.long() + 2 * gaussian.side) // 2  # from middles in halves of a width
    found = bars.bincount(minlength=2 * gaussian.side).double() / 2**16 * gaussian.share
    taken, heights = torch.from_numpy(gaussian._taken), torch.from_numpy(gaussian._heights)
    assert (found.repeat_interleave(BOXES) - BOXES * taken).abs().max() < 1e-16
    rest = phi(edges[1:]) - phi(edges[:-1]) - found
    assert float(rest.sum() + 2 * phi(edges[0])) == pytest.approx(1 - gaussian.share, rel=1e-12)
    assert 0.98 < gaussian.share < 1
    # nowhere is the density lower than the table, or higher than the box above it from which
    # proposals come
    sides = BOXES * gaussian.side
    numbers = torch.arange(-sides, sides + 1, dtype=torch.float64) * gaussian.width / BOXES
    edges = numbers / deviation
    density = (
        (-edges.square() / 2).exp() / math.sqrt(2 * math.pi) * (numbers[1] - numbers[0]) / deviation
    )
    lowest, highest = (
        torch.minimum(density[:-1], density[1:]),
        torch.maximum(density[:-1], density[1:]),
    )
    assert (lowest - taken).min() > -1e-15
    assert (taken + heights[:-1] - highest).min() > -1e-15
    proposed = torch.from_numpy(gaussian._proposals).long().bincount() / 2**16
    assert (proposed / heights).std() < 1e-6 * (proposed / heights).mean()


def chi_squared(found, shares):
    """The deviation of the statistic of Pearson's test from its mean, in standard deviations."""
    expected = shares * found.sum()
    free = len(found) - 1
    return float(((found - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_rejection_finds_the_density_above_the_table(deviation):
    gaussian = RoundedGaussian(deviation)
    z = torch.from_numpy(gaussian._rest(2**19, os.urandom)) / deviation
    edges = (
        torch.arange(-4 * gaussian.side, 4 * gaussian.side + 1, dtype=torch.float64)
        * gaussian.width
        / deviation
        / 4
    )
    taken = torch.from_numpy(gaussian._taken)
    shares = phi(edges[1:]) - phi(edges[:-1]) - taken.repeat_interleave(4 // BOXES) / (4 // BOXES)
    shares = torch.cat([2 * phi(edges[:1]), shares]) / (1 - gaussian.share)
    assert float(shares.sum()) == pytest.approx(1, rel=1e-12)
    found = torch.cat([(z.abs() > edges[-1]).sum()[None], torch.histogram(z, edges).hist])
    order = shares.argsort(descending=True)
    groups = (shares[order].cumsum(0) * 200).long().clamp(max=199)  # of about the same share
    pooled = [
        torch.zeros(200, dtype=torch.float64).index_add_(0, groups, x[order].double())
        for x in (found, shares)
    ]
    assert abs(chi_squared(*pooled)) < 6


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_tails_are_those_of_a_normal_number(deviation):
    gaussian = RoundedGaussian(deviation)
    numbers, accepted = map(torch.from_numpy, gaussian._tails(200_000, os.urandom))
    end = torch.tensor(gaussian.side * gaussian.width / deviation, dtype=torch.float64)
    exact = 2 * phi(-end) / float(gaussian._heights[-1])  # of the mass of the proposals
    assert float(accepted.double().mean()) == pytest.approx(float(exact), abs=0.005)
    z = numbers[accepted] / deviation
    assert abs((z > 0).double().mean() - 0.5) < 0.01
    below = 1 - phi(-z.abs().sort().values) / phi(-end)
    assert (below - torch.linspace(0, 1, len(z))).abs().max() < 0.007
    assert abs(gaussian._tails(1, bytes)[0]) > 11.5 * deviation  # the smallest uniform numbers


def test_no_whole_number_is_preferred():
    """Their last bits are as good as any: from the table and from rejection."""
    gaussian = RoundedGaussian(1.3 * 2**34)
    rest = torch.from_numpy(gaussian._rest(2**17, os.urandom))
    for numbers in (next(gaussian.draw([2**17], os.urandom)), rest):
        assert torch.equal(numbers, numbers.round())
        for place in (0, 9, 18):
            last = (numbers.long() >> place) & 255
            assert abs(chi_squared(last.bincount(minlength=256), 1 / 256)) < 6


def test_numbers_from_rejection_are_anywhere():
    gaussian = RoundedGaussian(2.0**34)
    drawn = [gaussian._places_of_the_rest(50, os.urandom) for _ in range(20_000)]
    places = torch.from_numpy(np.concatenate(drawn))
    expected = 20_000 * (1 - gaussian.share)
    assert abs(chi_squared(places.bincount(minlength=50), 1 / 50)) < 6
    assert abs(len(places) - 50 * expected) < 5 * math.sqrt(50 * expected)
    many = torch.from_numpy(gaussian._places_of_the_rest(100_000, os.urandom))
    assert (many.diff() > 0).all()
    sizes = [1, 0, 1000, 7]
    assert [len(numbers) for numbers in gaussian.draw(sizes, os.urandom)] == sizes
    assert not [*gaussian.draw([], os.urandom)]


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        found = next(RoundedGaussian(2.0**34).draw([1000], os.urandom))
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-9, 0.7, 3e5])
def test_released_numbers_lie_on_a_grid_that_does_not_depend_on_the_sum(dtype, std):
    step = grid(std)
    assert 2**34 <= std / step < 2**35
    for total in (torch.zeros(1000), 1e3 * std * torch.rand(1000), torch.full((1000,), std / 3)):
        found = released(total.to(dtype), std)
        if dtype == torch.float64:
            units = found / step
            assert torch.equal(units, units.round())
        assert found.dtype == dtype


def test_rounding_to_the_grid_commutes_with_the_noise():
    """round(S) + round(z) = round(round(S) + z): what is released is a function of the Gaussian mechanism's result."""
    total = torch.randn(10_000, dtype=torch.float64)
    step = grid(0.5)
    with pytest.warns(RuntimeWarning, match="not secure"):
        found = released(total.clone(), 0.5, seed=1)
    with pytest.warns(RuntimeWarning, match="not secure"):
        units = next(NoiseSource(seed=1).rounded([10_000], 0.5 / step))
    with pytest.warns(RuntimeWarning, match="not secure"):
        z = 0.5 * torch.randn(10_000, generator=NoiseSource(seed=1)._generator, dtype=torch.float64)
    assert torch.equal(units, (z / step).round())
    assert torch.equal(found, ((total / step).round() + z / step).round() * step)
    assert (found - total - z).abs().max() <= step


def test_every_noisy_sum_is_divided_by_its_own_divisor():
    totals = [torch.randn(size) for size in (100_000, 7, 5)]
    divisors, stds = [256.0, 256.0, 3.0], [0.5, 0.5, 0.25]
    copies = [total.clone() for total in totals]
    with pytest.warns(RuntimeWarning, match="not secure"):
        whole = summed_over_ranks(copies, stds, NoiseSource(seed=1))
    with pytest.warns(RuntimeWarning, match="not secure"):
        parts = summed_over_ranks(totals, stds, NoiseSource(seed=1), divisors)
    for found, sum_, divisor in zip(parts, whole, divisors, strict=True):
        torch.testing.assert_close(found, sum_ / divisor, rtol=2e-7, atol=0)


@pytest.mark.parametrize("std", [1e-37, 1e-30, 1e30])
def test_tiny_and_huge_noise_is_added_to_float32_too(std):
    """Units of the noise of which float32 has no number, or the inverse is none."""
    totals = [std * torch.randn(50_000), torch.ones(7)]
    found, untouched = summed_over_ranks(
        [totals[0].clone(), totals[1]], [std, 0.0], NoiseSource(), [2.0, 1.0]
    )
    noise = (2 * found.double() - totals[0].double()) / std
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(untouched, torch.ones(7))


def test_without_noise_nothing_is_rounded():
    total = torch.randn(10, dtype=torch.float64)
    assert torch.equal(released(total.clone(), 0.0), total)


def test_only_seeded_noise_is_repeated():
    with pytest.warns(RuntimeWarning, match="`noise_seed=7`: not secure"):
        a, b = NoiseSource(seed=7), NoiseSource(seed=7)
    assert torch.equal(next(a.rounded([5], 2.0**34)), next(b.rounded([5], 2.0**34)))
    state = a.state_dict()
    first = next(a.rounded([5], 2.0**34))
    a.load_state_dict(state)
    assert torch.equal(next(a.rounded([5], 2.0**34)), first)
    for fresh in (NoiseSource(), NoiseSource(secure=True)):
        assert fresh.state_dict() == {}
        fresh.load_state_dict(state)  # of a run with a seed: nothing is drawn again
        assert not torch.equal(next(fresh.rounded([5], 2.0**34)), first)
        assert not torch.equal(next(fresh.rounded([5], 2.0**34)), next(fresh.rounded([5], 2.0**34)))


def test_the_seed_of_a_torch_generator_plays_no_part(monkeypatch):
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(torch, "Generator", None)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(NoiseSource().rounded([5], 2.0**34))
    assert torch.equal(torch.get_rng_state(), state)

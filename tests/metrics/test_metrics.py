"""Gradient variance and noise scale against brute force and a simulation whose truth is known."""

import pickle

import pytest
import torch

from lightning_curv.metrics import (
    CABS,
    TIC,
    EvidenceCriterion,
    GradientDiversity,
    GradientSNR,
    GradientVariance,
    InnerProductTest,
    MeanTrace,
    NoiseScale,
    NormTest,
    OrthogonalityTest,
    TICDiagonal,
    functional,
    unbiased_moments,
)

METRICS = [GradientVariance, NoiseScale]


def batches_of_gradients(sizes, dim=7, signal=1.0):
    return [signal + torch.randn(size, dim, dtype=torch.float64) for size in sizes]


def update(metric, gradients):
    metric.update(gradients.square().sum(1), gradients.mean(0).square().sum())


def filled(metric, batches):
    for gradients in batches:
        update(metric, gradients)
    return metric


def pairwise_signal(gradients):
    """Mean of g_i · g_j over pairs of different samples: unbiased for the squared norm of the true gradient."""
    gram = gradients @ gradients.T
    n = len(gradients)
    return (gram.sum() - gram.trace()) / (n * (n - 1))


def test_unbiased_moments_equal_brute_force():
    [gradients] = batches_of_gradients([9])
    trace, signal = unbiased_moments(
        gradients.square().sum(1).mean(),
        gradients.mean(0).square().sum(),
        torch.tensor(1 / 9, dtype=torch.float64),
    )
    torch.testing.assert_close(trace, gradients.var(0).sum())
    torch.testing.assert_close(signal, pairwise_signal(gradients))


def test_unbiased_moments_are_unbiased_for_unequal_weights():
    weights = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    gradients = 0.5 + torch.randn(200_000, 5, 3, dtype=torch.float64)  # trace 3, squared norm 0.75
    second = gradients.square().sum(2) @ weights
    first = (weights @ gradients).square().sum(1)
    trace, signal = unbiased_moments(second.mean(), first.mean(), weights @ weights)
    assert trace.item() == pytest.approx(3, rel=1e-2)
    assert signal.item() == pytest.approx(0.75, rel=2e-2)


def test_gradient_variance_pools_batches():
    batches = batches_of_gradients([5, 5, 5])
    expected = torch.stack([gradients.var(0).sum() for gradients in batches]).mean()
    torch.testing.assert_close(filled(GradientVariance(), batches).compute(), expected)


def test_noise_scale_is_the_ratio_of_sums():
    batches = batches_of_gradients([5, 5, 5])
    trace = sum(gradients.var(0).sum() for gradients in batches)
    signal = sum(pairwise_signal(gradients) for gradients in batches)
    torch.testing.assert_close(filled(NoiseScale(), batches).compute(), trace / signal)


def test_simulation_with_known_noise_scale():
    # trace(Sigma) = 50, |G|^2 = 50 * 0.15^2: noise scale 44.4, of which a batch of 16 sees little.
    batches = batches_of_gradients([16] * 4000, dim=50, signal=0.15)
    assert filled(NoiseScale(), batches).compute().item() == pytest.approx(1 / 0.15**2, rel=0.05)
    assert filled(GradientVariance(), batches).compute().item() == pytest.approx(50, rel=0.01)


def test_noise_scale_is_infinite_while_the_batches_are_too_small_to_resolve_it():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert filled(NoiseScale(), [gradients]).compute() == torch.inf


@pytest.mark.parametrize("metric", METRICS)
def test_one_sample_and_no_sample_add_nothing(metric):
    batches = batches_of_gradients([6, 4])
    lonely = [torch.ones(1, 7, dtype=torch.float64), torch.ones(0, 7, dtype=torch.float64)]
    torch.testing.assert_close(
        filled(metric(), batches + lonely).compute(), filled(metric(), batches).compute()
    )


@pytest.mark.parametrize("metric", METRICS)
def test_forward_gives_the_value_of_the_batch(metric):
    whole = metric()
    for gradients in batches_of_gradients([6, 4]):
        value = whole(gradients.square().sum(1), gradients.mean(0).square().sum())
        torch.testing.assert_close(value, filled(metric(), [gradients]).compute())


@pytest.mark.parametrize("metric", METRICS)
def test_merging_processes_is_exact(metric):
    batches = batches_of_gradients([6, 4, 9, 3])
    left, right = filled(metric(), batches[:2]), filled(metric(), batches[2:])
    left.merge_state(right)
    torch.testing.assert_close(left.compute(), filled(metric(), batches).compute())


@pytest.mark.parametrize("metric", METRICS)
def test_metric_conventions(metric):
    one = filled(metric(), batches_of_gradients([6]))
    assert pickle.loads(pickle.dumps(one)).compute() == one.compute()
    assert one.clone().compute() == one.compute()
    assert one.state_dict() == {}
    assert not one.is_differentiable
    one.reset()
    assert one.freedom == 0


def test_wrong_shape_raises():
    with pytest.raises(ValueError, match=r"one entry per sample, \[N\], found shape \[2, 3\]"):
        NoiseScale().update(torch.ones(2, 3), torch.ones(()))


def trace_of(gradients):
    return gradients.square().sum() / 7


def dots(gradients):
    return gradients @ gradients.mean(0)


def orthogonal(gradients):
    mean = gradients.mean(0)
    rest = gradients - dots(gradients)[:, None] * mean / (mean @ mean)
    n = len(gradients)
    return rest.square().sum() / (n * (n - 1))


def sq_norms(gradients):
    return gradients.square().sum(1)


def sq_norm_of_mean(gradients):
    return gradients.mean(0).square().sum()


def sum_of_squares(gradients):
    return gradients.square().sum(0)


def diagonal_of(gradients):
    return gradients.square().mean(0) + 1


# metric: arguments of its update; numerator and denominator by brute force; what becomes of the
# ratio of their sums
RATIOS = {
    GradientDiversity: (
        lambda g: (sq_norms(g), sq_norm_of_mean(g)),
        lambda g: (g.square().sum(), g.sum(0).square().sum()),
        lambda r: r,
    ),
    NormTest: (
        lambda g: (sq_norms(g), sq_norm_of_mean(g)),
        lambda g: (g.var(0).sum() / len(g), sq_norm_of_mean(g)),
        torch.sqrt,
    ),
    InnerProductTest: (
        lambda g: (dots(g),),
        lambda g: (dots(g).var() / len(g), sq_norm_of_mean(g).square()),
        torch.sqrt,
    ),
    OrthogonalityTest: (
        lambda g: (sq_norms(g), dots(g)),
        lambda g: (orthogonal(g), sq_norm_of_mean(g)),
        torch.sqrt,
    ),
    MeanTrace: (
        lambda g: (trace_of(g), len(g)),
        lambda g: (len(g) * trace_of(g), len(g)),
        lambda r: r,
    ),
    TIC: (
        lambda g: (sq_norms(g), trace_of(g)),
        lambda g: (g.square().sum(), len(g) * trace_of(g)),
        lambda r: r,
    ),
    CABS: (
        lambda g: (sq_norms(g), sq_norm_of_mean(g), trace_of(g), 0.1),
        lambda g: (0.1 * g.var(0).sum(), trace_of(g)),
        lambda r: r,
    ),
    GradientSNR: (
        lambda g: (g.mean(0), sum_of_squares(g), len(g)),
        lambda g: (g.mean(0).square(), g.var(0)),
        torch.mean,
    ),
    EvidenceCriterion: (
        lambda g: (g.mean(0), sum_of_squares(g), len(g)),
        lambda g: (g.mean(0).square(), g.var(0) / len(g)),
        lambda r: 1 - r.mean(),
    ),
    TICDiagonal: (
        lambda g: (sum_of_squares(g), diagonal_of(g), len(g)),
        lambda g: (sum_of_squares(g), len(g) * diagonal_of(g)),
        torch.sum,
    ),
}


def ratio(metric, batches):
    _, formula, finish = RATIOS[metric]
    numerators, denominators = zip(*map(formula, batches))
    return finish(torch.as_tensor(sum(numerators) / sum(denominators)))


@pytest.mark.parametrize("metric", RATIOS)
def test_ratio_of_sums_equals_brute_force_over_batches_and_processes(metric):
    arguments, _, _ = RATIOS[metric]
    batches = batches_of_gradients([6, 4, 9, 3])
    left, right = metric(), metric()
    for one, gradients in zip((left, left, right, right), batches):
        value = one(*arguments(gradients))
        torch.testing.assert_close(value, ratio(metric, [gradients]))
    left.merge_state(right)
    torch.testing.assert_close(left.compute(), ratio(metric, batches))


@pytest.mark.parametrize("metric", RATIOS)
def test_ratio_of_sums_follows_the_conventions(metric):
    one = metric()
    one.update(*RATIOS[metric][0](*batches_of_gradients([6])))
    assert pickle.loads(pickle.dumps(one)).compute() == one.compute()
    assert one.clone().compute() == one.compute()
    assert one.state_dict() == {}
    assert not one.is_differentiable
    assert not one.full_state_update
    one.reset()
    assert one.denominator == 0


@pytest.mark.parametrize(
    "metric", [NormTest, InnerProductTest, OrthogonalityTest, CABS, GradientSNR, EvidenceCriterion]
)
def test_a_single_sample_adds_nothing_to_a_test(metric):
    arguments, _, _ = RATIOS[metric]
    whole, part = metric(), metric()
    for gradients in batches_of_gradients([6]):
        whole.update(*arguments(gradients))
        part.update(*arguments(gradients))
    whole.update(*arguments(torch.ones(1, 7, dtype=torch.float64)))
    torch.testing.assert_close(whole.compute(), part.compute())


@pytest.mark.parametrize("metric", [GradientSNR, EvidenceCriterion, TICDiagonal])
def test_entries_that_never_vary_are_left_out(metric):
    gradients = torch.cat([batches_of_gradients([6])[0], torch.zeros(6, 2, dtype=torch.float64)], 1)
    arguments = {
        **RATIOS,
        TICDiagonal: (lambda g: (sum_of_squares(g), sum_of_squares(g) / 2, len(g)),),
    }[metric][0]
    whole, part = metric(), metric()
    whole.update(*arguments(gradients))
    part.update(*arguments(gradients[:, :7]))
    torch.testing.assert_close(whole.compute(), part.compute())


def test_a_batch_has_the_same_value_as_metric_and_as_formula():
    [gradients] = batches_of_gradients([6])
    mean = gradients.mean(0)
    squares, dots = gradients.square().sum(1), gradients @ mean
    norms, projections = (
        (squares.mean(), mean @ mean, 1 / 6),
        (dots.square().mean(), mean @ mean, 1 / 6),
    )
    error, along = (
        quotient(functional.norm_test(*norms)),
        quotient(functional.inner_product_test(*projections)),
    )
    across = quotient(functional.orthogonality_test(squares.mean(), *projections))
    torch.testing.assert_close(error, gradients.var(0).sum() / 6 / (mean @ mean))
    torch.testing.assert_close(along + across, error)
    torch.testing.assert_close(
        quotient(functional.gradient_diversity(*norms)), squares.sum() / (36 * mean @ mean)
    )
    for metric, arguments, value in [
        (NormTest(), (squares, mean @ mean), error.sqrt()),
        (InnerProductTest(), (dots,), along.sqrt()),
        (OrthogonalityTest(), (squares, dots), across.sqrt()),
    ]:
        metric.update(*arguments)
        torch.testing.assert_close(metric.compute(), value)


def quotient(parts):
    numerator, denominator = parts
    return numerator / denominator

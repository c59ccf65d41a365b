"""Per-sample gradients and their moments against brute force, one test per quantity over the whole zoo."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import NAMES, ROW, assert_close, assert_fields, compute, reference

from lightning_curv import curvature
from lightning_curv.extensions import (
    BatchGrad,
    BatchL2Grad,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

QUANTITIES = [
    (BatchGrad, "grad_batch"),
    (BatchL2Grad, "batch_l2"),
    (SumGradSquared, "sum_grad_squared"),
    (Variance, "variance"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("extension", "field"), QUANTITIES, ids=[field for _, field in QUANTITIES])
def test_equals_brute_force(extension, field, name):
    problem = ROW[name].make()
    compute(problem, extension())
    assert_fields(problem, field, reference(field, name), ROW[name].rtol)


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_add_to_the_gradient_of_the_same_backward(name):
    problem = ROW[name].make()
    compute(problem, BatchGrad(), check=True)
    for key, p in problem.parameters().items():
        if p.grad is not None:
            assert_close(p.grad_batch.sum(0), p.grad, ROW[name].rtol, key)


@pytest.mark.parametrize("name", NAMES)
def test_monitoring_leaves_the_gradient_bit_identical(name):
    plain, monitored = ROW[name].make(), ROW[name].make()
    plain.compute_loss().backward()
    compute(monitored, BatchGrad(), Variance())
    for (key, p), q in zip(plain.parameters().items(), monitored.parameters().values()):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize("name", NAMES)
def test_extensions_do_not_disturb_each_other(name):
    problem = ROW[name].make()
    compute(problem, *[extension() for extension, _ in QUANTITIES])
    for _, field in QUANTITIES:
        assert_fields(problem, field, reference(field, name), ROW[name].rtol)


def test_frozen_parameters_carry_nothing():
    problem = ROW["frozen"].make()
    compute(problem, *[extension() for extension, _ in QUANTITIES])
    frozen = [p for p in problem.model.parameters() if not p.requires_grad]
    assert frozen
    for p in frozen:
        assert not any(hasattr(p, field) for _, field in QUANTITIES)


def test_subsampling_keeps_the_chosen_samples_in_order():
    problem = ROW["cnn_inplace_groups"].make()
    compute(problem, BatchGrad(subsampling=[3, 0]))
    for key, p in problem.parameters().items():
        assert_close(
            p.grad_batch, reference("grad_batch", "cnn_inplace_groups")[key][[3, 0]], label=key
        )


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("extension", [BatchGrad, SqrtGGNExact])
def test_samples_that_a_batch_does_not_have_are_named(extension, create_graph):
    layer, X = torch.nn.Linear(3, 2), torch.randn(4, 3)

    def compute(subsampling):
        with curvature(extension(subsampling=subsampling)):
            layer(X).square().sum().backward(create_graph=create_graph)
        return getattr(layer.weight, extension.savefield)

    message = r"indices of the 4 samples of the batch, from -4 to 3, found {}; leave out those"
    for missing in (4, -5):
        with pytest.raises(IndexError, match=message.format(missing)):
            compute([0, missing])
    for wrong in (True, 1.5):
        with pytest.raises(TypeError, match=rf"indices of samples, found {wrong}; of a mask pass"):
            compute([wrong])
    assert torch.equal(compute([3, -1]), compute(torch.tensor([3, 3])))


def test_float32_variance_does_not_cancel():
    """Per-sample gradients 1000 ± 0.01: E[g²] - E[g]² has no correct digit in float32."""
    torch.manual_seed(0)
    problem = ROW["mlp_mse"].make()
    problem.model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        problem.model.weight.fill_(0.0)
    problem.X = torch.ones(64, 1)
    problem.y = -(500 + 0.005 * torch.randn(64, 1))
    compute(problem, Variance(), BatchGrad())
    p = problem.model.weight
    expected = p.grad_batch.double().var(0, unbiased=False)
    mean = p.grad_batch.double().mean(0)
    assert expected.sqrt() / mean < 1e-4  # the case is as hard as it claims to be
    torch.testing.assert_close(p.variance.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "shape", [(64, 7), (64, 3, 7), (64, 50, 7)], ids=["vector", "few_positions", "many_positions"]
)
def test_float32_variance_of_equal_samples_is_almost_zero(shape):
    """N copies of one sample: the variance is rounding, far below ε·mean² that subtraction of moments leaves."""
    model = torch.nn.Linear(7, 2)
    problem = ROW["mlp_mse"].make()
    problem.model, problem.X = model, 100 + torch.randn(1, *shape[1:]).expand(shape).contiguous()
    problem.y = torch.zeros(*shape[:-1], 2)
    compute(problem, Variance())
    for p in model.parameters():
        mean = p.grad / 64
        assert (p.variance >= 0).all()
        assert (p.variance <= (1e-5 * mean.abs().max()) ** 2).all()


def test_variance_of_one_sample_beside_its_sum_of_squares():
    """Shared squares may be laid out in any order of the axes."""
    layer, x = nn.Linear(6, 3), torch.randn(1, 2, 3)
    with curvature(Variance(), SumGradSquared()):
        F.cross_entropy(layer(x.transpose(1, 2).flatten(1)), torch.tensor([2])).backward()
    assert_close(layer.weight.sum_grad_squared, layer.weight.grad.square())
    assert_close(layer.weight.variance, torch.zeros(3, 6))

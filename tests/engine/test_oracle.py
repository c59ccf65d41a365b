"""The oracles themselves: they agree with autograd and with each other."""

import oracle
import pytest
import torch
from losses_table import LOSS, LOSSES
from torch import nn
from zoo import NAMES, ROW, Problem

COMPARE = {"rtol": 1e-9, "atol": 1e-12}


def small_problem(loss, seed=0) -> Problem:
    """N = 4, three classes, [4, 3, *extra] from one linear layer."""
    torch.manual_seed(seed)
    S = torch.Size(loss.extra).numel()
    model = nn.Sequential(nn.Linear(2, 3 * S), nn.Unflatten(1, (3, *loss.extra))).double()
    X = torch.randn(4, 2, dtype=torch.float64)
    return Problem(model, X, loss.target((4, 3, *loss.extra)), loss)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_summands_add_to_the_loss(loss):
    problem = small_problem(loss)
    output = problem.model(problem.X)
    summands = [loss.summand(output, problem.y, n) for n in range(4)]
    torch.testing.assert_close(sum(summands), loss.function(output, problem.y), **COMPARE)
    torch.testing.assert_close(sum(summands), loss.module()(output, problem.y), **COMPARE)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_nth_summand_depends_on_nth_output_only(loss):
    problem = small_problem(loss)
    output = problem.model(problem.X)
    for n in range(4):
        (g,) = oracle.gradient(loss.summand(output, problem.y, n), [output])
        assert g[torch.arange(4) != n].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_add_to_the_gradient(name):
    problem = ROW[name].make()
    params = oracle.trainable(problem.model)
    loss = problem.loss.function(problem.model(problem.X), problem.y)
    grads = oracle.gradient(loss, list(params.values()))
    for (key, g), grad in zip(oracle.grad_batch(problem).items(), grads):
        torch.testing.assert_close(g.sum(0), grad, rtol=ROW[name].rtol, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_no_test_is_vacuous(name):
    """Every parameter but the unused ones has a gradient and curvature that differ between samples."""
    problem = ROW[name].make()
    curvature = oracle.diag_ggn_batch(problem)
    for key, g in oracle.grad_batch(problem).items():
        if not key.startswith(("idle", "side")):
            assert g.abs().max() > 0, key
            assert curvature[key].abs().max() > 0, key
            assert len(g) == 1 or (g - g.mean(0)).abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_models_treat_samples_independently(name):
    problem = ROW[name].make()
    together = problem.model(problem.X)
    alone = torch.cat([problem.model(x.unsqueeze(0)) for x in problem.X])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_ggn_of_a_linear_model_is_the_hessian(loss):
    problem = small_problem(loss)
    layer = problem.model[0]
    for name, p in layer.named_parameters():

        def objective(value, name=name):
            output = torch.func.functional_call(problem.model, {f"0.{name}": value}, (problem.X,))
            return loss.function(output, problem.y)

        hessian = torch.autograd.functional.hessian(objective, p.detach()).reshape(
            p.numel(), p.numel()
        )
        torch.testing.assert_close(oracle.ggn(problem)[f"0.{name}"].sum(0), hessian, **COMPARE)


def test_jacobian_agrees_with_torch_func():
    problem = ROW["vit_explicit_attention"].make()
    params = {name: p.detach() for name, p in problem.model.named_parameters()}
    expected = torch.func.jacrev(
        lambda p: torch.func.functional_call(problem.model, p, (problem.X,))
    )(params)
    for name, J in oracle.jacobian(problem).items():
        torch.testing.assert_close(J, expected[name], **COMPARE)


def test_variance_by_moments():
    problem = ROW["mlp_sigmoid"].make()
    N = len(problem.X)
    g, squares, variance = (
        oracle.grad_batch(problem),
        oracle.sum_grad_squared(problem),
        oracle.variance(problem),
    )
    for name in g:
        torch.testing.assert_close(
            variance[name], squares[name] / N - (g[name].sum(0) / N) ** 2, **COMPARE
        )


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_kronecker_product_is_the_ggn_block_for_one_datum(weight_sharing):
    problem = ROW["one_datum"].make()
    blocks = {name: block.sum(0) for name, block in oracle.ggn(problem).items()}
    for name, factors in oracle.kronecker(problem, weight_sharing).items():
        product = torch.kron(*factors) if len(factors) == 2 else factors[0]
        torch.testing.assert_close(product, blocks[name], **COMPARE)


def test_expand_and_reduce_are_exact_where_they_should_be():
    """A deep linear network with MSE: expand is exact if the loss keeps the positions, reduce if it averages them."""
    torch.manual_seed(0)
    # One datum repeated: A and B are then constant over samples, the only other source of
    # approximation.
    X = torch.randn(1, 3, dtype=torch.float64).expand(2, 4, 3).contiguous()
    layer = nn.Linear(3, 2).double()

    class Averaged(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(1)

    for model, weight_sharing in ((nn.Sequential(layer), "expand"), (Averaged(layer), "reduce")):
        y = torch.zeros_like(model(X))
        problem = Problem(model, X, y, LOSS["mse_sum"])
        block = oracle.ggn(problem)["0.weight"].sum(0)
        torch.testing.assert_close(
            torch.kron(*oracle.kronecker(problem, weight_sharing)["0.weight"]), block, **COMPARE
        )

"""`loss.backward(create_graph=True)`: first-order quantities are as differentiable as the gradient."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from zoo import NAMES, ROW, assert_close

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, SumGradSquared, Variance

FIRST = (BatchGrad, BatchL2Grad, SumGradSquared, Variance)
FIELDS = [extension.savefield for extension in FIRST]


@pytest.fixture(autouse=True)
def _quiet_attention_with_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of torch: a parameter and its gradient refer to each other
        yield


def naive(problem, inputs):
    """The fields of every parameter from one differentiable backward pass per sample."""
    with record():  # for the second derivative of weight norm, which is wrong in torch
        output = problem.model(problem.X)
    summands = [problem.loss.summand(output, problem.y, n) for n in range(len(output))]
    rows = [
        torch.autograd.grad(
            summand, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        for summand in summands
    ]
    for column in zip(*rows):
        g = torch.stack(column)
        mean = sum(g) / len(g)
        squares = sum(g_n**2 for g_n in g)
        yield (
            g,
            torch.stack([(g_n**2).sum() for g_n in g]),
            squares,
            sum((g_n - mean) ** 2 for g_n in g) / len(g),
        )


def derivatives(values, inputs):
    """The gradient of a random combination of all entries of every value."""
    for value in values:
        torch.manual_seed(0)
        penalty = (value * torch.randn_like(value)).sum()
        if penalty.requires_grad:
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            yield torch.autograd.grad(penalty, inputs, **options)
        else:
            yield [torch.zeros_like(p) for p in inputs]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_derivatives_equal_plain_autograd(name):
    row = ROW[name]
    problem = row.make()
    with curvature(*(make() for make in FIRST)):
        problem.compute_loss().backward(create_graph=True)
    inputs = [p for p in problem.parameters().values() if hasattr(p, "grad_batch")]
    assert inputs
    other = row.make()
    others = [
        q
        for p, q in zip(problem.parameters().values(), other.parameters().values())
        if hasattr(p, "grad_batch")
    ]
    for p, expected in zip(inputs, naive(other, others)):
        values = [getattr(p, field) for field in FIELDS]
        for field, value, right in zip(FIELDS, values, expected):
            assert_close(value, right, row.rtol, field, 1e-14 * p.grad.square().max().item())
        for field, found, right in zip(
            FIELDS, derivatives(values, inputs), derivatives(expected, others)
        ):
            largest = max(x.abs().max().item() for x in right)
            for a, b in zip(found, right):
                assert_close(a, b, max(row.rtol, 1e-6), field, 1e-12 * largest)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch():
    return torch.randn(6, 4).double(), torch.arange(6) % 3


def differentiated(model, *extensions, loss=F.cross_entropy, **options):
    X, y = batch()
    with curvature(*extensions, **options):
        value = loss(model(X), y)
        value.backward(create_graph=True)
    return value


def test_a_penalty_on_the_variance_is_trained():
    """Fishr (Rame, Dancette & Cord, ICML 2022): the gradient of the loss and its penalty, by `torch.func`."""
    model, (X, y) = net(), batch()
    with curvature(BatchGrad()):
        loss = F.cross_entropy(model(X), y)
        loss.backward(create_graph=True)
    penalty = sum((6 * p.grad_batch).var(0).sum() for p in model.parameters())
    model.zero_grad()
    (loss + penalty).backward()

    def of_sample(params, x, target):
        return F.cross_entropy(functional_call(model, params, x[None]), target[None])

    def objective(params):
        rows = vmap(grad(of_sample), in_dims=(None, 0, 0))(params, X, y)
        return F.cross_entropy(functional_call(model, params, X), y) + sum(
            g.var(0).sum() for g in rows.values()
        )

    expected = grad(objective)({name: p.detach() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name], label=name)


def test_any_loss_will_do():
    """No likelihood is needed: what is backpropagated are the cotangents of the ops."""
    model, found = net(), []
    differentiated(model, BatchGrad(), loss=lambda z, y: (z.exp() * z).mean())
    for p in model.parameters():
        assert_close(p.grad_batch.sum(0), p.grad)
        penalties = (p.grad_batch.sum(0).square().sum(), p.grad.square().sum())
        for penalty in penalties:
            found.append(torch.autograd.grad(penalty, model[0].weight, retain_graph=True)[0])
        assert_close(*found[-2:])


def test_chosen_samples_are_differentiable():
    model = net()
    differentiated(model, BatchGrad(subsampling=[4, 1]), SumGradSquared())
    p = model[0].weight
    assert p.grad_batch.shape == (2, *p.shape)
    assert p.grad_batch.requires_grad


def test_an_empty_batch():
    model = net()
    with curvature(BatchGrad(), Variance()):
        model(torch.zeros(0, 4).double()).sum().backward(create_graph=True)
    assert model[0].weight.grad_batch.shape == (0, 5, 4)


def test_of_bfloat16_parameters_they_are_float32():
    model = nn.Linear(4, 3).bfloat16()
    with curvature(BatchGrad()):
        model(torch.randn(6, 4).bfloat16()).square().mean().backward(create_graph=True)
    assert model.weight.grad_batch.dtype == torch.float32
    assert model.weight.grad_batch.requires_grad


def test_quantities_of_the_likelihood_are_constants():
    model = net()
    differentiated(model, DiagGGNExact(), BatchL2Grad())
    assert not model[0].weight.diag_ggn_exact.requires_grad
    assert model[0].weight.batch_l2.requires_grad


def test_without_create_graph_nothing_has_a_graph():
    model, (X, y) = net(), batch()
    with curvature(*(make() for make in FIRST)):
        F.cross_entropy(model(X), y).backward()
    assert not any(getattr(p, field).requires_grad for p in model.parameters() for field in FIELDS)


def test_together_with_a_check_and_a_hook():
    model, found = net(), []
    differentiated(
        model,
        BatchGrad(),
        Variance(),
        check=True,
        extension_hook=lambda p: found.append(p.variance.sum()),
    )
    assert len(found) == 4
    assert all(value.requires_grad for value in found)


def test_checkpointed_activations_are_computed_again():
    model, (X, y) = net(), batch()
    found = []
    for run in (model, lambda x: model[2](checkpoint(model[:2], x, use_reentrant=False))):
        with curvature(Variance()):
            F.cross_entropy(run(X), y).backward(create_graph=True)
        penalty = sum(p.variance.sum() for p in model.parameters())
        found.append(torch.autograd.grad(penalty, [*model.parameters()]))
    for a, b in zip(*found):
        assert_close(a, b)


def test_hooks_of_activations_are_applied_once_per_pass():
    model, (X, y) = net(), batch()
    with curvature(BatchGrad()):
        hidden = model[0](X)
        hidden.register_hook(lambda g: 3 * g)
        F.cross_entropy(model[1:](hidden), y).backward(create_graph=True)
    p = model[0].weight
    assert_close(p.grad_batch.sum(0), p.grad)
    assert_close(
        *(torch.autograd.grad(g.sum(), p, retain_graph=True)[0] for g in (p.grad_batch, p.grad))
    )


def test_a_loss_that_is_the_output_of_an_op():
    w = nn.Parameter(torch.ones(3))
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    with curvature(BatchGrad()):
        (x @ w).backward(create_graph=True, gradient=torch.ones(1))
    assert_close(w.grad_batch, x)
    assert_close(*torch.autograd.grad(w.grad_batch.square().sum(), x), 2 * x)


def test_parameters_with_tensor_hooks_are_refused():
    model = net()
    model[0].weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(UnsupportedError, match="without tensor hooks"):
        differentiated(model, BatchGrad())
    differentiated(model, DiagGGNExact())
    with pytest.raises(UnsupportedError, match=r"without tensor hooks, found some on `0\.weight`"):
        differentiated(model, BatchL2Grad())


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
def test_an_op_of_several_nodes_without_a_rule():
    """A product of complex sequences is a product of matrices and a view above it."""
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    X = torch.randn(5, 2, 4, dtype=torch.complex128)
    values = []
    for create_graph in (False, True):
        with curvature(BatchGrad()):
            (X @ w).abs().pow(3).sum().backward(create_graph=create_graph)
        values.append(w.grad_batch.detach())
    rows = [torch.autograd.grad((x @ w).abs().pow(3).sum(), w)[0] for x in X]
    assert_close(values[0], torch.stack(rows))
    assert_close(values[1], torch.stack(rows))

"""Losses without a closed form: `output=` says where the network ends, against brute force."""

import gc
import inspect
import weakref
from dataclasses import replace

import hessian_oracle
import oracle
import pytest
import torch
import torch.nn.functional as F
from estimates import RUNS, assert_unbiased
from losses_table import LOSS, Loss, cross_entropy_summand, labels, mse_summand, real, soft_bits
from refused_ops import Once
from small_networks import small_problem
from torch import nn
from zoo import ROW, assert_close, assert_fields, compute

from lightning_curv import curvature, extend, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import (
    GGNMP,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
)

overridable_backward = pytest.mark.skipif(
    "handle_torch_function" not in inspect.getsource(torch.autograd.backward),
    reason="this torch does not hand torch.autograd.backward to function modes",
)


def by_hand(name, function, summand, target=real, extra=()) -> Loss:
    return Loss(name, function, nn.Identity, target, summand, extra)


def hand_written_cross_entropy(output, y):
    log_p = output - output.logsumexp(1, keepdim=True)
    return -log_p[torch.arange(len(y)), y].mean()


def soft_margin_summand(output, y, n):
    return torch.log(1 + torch.exp(-y[n] * output[n])).sum() / output.numel()


def signs(shape):
    return real(shape).sign()


CONVEX = [
    by_hand("cross_entropy", hand_written_cross_entropy, cross_entropy_summand, labels),
    by_hand(
        "squares",
        lambda f, y: ((f - y) ** 2).sum(),
        lambda f, y, n: mse_summand(f, y, n, reduction="sum"),
        extra=(2,),
    ),
    by_hand(
        "quartic",
        lambda f, y: 3 * ((f - y) ** 4).mean(),
        lambda f, y, n: 3 * ((f - y) ** 4)[n].sum() / f.numel(),
    ),
    by_hand(
        "energy",
        lambda f, y: f.logsumexp((1, 2)).sum(),
        lambda f, y, n: f[n].exp().sum().log(),
        extra=(2,),
    ),
    by_hand(
        "multilabel",
        F.multilabel_soft_margin_loss,
        lambda f, y, n: F.binary_cross_entropy_with_logits(f[n], y[n], reduction="sum") / f.numel(),
        soft_bits,
    ),
    by_hand("soft_margin", F.soft_margin_loss, soft_margin_summand, signs),
    by_hand(
        "sum_with_known_loss",
        lambda f, y: F.mse_loss(f, y) + (f**4).sum(),
        lambda f, y, n: mse_summand(f, y, n) + (f[n] ** 4).sum(),
    ),
    by_hand(
        "l1_is_linear",
        lambda f, y: (f - y).abs().sum() + f[:, 0].square().sum(),
        lambda f, y, n: (f - y)[n].abs().sum() + f[n, 0] ** 2,
    ),
]
SINE = by_hand(
    "sine",
    lambda f, y: torch.sin(f * f.roll(1, 1)).sum(),
    lambda f, y, n: torch.sin(f * f.roll(1, 1))[n].sum(),
)


@pytest.mark.parametrize("loss", CONVEX, ids=lambda loss: loss.name)
def test_ggn_equals_brute_force(loss):
    problem = small_problem(loss)
    compute(
        problem,
        DiagGGNExact(),
        BatchDiagGGNExact(),
        SqrtGGNExact(),
        KFLR(),
        output=problem.model,
        check=True,
    )
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))
    assert_fields(problem, "diag_ggn_exact_batch", oracle.diag_ggn_batch(problem))
    blocks, factors = oracle.ggn(problem), oracle.kronecker(problem, "expand")
    for key, p in problem.parameters().items():
        V = p.sqrt_ggn_exact.flatten(2)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), blocks[key], label=key)
        for actual, expected in zip(p.kflr, factors[key]):
            assert_close(actual, expected, label=key)


def test_ggn_takes_the_positive_part():
    problem = small_problem(SINE)
    eigenvalues, vectors = torch.linalg.eigh(oracle.loss_hessian(problem))
    assert eigenvalues.min() < 0 < eigenvalues.max()
    compute(problem, DiagGGNExact(), GGNMP(), output=problem.model)
    H = vectors @ torch.diag_embed(eigenvalues.clamp(min=0)) @ vectors.mT
    for key, J in oracle.jacobian(problem).items():
        p = problem.parameters()[key]
        block = torch.einsum("ncp,ncd,ndq->pq", J.flatten(2), H, J.flatten(2))
        assert_close(p.diag_ggn_exact.flatten(), block.diagonal(), label=key)
        assert_close(p.ggnmp(p.detach()).flatten(), block @ p.detach().flatten(), label=key)


@pytest.mark.parametrize("loss", [*CONVEX, SINE], ids=lambda loss: loss.name)
def test_hessian_equals_brute_force(loss):
    problem = small_problem(loss)
    compute(problem, DiagHessian(), BatchDiagHessian(), output=problem.model)
    assert_fields(problem, "diag_h", hessian_oracle.diag_hessian(problem))
    assert_fields(problem, "diag_h_batch", hessian_oracle.diag_hessian_batch(problem))


def test_samples_are_unbiased():
    loss = CONVEX[0]
    problem, generator, runs = small_problem(loss), torch.Generator().manual_seed(0), []
    for _ in range(RUNS):
        compute(problem, DiagGGNMC(mc_samples=16), generator=generator, output=problem.model)
        runs.append(problem.model[0].weight.diag_ggn_mc)
    assert_unbiased(torch.stack(runs), oracle.diag_ggn(problem)["0.weight"], "0.weight")


@pytest.mark.parametrize(
    "name", ["cnn_inplace_groups", "vit", "tied_embedding", "language_model", "one_datum"]
)
def test_known_losses_by_differentiation(name):
    """Known loss functions above the output are differentiated like any other."""
    problem = ROW[name].make()
    compute(problem, DiagGGNExact(), output=problem.model)
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))


@pytest.mark.parametrize("minor", [False, True])
def test_rows_of_several_positions(minor):
    """The output is [N·T, C] or [T·N, C], and the loss couples the positions of a sample."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    X = torch.randn(2, 2, 4, dtype=torch.float64)

    def run(output):
        with curvature(DiagGGNExact(), output=output):
            h = torch.tanh(first(X))
            h = h - h.mean(1, keepdim=True) / 2
            f = last((h.transpose(0, 1) if minor else h).flatten(0, 1)).unflatten(0, (2, 2))
            f.sum((2, 0 if minor else 1)).pow(4).sum().backward()
        return first.weight.diag_ggn_exact

    class Whole(nn.Module):
        def forward(self, X):
            h = torch.tanh(first(X))
            h = h - h.mean(1, keepdim=True) / 2
            return last(h)

    whole = Whole()
    with curvature(DiagGGNExact(), output=whole):
        whole(X).sum((1, 2)).pow(4).sum().backward()
    expected = first.weight.diag_ggn_exact
    assert_close(run(last), expected)


# --- ways to say where ------------------------------------------------------------------------------------------------


def inside(problem):
    with curvature(DiagGGNExact(), output=problem.model):
        problem.compute_loss().backward()


def last_layer(problem):
    with curvature(DiagGGNExact(), output=problem.model[-1]):
        problem.compute_loss().backward()


def recorded(problem):
    with record(output=problem.model):
        loss = problem.compute_loss()
    with curvature(DiagGGNExact(), output=problem.model):
        loss.backward()


def extended(problem):
    loss = replace(problem, model=extend(problem.model)).compute_loss()
    with curvature(DiagGGNExact(), output=problem.model):
        loss.backward()


def tensor(problem):
    with record():
        output = problem.model(problem.X)
    with curvature(DiagGGNExact(), output=output):
        problem.loss.function(output, problem.y).backward()


def tensor_changed_in_place(problem):
    """The loss overwrites the output; the context has its place in the graph."""
    with record():
        output = problem.model[:-1](problem.X)  # no view
    with curvature(DiagGGNExact(), output=output):
        output.sub_(problem.y)
        (3 * output**4).mean().backward()


def by_autograd_backward(problem):
    with curvature(DiagGGNExact(), output=problem.model):
        torch.autograd.backward(problem.compute_loss())


@pytest.mark.parametrize(
    "form",
    [
        inside,
        last_layer,
        recorded,
        extended,
        tensor,
        tensor_changed_in_place,
        pytest.param(by_autograd_backward, marks=overridable_backward),
    ],
)
def test_forms(form):
    problem = small_problem(CONVEX[2])
    form(problem)
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))


def test_known_loss_beside_the_output_adds_its_curvature():
    """Two heads: one with a known loss, one with a loss of the user's own."""
    torch.manual_seed(0)
    body, left, right = (nn.Linear(*sizes).double() for sizes in [(5, 4), (4, 3), (4, 3)])
    X, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))

    def diagonal(left_weight, right_weight, **options):
        with curvature(DiagGGNExact(), **options):
            h = torch.tanh(body(X))
            loss = left_weight * F.cross_entropy(left(h), y) + right_weight * right(h).pow(4).sum()
            loss.backward()
        return body.weight.diag_ggn_exact

    together, own = diagonal(2.0, 0.5, output=right), diagonal(0.0, 0.5, output=right)
    with curvature(DiagGGNExact()):
        (2 * F.cross_entropy(left(torch.tanh(body(X))), y)).backward()
    assert own.any()
    assert_close(together, own + body.weight.diag_ggn_exact)


def test_gradients_find_their_samples_by_the_output():
    """Sequence-first rows with a loss of one's own: the output tells the samples."""
    problem = ROW["all_sizes_equal"].make()
    problem.loss = CONVEX[2]
    problem.y = torch.zeros(3, 3, dtype=torch.float64)
    compute(problem, BatchGrad(), output=problem.model)
    assert_fields(problem, "grad_batch", oracle.grad_batch(problem))


def test_hooks_are_removed_and_nothing_is_kept():
    problem = small_problem(CONVEX[0])
    compute(problem, DiagGGNExact(), output=problem.model)
    assert not problem.model._forward_hooks
    with record(output=problem.model):
        output = problem.model(problem.X)

    class Sentinel:
        """Dies with the node."""

    sentinel = Sentinel()
    alive = weakref.ref(sentinel)
    output.grad_fn.metadata["sentinel"] = sentinel
    gc.disable()
    try:
        del output, sentinel
        assert alive() is None
    finally:
        gc.enable()


# --- refusals ---------------------------------------------------------------------------------------------------------


def batch_statistics(f, y):
    return (f - f.mean(0)).pow(4).sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (batch_statistics, "found one whose second derivatives mix them"),
        (lambda f, y: Once.apply(f), "found `OnceBackward` without a second derivative"),
    ],
    ids=["batch_statistics", "once_differentiable"],
)
def test_loss_is_refused(function, message):
    problem = small_problem(by_hand("refused", function, None))
    with pytest.raises(UnsupportedError, match=message):
        compute(problem, DiagGGNExact(), output=problem.model)


def test_parameters_around_the_output_are_refused():
    problem = small_problem(CONVEX[0])
    with pytest.raises(
        UnsupportedError, match=r"`linear` reaches it around the output. Leave `output=` out"
    ):
        compute(problem, DiagGGNExact(), output=problem.model[1])


@pytest.mark.parametrize("calls", [0, 2])
def test_module_must_be_called_once(calls):
    head = nn.Linear(5, 5).double()
    with (
        pytest.raises(UnsupportedError, match=f"found `Linear` {calls} times in its graph"),
        curvature(DiagGGNExact(), output=head if calls else nn.Linear(1, 1)),
    ):
        head(head(torch.ones(4, 5, dtype=torch.float64))).sum().backward()


def test_tensor_must_be_in_the_graph():
    layer, X = nn.Linear(3, 2), torch.ones(4, 3)
    with (
        pytest.raises(UnsupportedError, match=r"found a tensor of shape \(4, 2\) 0 times"),
        curvature(DiagGGNExact(), output=layer(X)),
    ):
        layer(X).square().sum().backward()
    with pytest.raises(ValueError, match="found a tensor without a graph"):
        curvature(DiagGGNExact(), output=X)


def test_other_types_are_refused():
    with pytest.raises(
        TypeError, match=r"found 'head'; a name is turned into a module by `model.get_submodule"
    ):
        curvature(DiagGGNExact(), output="head")
    lstm = nn.LSTM(3, 2)
    with (
        pytest.raises(
            UnsupportedError, match="returns one tensor, found `LSTM` that returns `tuple`"
        ),
        curvature(DiagGGNExact(), output=lstm),
    ):
        lstm(torch.ones(4, 2, 3))


def test_linear_loss_warns():
    problem = small_problem(CONVEX[0])
    model = nn.Sequential(problem.model, nn.LogSoftmax(1))
    with (
        pytest.warns(UserWarning, match="The GGN is zero: the loss is linear in `output`"),
        curvature(DiagGGNExact(), output=model),
    ):
        (-model(problem.X)[torch.arange(4), problem.y]).mean().backward()
    assert not problem.model[0].weight.diag_ggn_exact.any()


@overridable_backward
def test_several_losses_in_one_backward_are_refused():
    layer = nn.Linear(3, 2)
    with curvature(DiagGGNExact()):
        losses = [F.mse_loss(layer(torch.ones(4, 3)), torch.ones(4, 2)) for _ in range(2)]
        with pytest.raises(UnsupportedError, match=r"expects one loss .* found 2"):
            torch.autograd.backward(losses)


@overridable_backward
def test_autograd_backward_takes_its_arguments():
    problem = small_problem(LOSS["mse"])
    with curvature(DiagGGNExact(), BatchGrad()):
        loss = F.mse_loss(problem.model(problem.X), problem.y, reduction="none")
        torch.autograd.backward(
            [loss], [torch.full_like(loss, 1 / loss.numel())], retain_graph=True
        )
    assert_fields(problem, "diag_ggn_exact", oracle.diag_ggn(problem))
    assert_fields(problem, "grad_batch", oracle.grad_batch(problem))

"""Losses that torch has no function for: the network's outputs are found, and the curvature there, by brute force.

The oracle is told where the network ends: a row is a network with outputs ``f_1, f_2, ...`` and a
loss of them. Its GGN of sample n is ``J_n^T H_n^+ J_n`` with the positive part of the Hessian of
the loss of that sample by all its outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from estimates import RUNS, assert_unbiased
from refused_ops import Once
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    kl_divergence,
)
from zoo import assert_close

from lightning_curv import curvature
from lightning_curv.errors import NoSecondDerivativeError, UnsupportedError
from lightning_curv.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    JacobianExact,
    SqrtGGNExact,
)
from lightning_curv.kernels.symmetric import root_product
from lightning_curv.losses import autograd

Outputs = Sequence[Tensor]


# --- networks: from X [N, 5] to a list of outputs ---------------------------------------------------------------------


class Heads(nn.Module):
    """A body and one linear head per output."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.body = nn.Linear(5, 4)
        self.heads = nn.ModuleList(nn.Linear(4, size) for size in sizes)

    def forward(self, X: Tensor) -> Outputs:
        h = torch.tanh(self.body(X))
        return [head(h) for head in self.heads]


class Tokens(nn.Module):
    """Logits ``[N, 3, 4]`` of three tokens that look at each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.output = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, X: Tensor) -> Outputs:
        h = self.norm(self.embedding(X[:, :3, None] * X[:, 1:4, None].repeat(1, 1, 2)))
        return [self.output(torch.sigmoid(h + h.mean(1, keepdim=True)))]


class Pixels(nn.Module):
    """Scores ``[N, 2, 3, 3]`` of the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, X: Tensor) -> Outputs:
        image = X[:, :3, None] * X[:, None, 2:5]
        return [self.last(torch.tanh(self.first(image[:, None])))]


class Autoencoder(nn.Module):
    """Mean, log-variance, and the reconstruction of a draw: outputs below an output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_variance = (
            nn.Linear(5, 4),
            nn.Linear(4, 2),
            nn.Linear(4, 2),
        )
        self.decoder = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 5))

    def forward(self, X: Tensor) -> Outputs:
        h = torch.tanh(self.encoder(X))
        mean, log_variance = self.mean(h), self.log_variance(h)
        noise = torch.linspace(-1, 1, mean.numel(), dtype=mean.dtype).reshape(mean.shape)
        return [self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance]


class Scale(nn.Module):
    """Mean and scale by one layer each, the scale by an op that the loss shares with the network."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.raw, self.last = nn.Linear(5, 3), nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, X: Tensor) -> Outputs:
        raw = self.raw(torch.tanh(self.body(X)))
        self.scale = F.softplus(raw)  # used by the loss, and by the next layer
        return [self.last(self.scale), raw]


class FreeScale(nn.Module):
    """A mean and a scale that is a parameter: where it meets the samples it is an output of each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(5, 3), nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, X: Tensor) -> Outputs:
        mean, self.scale = self.mean(X), self.log_scale.exp()
        return [mean, self.scale.expand_as(mean)]


# --- losses: of a list of outputs and targets y [N, 5], a sum over the samples ----------------------------------------


def quantile(f: Outputs, y: Tensor) -> Tensor:
    error = y[:, :3] - f[0]
    return torch.max(0.9 * error, -0.1 * error).sum()


def hinge(f: Outputs, y: Tensor) -> Tensor:
    return (1 - y[:, :3].sign() * f[0]).clamp(min=0).sum()


def labels(y: Tensor, classes: int) -> Tensor:
    return (10 * y[:, 0]).abs().long() % classes


def cross_entropy(f: Outputs, y: Tensor) -> Tensor:
    log_p = f[0].log_softmax(1)
    return -log_p.gather(1, labels(y, f[0].shape[1])[:, None]).sum()


def smoothed(f: Outputs, y: Tensor) -> Tensor:
    log_p = f[0].log_softmax(-1)
    return 0.9 * cross_entropy(f, y) - 0.1 * log_p.mean(-1).sum()


def focal(f: Outputs, y: Tensor) -> Tensor:
    log_p = f[0].log_softmax(1).gather(1, labels(y, f[0].shape[1])[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).sum()


def focal_of_known(f: Outputs, y: Tensor) -> Tensor:
    entropy = F.cross_entropy(f[0], labels(y, f[0].shape[1]), reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).sum()


def root_of_squares(f: Outputs, y: Tensor) -> Tensor:
    return F.mse_loss(f[0], y[:, :3], reduction="none").mean(1).add(0.1).sqrt().sum()


def sum_of_known(f: Outputs, y: Tensor) -> Tensor:
    return 2 * F.mse_loss(f[0], y[:, :3], reduction="sum") + F.cross_entropy(
        f[1], labels(y, 2), reduction="sum"
    )


def known_and_own(f: Outputs, y: Tensor) -> Tensor:
    return (
        F.cross_entropy(f[0], labels(y, 3), reduction="sum")
        + 0.3 * f[0].pow(4).sum()
        + f[0].abs().sum()
    )


def around_a_known(f: Outputs, y: Tensor) -> Tensor:
    return F.mse_loss(f[0], y[:, :3], reduction="sum") + f[0].sum()


def known_and_function_of_it(f: Outputs, y: Tensor) -> Tensor:
    entropy = F.cross_entropy(f[0], labels(y, 3), reduction="none")
    return entropy.sum() + entropy.square().sum()


def trainable_target(f: Outputs, y: Tensor) -> Tensor:
    return F.mse_loss(f[0], 2 * f[1], reduction="sum")


def distillation(f: Outputs, y: Tensor) -> Tensor:
    return F.kl_div(f[0].log_softmax(1), f[1].softmax(1), reduction="sum")


def gaussian(f: Outputs, y: Tensor) -> Tensor:
    return -Normal(f[0], F.softplus(f[1])).log_prob(y[:, :3]).sum()


def student(f: Outputs, y: Tensor) -> Tensor:
    return -StudentT(3 + F.softplus(f[2]), f[0], F.softplus(f[1])).log_prob(y[:, :3]).sum()


def mixture(f: Outputs, y: Tensor) -> Tensor:
    parts = Normal(f[1], F.softplus(f[2]) + 0.1)
    return -MixtureSameFamily(Categorical(logits=f[0]), parts).log_prob(y[:, 0]).sum()


def correlated(f: Outputs, y: Tensor) -> Tensor:
    factor = torch.diag_embed(F.softplus(f[1]) + 0.5) + torch.tril(f[2].unflatten(1, (3, 3)), -1)
    return (
        -MultivariateNormal(f[0], scale_tril=factor, validate_args=False).log_prob(y[:, :3]).sum()
    )


def elbo(f: Outputs, y: Tensor) -> Tensor:
    output, mean, log_variance = f
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (output - y).square().sum() + divergence


def elbo_of_known(f: Outputs, y: Tensor) -> Tensor:
    posterior = Normal(f[1], (f[2] / 2).exp())
    prior = Normal(torch.zeros_like(f[1]), torch.ones_like(f[1]))
    likelihood = F.binary_cross_entropy_with_logits(f[0], y.sigmoid(), reduction="sum")
    return likelihood + kl_divergence(posterior, prior).sum()


def dice(f: Outputs, y: Tensor) -> Tensor:
    p, target = (
        f[0].sigmoid().flatten(1),
        (y > 0).to(y.dtype)[:, :3, None].repeat(1, 2, 3).flatten(1),
    )
    return (1 - 2 * (p * target).sum(1) / (p.sum(1) + target.sum(1) + 1)).sum()


def jaccard(f: Outputs, y: Tensor) -> Tensor:
    p, target = f[0].softmax(1)[:, 0].flatten(1), (y > 0).to(y.dtype)[:, :3].repeat(1, 3)
    both = (p * target).sum(1)
    return (1 - both / (p.sum(1) + target.sum(1) - both)).sum()


def boxes(f: Outputs, y: Tensor) -> Tensor:
    """Generalised IoU of boxes (x, y, width, height), with the L1 distance of detectors."""
    low, size = f[0][:, :2], F.softplus(f[0][:, 2:]) + 0.2
    low_y, size_y = y[:, :2], y[:, 2:4].abs() + 0.3
    shared = (
        (torch.minimum(low + size, low_y + size_y) - torch.maximum(low, low_y)).clamp(min=0).prod(1)
    )
    union = size.prod(1) + size_y.prod(1) - shared
    hull = (torch.maximum(low + size, low_y + size_y) - torch.minimum(low, low_y)).prod(1)
    return (1 - shared / union + (hull - union) / hull).sum() + 5 * (f[0] - y[:, :4]).abs().sum()


def pixelwise(f: Outputs, y: Tensor) -> Tensor:
    log_p = f[0].log_softmax(1)
    return -(log_p * y[:, None, :3, None].sigmoid()).sum()


def masked_tokens(f: Outputs, y: Tensor) -> Tensor:
    mask = y[:, :3] > -0.5
    target = (10 * y[:, :3]).abs().long() % 4
    return -f[0].log_softmax(-1).gather(2, target[..., None]).squeeze(2).masked_select(mask).sum()


def token_squares(f: Outputs, y: Tensor) -> Tensor:
    """A function of every token's entries together, and one of all tokens together."""
    return f[0].norm(dim=-1).pow(3).sum() + 0.1 * f[0].sum((1, 2)).pow(4).sum()


def triplet(f: Outputs, y: Tensor) -> Tensor:
    near, far = (f[0] - f[1]).square().sum(1), (f[0] - f[2]).square().sum(1)
    return F.softplus(near - far).sum()


def two_heads(f: Outputs, y: Tensor) -> Tensor:
    return cross_entropy(f[:1], y) + 0.5 * cross_entropy(f[1:], y)


def ctc(f: Outputs, y: Tensor) -> Tensor:
    log_p, target = f[0].log_softmax(-1).transpose(0, 1), 1 + (10 * y[:, :2]).abs().long() % 3
    lengths = torch.full((len(y),), 3), 1 + (y[:, 2] > 0).long()
    return F.ctc_loss(log_p, target, *lengths, reduction="sum", zero_infinity=True)


def correlated_rows(f: Outputs, y: Tensor) -> Tensor:
    """Concave along some directions."""
    return f[0].square().sum(1).sin().sum() + f[0].logsumexp(1).sum()


def shared_scale(f: Outputs, y: Tensor) -> Tensor:
    scale = F.softplus(f[1])
    return (((f[0] - y[:, :2]) / scale).square() / 2 + scale.log()).sum()


def free_scale(f: Outputs, y: Tensor) -> Tensor:
    return -Normal(f[0], f[1]).log_prob(y[:, :3]).sum()


@dataclass(frozen=True)
class Row:
    """A network and a loss of its outputs."""

    loss: Callable[[Outputs, Tensor], Tensor]
    network: Callable[[], nn.Module]
    own: Callable[[nn.Module, Outputs, Tensor], Tensor] | None = (
        None  # the loss in the forward pass, if it differs
    )

    def problem(self, count: int) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(len(self.loss.__name__))
        return self.network().double(), *torch.randn(2, count, 5, dtype=torch.float64)

    def value(self, network: nn.Module, X: Tensor, y: Tensor) -> Tensor:
        f = network(X)
        return self.loss(f, y) if self.own is None else self.own(network, f, y)


def with_the_scale_of_the_network(network: nn.Module, f: Outputs, y: Tensor) -> Tensor:
    return (((f[0] - y[:, :2]) / network.scale).square() / 2 + network.scale.log()).sum()


def with_a_free_scale(network: nn.Module, f: Outputs, y: Tensor) -> Tensor:
    return free_scale([f[0], network.scale], y)


FLAT = [Row(quantile, lambda: Heads(3)), Row(hinge, lambda: Heads(3))]
CURVED = [
    Row(cross_entropy, lambda: Heads(3)),
    Row(smoothed, lambda: Heads(3)),
    Row(focal, lambda: Heads(3)),
    Row(focal_of_known, lambda: Heads(3)),
    Row(root_of_squares, lambda: Heads(3)),
    Row(sum_of_known, lambda: Heads(3, 2)),
    Row(known_and_own, lambda: Heads(3)),
    Row(around_a_known, lambda: Heads(3)),
    Row(known_and_function_of_it, lambda: Heads(3)),
    Row(trainable_target, lambda: Heads(3, 3)),
    Row(distillation, lambda: Heads(3, 3)),
    Row(gaussian, lambda: Heads(3, 3)),
    Row(student, lambda: Heads(3, 3, 3)),
    Row(mixture, lambda: Heads(2, 2, 2)),
    Row(correlated, lambda: Heads(3, 3, 9)),
    Row(elbo, Autoencoder),
    Row(elbo_of_known, Autoencoder),
    Row(dice, Pixels),
    Row(jaccard, Pixels),
    Row(pixelwise, Pixels),
    Row(boxes, lambda: Heads(4)),
    Row(masked_tokens, Tokens),
    Row(token_squares, Tokens),
    Row(ctc, Tokens),
    Row(triplet, lambda: Heads(3, 3, 3)),
    Row(two_heads, lambda: Heads(3, 2)),
    Row(shared_scale, Scale, with_the_scale_of_the_network),
    Row(free_scale, FreeScale, with_a_free_scale),
]


# --- the oracle -------------------------------------------------------------------------------------------------------


def hessian_at_outputs(row: Row, outputs: Outputs, y: Tensor) -> Tensor:
    """``[E, E]`` by the entries of all outputs."""
    sizes, flat = [f.numel() for f in outputs], torch.cat([f.detach().flatten() for f in outputs])

    def loss(entries: Tensor) -> Tensor:
        parts = entries.split(sizes)
        return row.loss([part.reshape(f.shape) for part, f in zip(parts, outputs)], y)

    if row.loss is ctc:  # torch cannot differentiate it twice
        return finite_differences(loss, flat)
    return torch.autograd.functional.hessian(loss, flat)


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    step = 1e-5 * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(gradient(at + e) - gradient(at - e)) / 2e-5 for e in step])


def positive(hessian: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
    return vectors @ torch.diag(values.clamp(min=0)) @ vectors.T


def jacobian(network: nn.Module, X: Tensor, parameter: Tensor) -> Tensor:
    """``[E, P]`` by the entries of all outputs."""
    entries = torch.cat([f.flatten() for f in network(X)])
    rows = [
        torch.autograd.grad(e, parameter, retain_graph=True, materialize_grads=True)[0]
        for e in entries
    ]
    return torch.stack([r.flatten() for r in rows])


def ggn_blocks(row: Row, network: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """``[N, P, P]`` for every parameter."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in network.named_parameters()}
    whole = network(X)
    for n in range(len(X)):
        own = [f[n : n + 1] for f in whole]
        H = positive(hessian_at_outputs(row, own, y[n : n + 1]))
        for name, p in network.named_parameters():
            entries = torch.cat([f.flatten() for f in own])
            rows = [
                torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True)[0]
                for e in entries
            ]
            J = torch.stack([r.flatten() for r in rows])
            found[name].append(J.T @ H @ J)
    return {name: torch.stack(blocks) for name, blocks in found.items()}


def hessian_block(loss: Tensor, parameter: Tensor) -> Tensor:
    """``[P, P]``"""
    (g,) = torch.autograd.grad(loss, parameter, create_graph=True, materialize_grads=True)
    if not g.requires_grad:
        return torch.zeros(g.numel(), g.numel(), dtype=g.dtype)
    rows = [
        torch.autograd.grad(e, parameter, retain_graph=True, materialize_grads=True)[0]
        for e in g.flatten()
    ]
    return torch.stack([r.flatten() for r in rows])


def computed(row: Row, network: nn.Module, X: Tensor, y: Tensor, *extensions, **options) -> None:
    with warnings.catch_warnings(), curvature(*extensions, **options):
        warnings.simplefilter("ignore", UserWarning)
        row.value(network, X, y).backward()


def each(rows: Sequence[Row]):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.loss.__name__)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
@each([*CURVED, *FLAT])
def test_ggn_equals_brute_force(row, count):
    network, X, y = row.problem(count)
    blocks = ggn_blocks(row, network, X, y)
    rtol = 1e-4 if row.loss is ctc else 1e-6  # its reference is a finite difference
    computed(
        row,
        network,
        X,
        y,
        DiagGGNExact(),
        BatchDiagGGNExact(),
        SqrtGGNExact(),
        GGNMP(),
        batch_size=count,
    )
    for name, p in network.named_parameters():
        largest = max(block.abs().max().item() for block in blocks.values())
        diagonals = blocks[name].diagonal(dim1=1, dim2=2)
        V, v = p.sqrt_ggn_exact.flatten(2), torch.cos(torch.arange(p.numel(), dtype=p.dtype))
        close = {"rtol": rtol, "label": name, "rounding": 1e-9 * largest}
        assert_close(p.diag_ggn_exact.flatten(), diagonals.sum(0), **close)
        assert_close(p.diag_ggn_exact_batch.flatten(1), diagonals, **close)
        assert_close(torch.einsum("vnp,vnq->npq", V, V), blocks[name], **close)
        assert_close(p.ggnmp(v.reshape(p.shape)).flatten(), blocks[name].sum(0) @ v, **close)
    assert row in FLAT or any(block.any() for block in blocks.values())


@pytest.mark.parametrize("count", [1, 4])
@each([row for row in [*CURVED, *FLAT] if row.loss not in (ctc, free_scale)])
def test_hessian_equals_brute_force(row, count):
    network, X, y = row.problem(count)
    computed(row, network, X, y, DiagHessian(), BatchDiagHessian(), HMP(), batch_size=count)
    whole = row.value(network, X, y)
    for name, p in network.named_parameters():
        H, v = hessian_block(whole, p), torch.cos(torch.arange(p.numel(), dtype=p.dtype))
        assert_close(p.diag_h.flatten(), H.diagonal(), label=name, rounding=1e-12)
        assert_close(p.diag_h_batch.flatten(1).sum(0), H.diagonal(), label=name, rounding=1e-12)
        assert_close(p.hmp(v.reshape(p.shape)).flatten(), H @ v, label=name, rounding=1e-12)


@each(
    [row for row in CURVED if row.loss in (cross_entropy, gaussian, elbo, pixelwise, masked_tokens)]
)
def test_samples_are_unbiased(row):
    network, X, y = row.problem(3)
    name, p = next(iter(network.named_parameters()))
    generator, runs = torch.Generator().manual_seed(0), []
    for _ in range(RUNS):
        computed(row, network, X, y, DiagGGNMC(mc_samples=16), generator=generator)
        runs.append(p.diag_ggn_mc)
    expected = ggn_blocks(row, network, X, y)[name].sum(0).diagonal().reshape(p.shape)
    assert_unbiased(torch.stack(runs), expected, name)


@pytest.mark.parametrize("steps", [4, 32, 60])
def test_roots_by_products_alone(steps):
    """Exact in as many steps as there are entries; squared lengths of positive matrices are exact in any number."""
    torch.manual_seed(0)
    p = torch.randn(3, 2, 40, dtype=torch.float64).softmax(-1)
    p[0, 1] = torch.eye(40)[0]  # a matrix of zeros
    H, v = (
        torch.diag_embed(p) - p[..., None] * p[..., None, :],
        torch.randn(3, 2, 40, dtype=torch.float64),
    )
    found = root_product(lambda x: (H @ x[..., None])[..., 0], v, steps)
    assert_close(found.square().sum(-1), (v * (H @ v[..., None])[..., 0]).sum(-1), rounding=1e-14)
    values, vectors = torch.linalg.eigh(H)
    root = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    expected = (root @ v[..., None])[..., 0]
    error = (found - expected).norm() / expected.norm()
    assert error < {4: 0.1, 32: 1e-3, 60: 1e-6}[steps]


@pytest.mark.parametrize("loss", [cross_entropy, correlated_rows])
def test_samples_of_many_classes_take_no_matrix(loss, monkeypatch):
    row = Row(loss, lambda: Heads(12))
    network, X, y = row.problem(3)
    name, p = next(iter(network.named_parameters()))
    monkeypatch.setattr(autograd, "LARGE", 4)
    monkeypatch.setattr(autograd.Quadratic, "_hessian", None)
    generator, runs = torch.Generator().manual_seed(0), []
    for _ in range(RUNS):
        computed(row, network, X, y, DiagGGNMC(mc_samples=16), generator=generator)
        runs.append(p.diag_ggn_mc)
    expected = ggn_blocks(row, network, X, y)[name].sum(0).diagonal().reshape(p.shape)
    assert_unbiased(torch.stack(runs), expected, name)


def test_known_losses_that_are_added_up_in_any_order_stay_known(monkeypatch):
    """By graph, by a product with a mask, by the hardest: no differentiation."""
    monkeypatch.setattr(autograd.Quadratic, "_hessian", None)
    torch.manual_seed(0)
    layer, X, y = (
        nn.Linear(3, 2).double(),
        torch.randn(6, 3).double(),
        torch.tensor([0, 1, 1, 0, 1, 0]),
    )

    def ways(entropy):
        yield torch.zeros(2, dtype=entropy.dtype).index_add(0, torch.arange(6) % 2, entropy).sum()
        yield (entropy[None] @ torch.ones(6, 1, dtype=entropy.dtype)).sum()
        yield entropy.topk(6).values.clamp(max=100).sum()

    diagonals = []
    for way in range(3):
        with curvature(DiagGGNExact()):
            [*ways(F.cross_entropy(layer(X), y, reduction="none"))][way].backward()
        diagonals.append(layer.weight.diag_ggn_exact)
    with curvature(DiagGGNExact()):
        F.cross_entropy(layer(X), y, reduction="sum").backward()
    for found in diagonals:
        assert_close(found, layer.weight.diag_ggn_exact)


def test_matrices_beyond_memory_are_refused(monkeypatch):
    network, X, y = CURVED[0].problem(4)
    monkeypatch.setattr(autograd, "MOST", 2)
    with pytest.raises(UnsupportedError, match=r"3 x 3 numbers.*Use Monte-Carlo quantities"):
        computed(CURVED[0], network, X, y, DiagGGNExact())


def test_complex_outputs_are_refused():
    layer = nn.Linear(5, 3).to(torch.complex128)
    with pytest.raises(UnsupportedError, match="real numbers"), curvature(GGNMP()):
        layer(torch.ones(4, 5, dtype=torch.complex128)).abs().pow(4).sum().backward()


@each([row for row in CURVED if row.loss in (cross_entropy, focal, gaussian, two_heads)])
def test_kronecker_factors_of_one_datum_are_the_block(row):
    network, X, y = row.problem(1)
    blocks = ggn_blocks(row, network, X, y)
    computed(row, network, X, y, KFLR(), batch_size=1)
    for head in network.heads:
        expected = next(blocks[name] for name, p in network.named_parameters() if p is head.weight)
        assert_close(torch.kron(*head.weight.kflr), expected[0])


def test_recursion_of_a_chain_has_the_curvature_of_the_loss():
    row = CURVED[0]
    network, X, y = row.problem(1)
    computed(row, network, X, y, KFRA(), KFLR(), batch_size=1)
    assert_close(network.heads[0].weight.kfra[0], network.heads[0].weight.kflr[0])


def test_outputs_of_the_users_choice_agree():
    """The output that is found is the one that `output=` names."""
    network, X, y = CURVED[0].problem(4)
    computed(CURVED[0], network, X, y, DiagGGNExact())
    found = network.body.weight.diag_ggn_exact
    computed(CURVED[0], network, X, y, DiagGGNExact(), output=network.heads[0])
    assert_close(found, network.body.weight.diag_ggn_exact)


def test_a_known_loss_beside_another_keeps_its_own_curvature():
    """A sum of parts: the positive part is taken of what no function of torch covers, and of nothing else."""
    torch.manual_seed(0)
    layer, X, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()

    def diagonal(squares: float, sine: float) -> Tensor:
        with curvature(DiagGGNExact()):
            f = layer(X)
            (squares * F.mse_loss(f, y) + sine * f.sin().sum()).backward()
        return layer.weight.diag_ggn_exact

    own = diagonal(0.0, 1.0)
    assert own.any()
    assert_close(diagonal(2.0, 1.0), 2 * diagonal(1.0, 0.0) + own)
    f = layer(X)
    expected = torch.einsum("no,ni->oi", (-f.sin()).clamp(min=0), X.square())
    assert_close(own, expected)


# --- losses that mix samples ------------------------------------------------------------------------------------------


def contrastive(f: Outputs, y: Tensor) -> Tensor:
    z = F.normalize(torch.cat(list(f)), dim=1)
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    positives = torch.arange(len(z)).roll(len(z) // 2)
    return -similar.log_softmax(1).gather(1, positives[:, None]).mean()


def root_of_the_mean(f: Outputs, y: Tensor) -> Tensor:
    return F.mse_loss(f[0], y[:, :3]).sqrt()


def deviation(f: Outputs, y: Tensor) -> Tensor:
    return (f[0] - f[0].mean(0)).pow(4).sum()


MIXING = [
    Row(contrastive, lambda: Heads(3, 3)),
    Row(root_of_the_mean, lambda: Heads(3)),
    Row(deviation, lambda: Heads(3)),
]


@each(MIXING)
def test_products_take_the_batch_as_one_sample(row):
    network, X, y = row.problem(4)
    computed(row, network, X, y, GGNMP(), HMP())
    H = positive(hessian_at_outputs(row, network(X), y))
    assert (
        torch.linalg.eigvalsh(hessian_at_outputs(row, network(X), y)) < -1e-6
    ).any() or row.loss is not contrastive
    for name, p in network.named_parameters():
        J, v = jacobian(network, X, p), torch.cos(torch.arange(p.numel(), dtype=p.dtype))
        assert_close(
            p.ggnmp(v.reshape(p.shape)).flatten(), J.T @ H @ J @ v, label=name, rounding=1e-12
        )
        expected = hessian_block(row.value(network, X, y), p) @ v
        assert_close(p.hmp(v.reshape(p.shape)).flatten(), expected, label=name, rounding=1e-12)


@each(MIXING)
@pytest.mark.parametrize(
    "extension", [BatchGrad, DiagGGNExact, DiagGGNMC, SqrtGGNExact, DiagHessian]
)
def test_quantities_of_samples_are_refused(row, extension):
    network, X, y = row.problem(4)
    with pytest.raises(UnsupportedError, match="samples that do not influence each other"):
        computed(row, network, X, y, extension())


@each(MIXING)
def test_kronecker_factors_take_the_other_samples_as_given(row):
    """The blocks of the batch's curvature on the diagonal of the samples."""
    network, X, y = row.problem(4)
    computed(row, network, X, y, KFLR(), KFAC(), JacobianExact())
    H = positive(hessian_at_outputs(row, network(X), y))
    J = network.heads[0].bias.jacobian_exact.per_sample()
    sizes = [f[0].numel() for f in network(X)]
    own = [torch.arange(n * sizes[0], (n + 1) * sizes[0]) for n in range(4)]  # of the first output
    expected = torch.stack([H[i][:, i] for i in own])
    assert_close(torch.einsum("vni,vnj->nij", J, J), expected)
    assert_close(network.heads[0].bias.kflr[0], expected.sum(0))
    assert all(factor.isfinite().all() for factor in network.heads[0].weight.kfac)


# --- refusals ---------------------------------------------------------------------------------------------------------


def once(f: Outputs, y: Tensor) -> Tensor:
    return Once.apply(f[0])


@pytest.mark.parametrize("extension", [DiagGGNExact, DiagGGNMC, KFLR, DiagHessian])
def test_a_loss_without_second_derivative_is_refused(extension):
    network, X, y = Row(once, lambda: Heads(3)).problem(4)
    with pytest.raises(
        NoSecondDerivativeError, match=r"this loss has none.*`OnceBackward`.*First-order"
    ):
        computed(Row(once, lambda: Heads(3)), network, X, y, extension(), batch_size=4)


def test_first_order_quantities_need_no_second_derivative():
    row = Row(once, lambda: Heads(3))
    network, X, y = row.problem(4)
    computed(row, network, X, y, BatchGrad(), batch_size=4)
    p = network.heads[0].weight
    rows = [
        torch.autograd.grad(row.value(network, X[n : n + 1], y[n : n + 1]), p)[0] for n in range(4)
    ]
    assert_close(p.grad_batch, torch.stack(rows))


def test_a_recursion_needs_one_output():
    network, X, y = CURVED[11].problem(4)
    with pytest.raises(
        UnsupportedError, match="KFRA expects one loss of one output, found losses of 2"
    ):
        computed(CURVED[11], network, X, y, KFRA())


def test_all_is_zero_where_the_batch_is_empty():
    network, _, _ = CURVED[0].problem(1)
    X, y = torch.empty(2, 0, 5, dtype=torch.float64).unbind()
    computed(CURVED[0], network, X, y, DiagGGNExact())
    assert not network.body.weight.diag_ggn_exact.any()
    assert math.prod(network.body.weight.diag_ggn_exact.shape) == network.body.weight.numel()


@pytest.mark.parametrize("draws", [1, 3])
def test_several_draws_of_every_sample_may_lie_in_front(draws):
    """Importance-weighted bounds: [K, N, ...] with a logarithm of a sum over K."""
    torch.manual_seed(0)
    network = nn.Linear(2, 3).double()
    z, x = torch.randn(draws, 4, 2).double(), torch.rand(4, 3).double()

    def losses(outputs: Tensor) -> Tensor:
        return -(-(outputs - x).square().sum(2)).logsumexp(0)

    with curvature(DiagGGNExact(), GGNMP(), DiagHessian(), batch_size=4):
        losses(network(z)).mean().backward()
    outputs = network(z)
    entries = outputs.movedim(1, 0).reshape(4, -1)
    hessians = [
        torch.autograd.functional.hessian(
            lambda own, n=n: losses(
                torch.cat([outputs[:, :n], own[:, None], outputs[:, n + 1 :]], 1)
            )[n],
            outputs[:, n].detach(),
        ).reshape(entries.shape[1], -1)
        / 4
        for n in range(4)
    ]
    for parameter in network.parameters():
        rows = [
            [
                torch.autograd.grad(entry, parameter, retain_graph=True)[0].flatten()
                for entry in entries[n]
            ]
            for n in range(4)
        ]
        jacobians = [torch.stack(own) for own in rows]
        ggn = sum(J.T @ positive(H) @ J for J, H in zip(jacobians, hessians))
        hessian = sum(J.T @ H @ J for J, H in zip(jacobians, hessians))
        vector = torch.rand_like(parameter)
        assert_close(parameter.diag_ggn_exact.flatten(), ggn.diagonal())
        assert_close(parameter.ggnmp(vector[None]).flatten(), ggn @ vector.flatten())
        assert_close(parameter.diag_h.flatten(), hessian.diagonal())

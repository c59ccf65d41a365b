"""Make the pictures of docs/concepts.md: all matrices of one small network on twelve iris flowers.

python docs/make_concepts.py
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from lightning_curv import HMP, KFAC, KFLR, BatchGrad, SqrtGGNExact, Variance, curvature

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

IMAGES = Path(__file__).with_name("images")
plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "savefig.dpi": 110})


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Four features, five hidden units, three kinds of iris: 43 parameters, after a few steps of training."""
    torch.manual_seed(0)
    data = load_iris()
    X, y = torch.tensor(data.data).float(), torch.tensor(data.target)
    X = (X - X.mean(0)) / X.std(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(net(X), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    chosen = torch.arange(0, 150, 13)
    return net, X[chosen], y[chosen]


def show(
    axis: Axes, matrix: Tensor, title: str, limit: float | None = None, lines: Sequence[int] = ()
) -> None:
    """A matrix, red where positive and blue where negative, with lines between the parameters."""
    limit = limit or float(matrix.abs().max())
    axis.imshow(matrix.detach(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
    for line in lines:
        axis.axvline(line - 0.5, color="black", lw=0.5)
        if matrix.shape[0] == matrix.shape[1]:
            axis.axhline(line - 0.5, color="black", lw=0.5)


def label(axis: Axes, net: nn.Module, rows: bool = True) -> None:
    """Names of the parameters beside their rows and below their columns."""
    names = [
        name.replace("0.", "layer 1 ").replace("2.", "layer 2 ")
        for name, _ in net.named_parameters()
    ]
    sizes = [p.numel() for p in net.parameters()]
    middles = [sum(sizes[:i]) + size / 2 - 0.5 for i, size in enumerate(sizes)]
    axis.set_xticks(middles, names, rotation=30, ha="right", fontsize=8)
    if rows:
        axis.set_yticks(middles, names, fontsize=8)
    axis.tick_params(length=0)


def flat(net: nn.Module, field: str, leading: int = 0) -> Tensor:
    """A quantity of all parameters side by side."""
    return torch.cat([getattr(p, field).flatten(leading) for p in net.parameters()], -1)


def edges(net: nn.Module) -> list[int]:
    """Where one parameter ends and the next begins."""
    sizes = [p.numel() for p in net.parameters()]
    return [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]


def gradients(net: nn.Module, X: Tensor, y: Tensor) -> None:
    with curvature(BatchGrad(), Variance()):
        F.cross_entropy(net(X), y).backward()
    samples, total, variance = flat(net, "grad_batch", 1), flat(net, "grad"), flat(net, "variance")
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(9, 5.2), height_ratios=[12, 1.4, 1.4], layout="constrained"
    )
    show(
        top,
        samples,
        "grad_batch: one row per sample, one column per parameter entry",
        lines=edges(net),
    )
    show(middle, total[None], "grad: the sum of the rows", lines=edges(net))
    show(bottom, variance[None], "variance: how much the rows differ", lines=edges(net))
    top.set(aspect="auto", ylabel="samples")
    for axis in (middle, bottom):
        axis.set(aspect="auto")
    label(bottom, net, rows=False)
    figure.savefig(IMAGES / "concepts_gradients.png")


def ggn(net: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    with curvature(SqrtGGNExact()):
        F.cross_entropy(net(X), y).backward()
    root = flat(net, "sqrt_ggn_exact", 2).flatten(0, 1)
    matrix = root.T @ root
    limit = float(matrix.abs().max()) / 2
    blocks = torch.block_diag(*(block for block in diagonal_blocks(net, matrix)))
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.9), layout="constrained", width_ratios=[1, 1, 1, 1]
    )
    show(axes[0], root, "V: sqrt_ggn_exact", lines=edges(net))
    axes[0].set(aspect="auto", ylabel="samples × classes")
    label(axes[0], net, rows=False)
    for axis, value, title in zip(
        axes[1:],
        (matrix, blocks, matrix.diag().diag()),
        ("GGN = VᵀV", "its blocks: ggnmp multiplies by them", "its diagonal: diag_ggn_exact"),
    ):
        show(axis, value, title, limit, edges(net))
        label(axis, net, rows=False)
    figure.savefig(IMAGES / "concepts_ggn.png")
    return matrix


def diagonal_blocks(net: nn.Module, matrix: Tensor) -> list[Tensor]:
    starts = [0, *edges(net), len(matrix)]
    return [matrix[a:b, a:b] for a, b in pairwise(starts)]


def kronecker(net: nn.Module, X: Tensor, y: Tensor, matrix: Tensor) -> None:
    exact = diagonal_blocks(net, matrix)[0]
    weight, generator = net[0].weight, torch.Generator().manual_seed(0)
    with curvature(KFLR(), KFAC(mc_samples=1), generator=generator):
        F.cross_entropy(net(X), y).backward()
    (B, A), limit = weight.kflr, float(exact.abs().max())
    figure, axes = plt.subplots(
        1, 5, figsize=(13, 3), layout="constrained", width_ratios=[1, 0.6, 0.5, 1, 1]
    )
    show(axes[0], exact, "block of layer 1's weight", limit)
    show(axes[1], B, "B: outputs")
    show(axes[2], A, "A: inputs")
    show(axes[3], torch.kron(B, A), "KFLR: B ⊗ A", limit)
    show(axes[4], torch.kron(*weight.kfac), "KFAC: one draw per sample", limit)
    figure.savefig(IMAGES / "concepts_kronecker.png")


def hessians(net: nn.Module, X: Tensor, y: Tensor, matrix: Tensor) -> None:
    params = dict(net.named_parameters())
    shapes = [p.shape for p in net.parameters()]

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(params, pieces, shapes)}
        return F.cross_entropy(functional_call(net, values, (X,)), y)

    full = hessian(loss)(torch.cat([p.detach().flatten() for p in net.parameters()]))
    with curvature(HMP()):
        F.cross_entropy(net(X), y).backward()
    blocks = [p.hmp(torch.eye(p.numel()).view(-1, *p.shape)).flatten(1) for p in net.parameters()]
    limit = float(matrix.abs().max()) / 2
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    for axis, value, title in zip(
        axes,
        (full, matrix, full - matrix, torch.block_diag(*blocks)),
        ("Hessian", "= GGN", "+ residual", "blocks of the Hessian: hmp"),
    ):
        show(axis, value, title, limit, edges(net))
        label(axis, net, rows=False)
    figure.savefig(IMAGES / "concepts_hessian.png")


def main() -> None:
    net, X, y = problem()
    gradients(net, X, y)
    matrix = ggn(net, X, y)
    kronecker(net, X, y, matrix)
    hessians(net, X, y, matrix)


if __name__ == "__main__":
    main()

"""Every quantity on one batch of digits: what each extension leaves on the parameters after `loss.backward()`.

    python examples/all_extensions.py

Nothing here needs Lightning, and the model is any `nn.Module`. In the printed shapes N is the
number of samples, C of classes, M of Monte-Carlo draws, V of vectors, A and B are Kronecker factors
of a layer's inputs and outputs (a bias has only B), and *p stands for the parameter's own shape.
"""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shared
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
    curvature,
    extend,
)

Shapes = Mapping[Any, str]

FIRST_ORDER: Shapes = {
    BatchGrad(): "[N, *p]",
    BatchL2Grad(): "[N]",
    SumGradSquared(): "[*p]",
    Variance(): "[*p]",
}
GAUSS_NEWTON: Shapes = {
    DiagGGNExact(): "[*p]",
    DiagGGNMC(mc_samples=1): "[*p]",
    BatchDiagGGNExact(): "[N, *p]",
    BatchDiagGGNMC(mc_samples=1): "[N, *p]",
    SqrtGGNExact(): "[C, N, *p]",
    SqrtGGNMC(mc_samples=2): "[M, N, *p]",
}
KRONECKER: Shapes = {
    KFAC(mc_samples=1): "B ⊗ A",
    KFLR(): "B ⊗ A",
    KFRA(): "B ⊗ A",
}
HESSIAN: Shapes = {
    DiagHessian(): "[*p]",
    BatchDiagHessian(): "[N, *p]",
}
PRODUCTS: Shapes = {
    HMP(): "[V, *p]",
    GGNMP(): "[V, *p]",
    PCHMP(modify="clip"): "[V, *p]",
}


def cnn() -> nn.Module:
    layers = {
        "conv": nn.Conv2d(1, 4, 5, stride=2),
        "relu": nn.ReLU(inplace=True),
        "pool": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(4 * 6 * 6, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def shape(field: Any, parameter: Tensor) -> str:
    """The shape of a tensor, of each of several Kronecker factors, or of a product with three vectors."""
    if isinstance(field, list):
        return " ⊗ ".join(shape(factor, parameter) for factor in field)
    return str(
        list(field(torch.randn(3, *parameter.shape)).shape if callable(field) else field.shape)
    )


def show(model: nn.Module, title: str, shapes: Shapes) -> None:
    table = [["", "field", "shape", *(name for name, _ in model.named_parameters())]]
    for extension, documented in shapes.items():
        fields = [shape(getattr(p, extension.savefield), p) for p in model.parameters()]
        table.append([repr(extension), f".{extension.savefield}", documented, *fields])
    widths = [max(map(len, column)) for column in zip(*table)]
    print(f"\n{title}")
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def draw(weight: Tensor, path: Path) -> None:
    """The quantities of the four filters of the convolution, and its two Kronecker factors."""
    entries = {
        "gradient": weight.grad,
        "variance": weight.variance,
        "GGN diagonal": weight.diag_ggn_exact,
        "Hessian diagonal": weight.diag_h,
    }
    images = {name: value.flatten(1).view(4, 5, 5) for name, value in entries.items()}
    figure = shared.plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.2, 1])
    for row, (name, filters) in zip(left.subplots(4, 4), images.items()):
        limit = float(filters.abs().max())
        for axis, image in zip(row, filters):
            axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    left.suptitle("a convolution with 4 filters of 5 × 5, one column each")
    for axis, title, factor in zip(right.subplots(1, 2), ("B, outputs", "A, inputs"), weight.kfac):
        axis.imshow(factor, cmap="RdBu_r", vmin=-factor.abs().max(), vmax=factor.abs().max())
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(visible=False)
    right.suptitle("its KFAC factors, GGN ≈ B ⊗ A")
    shared.save(figure, path)


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    torch.manual_seed(0)
    model, (X, y) = cnn(), (tensor[:8] for tensor in shared.digits()[0].tensors)
    print("8 digits (N), 10 classes (C), 2 Monte-Carlo draws (M), 3 vectors (V)")

    # 1. Forward pass and loss inside the context: modules or functions, nothing to prepare.
    with curvature(*FIRST_ORDER):
        F.cross_entropy(model(X), y).backward()
    show(model, "First order: from the gradients of the samples", FIRST_ORDER)

    # 2. Draws of the model come from a generator of their own; training never sees a difference.
    with curvature(*GAUSS_NEWTON, generator=torch.Generator().manual_seed(0)):
        F.cross_entropy(model(X), y).backward()
    show(model, "Generalized Gauss-Newton matrix: diagonals and square roots", GAUSS_NEWTON)

    # 3. The way of BackPACK: extend once, run the forward pass anywhere, choose quantities around
    # `backward`.
    model, lossfunc = extend(model), extend(nn.CrossEntropyLoss())
    loss = lossfunc(model(X), y)
    with curvature(*KRONECKER):
        loss.backward()
    show(model, "Generalized Gauss-Newton matrix: Kronecker factors of each block", KRONECKER)

    # 4. The Hessian: its diagonal, and products with the block of each parameter, `p.hmp(V)`, which
    # keep the graph.
    model.zero_grad()  # each backward pass overwrites the quantities, but adds to the gradient
    with curvature(*HESSIAN, *PRODUCTS):
        lossfunc(model(X), y).backward()
    show(model, "Hessian: diagonal", HESSIAN)
    show(
        model,
        "Products with the block of the Hessian, the GGN, the positive-curvature Hessian",
        PRODUCTS,
    )

    weight = model.conv.weight
    differences = {
        "sum of the per-sample gradients - gradient": weight.grad_batch.sum(0) - weight.grad,
        "their squared norms - batch_l2": weight.grad_batch.flatten(1).square().sum(1)
        - weight.batch_l2,
        "squares of the GGN root - GGN diagonal": weight.sqrt_ggn_exact.square().sum((0, 1))
        - weight.diag_ggn_exact,
    }
    print("\nThree identities on the first weight, zero up to rounding")
    for name, difference in differences.items():
        print(f"  {name:45} {difference.abs().max():.1e}")
    draw(weight, options.out)


if __name__ == "__main__":
    main()

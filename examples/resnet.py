"""A residual network with BatchNorm: what is exact, what is approximate, and what is refused.

    python examples/resnet.py

With BatchNorm in training mode the samples of a batch influence each other: "the gradient of one
sample" does not exist, and quantities that need it are refused instead of computed. Products with
the Hessian need no samples and are exact. In evaluation mode, and with GroupNorm, everything is
exact. Kronecker factors are an approximation of the GGN in every mode, and take batch statistics as
given. Here each is compared with brute force; then KFAC trains the network.
"""

from collections.abc import Callable

import pytorch_lightning as pl
import shared
import torch
from torch import Tensor, nn
from torch.autograd.functional import hvp, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from lightning_curv import (
    HMP,
    KFLR,
    BatchGrad,
    CurvatureCallback,
    Extension,
    KFACOptimizer,
    SqrtGGNExact,
    curvature,
)


class Block(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))


def resnet(width: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 4, stride=4, bias=False), norm(width)),
        *(Block(width, norm), Block(width, norm)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def brute_force(model: nn.Module, name: str, X: Tensor, y: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The same by loops over samples and automatic differentiation of the whole loss, slowly."""
    weight = model.get_parameter(name).detach()

    def output(w: Tensor, X: Tensor = X) -> Tensor:
        return functional_call(model, {name: w}, (X,))

    def loss(w: Tensor, part: slice = slice(None)) -> Tensor:
        return F.cross_entropy(output(w, X[part]), y[part])

    p, J = output(weight).softmax(1), jacobian(output, weight).flatten(2)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(X)
    G = torch.einsum("nci,ncd,ndj->ij", J, H, J)
    gradients = [
        jacobian(lambda w, n=n: loss(w, slice(n, n + 1)), weight) / len(X) for n in range(len(X))
    ]
    return {"gradients": torch.stack(gradients), "ggn": G, "product": hvp(loss, weight, v)[1]}


def quantities(v: Tensor) -> dict[str, tuple[Extension, str, Callable[[Tensor], Tensor]]]:
    """Of which extension, to be compared with what, and what makes it out of the parameter."""
    return {
        "per-sample gradients": (BatchGrad(), "gradients", lambda p: p.grad_batch),
        "product with the Hessian": (HMP(), "product", lambda p: p.hmp(v)),
        "GGN": (
            SqrtGGNExact(),
            "ggn",
            lambda p: torch.einsum("cni,cnj->ij", *2 * [p.sqrt_ggn_exact.flatten(2)]),
        ),
        "Kronecker factors of the GGN": (KFLR(), "ggn", lambda p: torch.kron(*p.kflr)),
    }


def examine(model: nn.Module, X: Tensor, y: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Relative errors of the quantities of one convolution; and the quantities."""
    name = "2.conv2.weight"
    v = torch.randn_like(model.get_parameter(name))
    true, errors, values = (
        {k: t.detach() for k, t in brute_force(model, name, X, y, v).items()},
        {},
        {},
    )
    for row, (extension, key, value) in quantities(v).items():
        try:
            with curvature(extension):
                F.cross_entropy(model(X), y).backward()
        except RuntimeError:
            errors[row] = "refused"
        else:
            values[row] = value(model.get_parameter(name)).detach()
            errors[row] = f"{(values[row] - true[key]).norm() / true[key].norm():.1e}"
    return errors, values


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet(16)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test/accuracy", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return KFACOptimizer(self.parameters(), lr=0.1, damping=0.1)


def main() -> None:
    options = shared.parser(__doc__).parse_args()
    pl.seed_everything(0, verbose=False)
    X, y = (tensor[:16] for tensor in shared.digits()[0].tensors)
    group_norm = resnet(4, lambda width: nn.GroupNorm(2, width))
    models = {
        "BatchNorm, training": resnet(4),
        "BatchNorm, evaluation": resnet(4).eval(),
        "GroupNorm": group_norm,
    }
    examined = {title: examine(model.double(), X.double(), y) for title, model in models.items()}
    print(f"{'relative error to brute force':30}", *(f"{title:>22}" for title in models))
    for row in quantities(X):
        print(f"{row:30}", *(f"{errors[row]:>22}" for errors, _ in examined.values()))

    history = shared.History()
    monitor = CurvatureCallback(["grad_norm", "hessian_max_eigenvalue"], every_n_steps=5)
    trainer = shared.trainer(
        max_epochs=-1,
        max_steps=10 if options.quick else 150,
        log_every_n_steps=5,
        callbacks=[monitor],
        logger=history,
    )
    model, (train, test) = Digits(), shared.loaders(batch_size=128)
    trainer.fit(model, train)
    accuracy = trainer.validate(model, test, verbose=False)[0]["test/accuracy"]
    print(f"KFAC, BatchNorm: held-out accuracy {accuracy:.1%} after {trainer.global_step} steps")

    figure, axes = shared.plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    values = examined["GroupNorm"][1]
    limit = float(values["GGN"].abs().max()) / 4
    for axis, row in zip(axes, ("GGN", "Kronecker factors of the GGN")):
        axis.imshow(values[row], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=f"{row}, one convolution" if row == "GGN" else row, xticks=[], yticks=[])
    shared.draw(axes[2], history.series["train/loss"])
    axes[2].set(title="training loss, KFAC", xlabel="step")
    shared.draw(axes[3], history.series["curvature/hessian_max_eigenvalue"], color="C3")
    axes[3].set(title="largest eigenvalue of the Hessian", xlabel="step", yscale="log")
    shared.save(figure, options.out)


if __name__ == "__main__":
    main()

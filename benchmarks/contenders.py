"""One training step of every contender: ours, the plain gradient, BackPACK, `torch.func`, curvlinops, Opacus.

A maker takes a network, its data and the names of quantities, and returns the step: forward pass,
loss, backward pass and the quantities. It returns `None` where the contender has no such quantity,
and raises `ImportError` where it is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import POSITIONS, ClassesSecond, FirstOutput
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_curv

Step = Callable[[], Any]
Names = tuple[str, ...]

FIRST_ORDER = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
PRODUCTS = ("HMP", "GGNMP", "PCHMP")
TWICE = (*PRODUCTS, "DiagHessian", "BatchDiagHessian")  # fused attention has no second derivative


@dataclass(frozen=True)
class Comparison:
    """What is compared on a network.

    Attributes:
        names: the quantities, asked for together.
        smooth: whether the network gets sigmoids in place of ReLU, so that its own Hessian counts.
        beside: further settings of ours to compare with.
    """

    names: Names
    smooth: bool = False
    beside: dict[str, Names] = field(default_factory=dict)


_GGN = (
    "DiagGGNExact",
    "DiagGGNMC",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "SqrtGGNExact",
    "SqrtGGNMC",
)
_KRONECKER = ("KFAC", "KFLR", "KFRA", "GGNMP")
_HESSIAN = ("DiagHessian", "BatchDiagHessian", "HMP", "PCHMP")
COMPARISONS = {
    **{name: Comparison((name,)) for name in (*FIRST_ORDER, *_GGN, *_KRONECKER)},
    **{name: Comparison((name,), smooth=True) for name in _HESSIAN},
    "first order together": Comparison(FIRST_ORDER, beside={name: (name,) for name in FIRST_ORDER}),
    "DiagHessian, ReLU": Comparison(("DiagHessian",), beside={"DiagGGNExact": ("DiagGGNExact",)}),
    "BatchDiagHessian, ReLU": Comparison(
        ("BatchDiagHessian",), beside={"BatchDiagGGNExact": ("BatchDiagGGNExact",)}
    ),
    "HMP, ReLU": Comparison(("HMP",), beside={"GGNMP": ("GGNMP",)}),
    "record()": Comparison(()),
}
FIELDS = [
    getattr(lightning_curv, name)().savefield for c in COMPARISONS.values() for name in c.names
]


def plain(net: nn.Module, x: Tensor, y: Tensor, names: Names = ()) -> Step:
    return lambda: F.cross_entropy(net(x), y).backward()


def ours(net: nn.Module, x: Tensor, y: Tensor, names: Names) -> Step:
    extensions = [getattr(lightning_curv, name)() for name in names]
    twice = any(name in TWICE for name in names) and not isinstance(net, nn.Sequential)

    def step() -> None:
        attention = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
        with attention, lightning_curv.curvature(*extensions):
            F.cross_entropy(net(x), y).backward()
        multiply(net, names)

    return step


def backpack(net: nn.Module, x: Tensor, y: Tensor, names: Names) -> Step | None:
    import backpack as peer
    from backpack import extensions as library
    from backpack.custom_module.permute import Permute
    from backpack.custom_module.reduce_tuple import ReduceTuple

    if not names or not isinstance(net, nn.Sequential):
        return None
    theirs = {FirstOutput: lambda: ReduceTuple(0), ClassesSecond: lambda: Permute(0, 2, 1)}
    for i, module in enumerate(net):
        if type(module) in theirs:
            net[i] = theirs[type(module)]()
    model, loss = peer.extend(net), peer.extend(nn.CrossEntropyLoss())
    extensions = [getattr(library, name)() for name in names]

    def step() -> None:
        with peer.backpack(*extensions):
            loss(model(x), y).backward()
        multiply(net, names)

    return step


def multiply(net: nn.Module, names: Names) -> None:
    """One product with every parameter's block, where the quantity is one."""
    for name in names:
        if name in PRODUCTS:
            for p in net.parameters():
                getattr(p, name.lower())(torch.ones_like(p)[None])


def vmap_grad(net: nn.Module, x: Tensor, y: Tensor, names: Names) -> Step | None:
    if names != ("BatchGrad",):
        return None
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return lambda: per_sample(parameters, x, y)


def curvlinops(net: nn.Module, x: Tensor, y: Tensor, names: Names) -> Step | None:
    """Factors of the linear layers and convolutions alone, without the gradient."""
    from curvlinops import KFACLinearOperator

    if names not in (("KFAC",), ("KFLR",)):
        return None
    layers = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    arguments: dict[str, Any] = {
        "fisher_type": "mc" if names == ("KFAC",) else "type-2",
        "check_deterministic": False,
        "num_data": len(x),
        "num_per_example_loss_terms": POSITIONS if y.ndim > 1 else 1,
    }
    parameters = [p for layer in layers for p in layer.parameters()]
    loss = nn.CrossEntropyLoss()
    return lambda: KFACLinearOperator(
        net, loss, parameters, [(x, y)], **arguments
    ).compute_kronecker_factors()


def opacus(net: nn.Module, x: Tensor, y: Tensor, names: Names) -> Step | None:
    from opacus import GradSampleModule

    if names != ("BatchGrad",):
        return None
    model = GradSampleModule(net, strict=False)
    return lambda: F.cross_entropy(model(x), y).backward()


PEERS: dict[str, Callable[[nn.Module, Tensor, Tensor, Names], Step | None]] = {
    "BackPACK": backpack,
    "vmap(grad)": vmap_grad,
    "curvlinops": curvlinops,
    "Opacus": opacus,
}


def installed(names: list[str]) -> list[str]:
    """Those of the peers that are there; the others are named."""
    here, (x, y) = [], (torch.zeros(1, 1), torch.zeros(1, dtype=torch.long))
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                PEERS[name](nn.Sequential(), x, y, ())
        except ImportError as error:
            print(f"{name} is not installed ({error}); it is left out.")
        else:
            here.append(name)
    return here


def clear(net: nn.Module) -> None:
    """Drop what a step left on the parameters."""
    for p in net.parameters():
        p.grad = None
        for name in FIELDS:
            vars(p).pop(name, None)
        if "grad_sample" in vars(p):
            p.grad_sample = None

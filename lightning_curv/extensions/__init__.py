"""Extensions: one class per quantity, each a function of a parameter's per-sample Jacobian."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_curv.extensions.base import (
    Differentiable,
    ExactGGN,
    Extension,
    GraphExtension,
    LossGradient,
    MonteCarloGGN,
)
from lightning_curv.extensions.block_products import GGNMP, HMP, PCHMP
from lightning_curv.extensions.first_order import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from lightning_curv.extensions.ggn import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagGGNExact,
    DiagGGNMC,
    GGNTraceMC,
    SqrtGGNExact,
    SqrtGGNMC,
)
from lightning_curv.extensions.hessian import BatchDiagHessian, DiagHessian
from lightning_curv.extensions.kfra import KFRA
from lightning_curv.extensions.kronecker import KFAC, KFLR
from lightning_curv.extensions.unevaluated import JacobianExact, JacobianMC

__all__ = [
    "GGNMP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "Differentiable",
    "ExactGGN",
    "Extension",
    "GGNTraceMC",
    "GraphExtension",
    "JacobianExact",
    "JacobianMC",
    "LossGradient",
    "MonteCarloGGN",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]

# What sources of columns were called in version 0.1.0.
_RENAMED = {"Exact": "ExactGGN", "Gradient": "LossGradient", "Sampled": "MonteCarloGGN"}


def __getattr__(name: str) -> Any:
    new = _RENAMED.get(name)
    if new is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"`{name}` is called `{new}` since version 0.2; the old name ends in 0.3.",
        DeprecationWarning,
        stacklevel=2,
    )
    return globals()[new]

"""Extensions: one small class per quantity, each a function of a parameter's per-sample Jacobian."""

from lightning_curv.extensions.base import Exact, Extension, Gradient, GraphExtension, Sampled
from lightning_curv.extensions.firstorder import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from lightning_curv.extensions.ggn import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagGGNExact,
    DiagGGNMC,
    GGNTraceMC,
    SqrtGGNExact,
    SqrtGGNMC,
)
from lightning_curv.extensions.kronecker import KFAC, KFLR

__all__ = [
    "KFAC",
    "KFLR",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "Exact",
    "Extension",
    "GGNTraceMC",
    "Gradient",
    "GraphExtension",
    "Sampled",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]

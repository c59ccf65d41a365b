"""Extensions: one class per quantity, each a function of a parameter's per-sample Jacobian."""

from lightning_curv.extensions.base import (
    Differentiable,
    Exact,
    Extension,
    Gradient,
    GraphExtension,
    Sampled,
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
    "Exact",
    "Extension",
    "GGNTraceMC",
    "Gradient",
    "GraphExtension",
    "JacobianExact",
    "JacobianMC",
    "Sampled",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]

"""Curvature and gradient noise for PyTorch Lightning, on unmodified models.

>>> import torch
>>> from torch.nn import functional as F
>>> from lightning_curv import BatchL2Grad, curvature
>>> w = torch.nn.Parameter(torch.tensor([[1.0, 2.0]]))
>>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1)
>>> with curvature(BatchL2Grad()):
...     F.mse_loss(F.linear(x, w), y).backward()
>>> w.batch_l2  # squared norms of the two summands of w.grad
tensor([1., 4.])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_curv.engine.context import curvature
from lightning_curv.extensions import (
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
    Extension,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)
from lightning_curv.recording.extend import extend
from lightning_curv.recording.record import disable, record
from lightning_curv.rules import rule
from lightning_curv.source_tree import add_rooms

if TYPE_CHECKING:
    from lightning_curv.callbacks import (
        Alarm,
        CurvatureCallback,
        PrivacyCallback,
        privacy_audit,
    )
    from lightning_curv.optimizers import (
        DPSGD,
        CurvatureStepSize,
        DiagGGNOptimizer,
        DPAdam,
        DPOptimizer,
        KFACOptimizer,
    )

__version__ = "0.1.0"

__all__ = [
    "DPSGD",
    "GGNMP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "Alarm",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "CurvatureCallback",
    "CurvatureStepSize",
    "DPAdam",
    "DPOptimizer",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagGGNOptimizer",
    "DiagHessian",
    "Extension",
    "KFACOptimizer",
    "PrivacyCallback",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
    "curvature",
    "disable",
    "extend",
    "privacy_audit",
    "record",
    "rule",
]

# What the two rooms above the engine export is imported on first use: the engine does not import
# them, and never Lightning.
_ROOM = {
    "Alarm": "callbacks",
    "CurvatureCallback": "callbacks",
    "CurvatureStepSize": "optimizers",
    "DPAdam": "optimizers",
    "DPOptimizer": "optimizers",
    "DPSGD": "optimizers",
    "DiagGGNOptimizer": "optimizers",
    "KFACOptimizer": "optimizers",
    "PrivacyCallback": "callbacks",
    "privacy_audit": "callbacks",
}

# In the source tree optimizers/ and callbacks/ lie beside this package, in an installed copy inside
# it.
add_rooms(__path__)


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = import_module(f"{__name__}.{_ROOM[name]}")
    value = getattr(room, name)
    if _ROOM[name] == "callbacks":
        room.follow()  # at every use, for Lightning may be imported after us
    else:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Optimizers that read curvature from the parameters: curvature × damping × step.

The optimizers need only torch and the quantities that a backward pass leaves on the parameters:

>>> import torch
>>> from lightning_curv.optimizers import KFACOptimizer
>>> layer = torch.nn.Linear(2, 1, bias=False)
>>> optimizer = KFACOptimizer(layer.parameters())
>>> [extension.savefield for extension in optimizer.required_extensions()]
['jacobian_mc', 'loss_limits']

Inside Lightning `CurvatureCallback()` computes what `required_extensions` asks for; elsewhere write
`with curvature(*optimizer.extensions): loss.backward()` before `optimizer.step()`.
"""

from .audit_canaries import GradientCanaries
from .audit_report import PrivacyAudit
from .diag_ggn import DiagGGNOptimizer
from .dp import DPSGD, DPAdam, DPOptimizer
from .kfac import KFACOptimizer
from .privacy_accounting import (
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    TruncatedPoissonSampling,
    calibrated_noise,
)
from .privacy_clipping import AdaptiveClipping, AutomaticClipping, Clipping, FlatClipping, PerLayerClipping
from .privacy_groups import PerGroupClipping
from .privacy_schedule import ExponentialSchedule
from .second_order import SecondOrderOptimizer

__all__ = [
    "DPSGD",
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "DPAdam",
    "DPOptimizer",
    "DiagGGNOptimizer",
    "EpochSampling",
    "ExponentialSchedule",
    "FlatClipping",
    "GradientCanaries",
    "KFACOptimizer",
    "PerGroupClipping",
    "PerLayerClipping",
    "PoissonSampling",
    "PrivacyAccountant",
    "PrivacyAudit",
    "SecondOrderOptimizer",
    "TruncatedPoissonSampling",
    "calibrated_noise",
]

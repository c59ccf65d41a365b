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

from lightning_curv.optimizers.curvature_step_size import CurvatureStepSize
from lightning_curv.optimizers.diag_ggn import DiagGGNOptimizer
from lightning_curv.optimizers.kfac import KFACOptimizer
from lightning_curv.optimizers.privacy.accounting import (
    EpochSampling,
    PoissonSampling,
    PrivacyAccountant,
    TruncatedPoissonSampling,
    calibrated_noise,
)
from lightning_curv.optimizers.privacy.audit_canaries import GradientCanaries
from lightning_curv.optimizers.privacy.audit_report import PrivacyAudit
from lightning_curv.optimizers.privacy.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
)
from lightning_curv.optimizers.privacy.group_clipping import PerGroupClipping
from lightning_curv.optimizers.privacy.optimizer import DPSGD, DPAdam, DPOptimizer
from lightning_curv.optimizers.privacy.schedule import ExponentialSchedule
from lightning_curv.optimizers.second_order import SecondOrderOptimizer

__all__ = [
    "DPSGD",
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "CurvatureStepSize",
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

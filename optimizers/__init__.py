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

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# The module of each: who trains with one optimizer does not wait for the others.
_MODULE = {
    "AdaptiveClipping": "privacy.clipping",
    "AutomaticClipping": "privacy.clipping",
    "Clipping": "privacy.clipping",
    "CurvatureStepSize": "curvature_step_size",
    "DPAdam": "privacy.optimizer",
    "DPOptimizer": "privacy.optimizer",
    "DPSGD": "privacy.optimizer",
    "DiagGGNOptimizer": "diag_ggn",
    "EpochSampling": "privacy.accounting",
    "ExponentialSchedule": "privacy.schedule",
    "FlatClipping": "privacy.clipping",
    "GradientCanaries": "privacy.audit_canaries",
    "KFACOptimizer": "kfac",
    "PerGroupClipping": "privacy.group_clipping",
    "PerLayerClipping": "privacy.clipping",
    "PoissonSampling": "privacy.accounting",
    "PrivacyAccountant": "privacy.accounting",
    "PrivacyAudit": "privacy.audit_report",
    "SecondOrderOptimizer": "second_order",
    "TruncatedPoissonSampling": "privacy.accounting",
    "calibrated_noise": "privacy.accounting",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

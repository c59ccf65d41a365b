"""K-FAC: gradient descent preconditioned by Kronecker-factored curvature."""

from typing import Literal

from torch.optim.optimizer import ParamsT

from lightning_curv.extensions import KFAC, KFLR, Extension

from .curvature import ParamGroup
from .kronecker import KroneckerCurvature
from .schedule import Schedule
from .second_order import SecondOrderOptimizer
from .settings import require_choice, require_count, require_fraction, require_positive
from .step_rules import TrustClip


class KFACOptimizer(SecondOrderOptimizer):
    r"""Kronecker-factored approximate curvature with factored damping, a trust clip and momentum.

    The generalized Gauss-Newton block of each parameter is approximated by $F_1 \otimes \dots \otimes F_k$, one factor
    per axis (a linear or convolution weight: $B \otimes A$), each a running mean over batches. A step is

    $$d = \bigotimes_i (F_i + \gamma_i I)^{-1} g, \qquad
      \nu = \min\Big(1, \sqrt{\kappa / (\eta_0^2 \textstyle\sum d^\top g)}\Big),$$
    $$v \leftarrow \mu v - \eta_t \nu d, \qquad \theta \leftarrow (1 - \eta_t w) \theta + v$$

    with $\gamma_i$ from `damping` $\lambda$ by the traces of the factors ($\prod_i \gamma_i = \lambda$), $\eta_0$ the
    learning rate the optimizer was built with and $\eta_t$ the scheduled one, so that a schedule acts after the clip.
    Parameters without factors take Adam steps at `fallback_lr` $\eta_t / \eta_0$.

    The defaults suit networks trained on a mean cross-entropy. Give long runs a learning-rate schedule.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate $\eta$, per group. Values that schedulers set are relative to this one.
        damping: $\lambda$, per group, in the unit of the loss' curvature: scale it with the loss.
        momentum: $\mu$ in [0, 1), per group.
        weight_decay: $w$, decoupled, per group.
        factor_decay: decay in [0, 1) of the factors' running means, per group.
        factor_interval: measure factors every so many steps.
        inverse_interval: invert factors every so many steps; more often in the first 20.
        kl_clip: $\kappa$, bound on the squared length of a step in the curvature's metric; None for no bound.
        curvature: "mc" draws targets from the model, "exact" propagates one column per output.
        mc_samples: targets drawn per example if `curvature="mc"`.
        weight_sharing: "expand" or "reduce", how factors treat convolutions and sequences.
        max_factor_size: factors with more rows are replaced by their diagonal.
        fallback_lr: Adam's learning rate for parameters without factors, per group.

    Raises:
        ValueError: a setting is out of range.
        TypeError: a parameter is complex or sparse.

    Cost: per step $|\theta| \sum_i d_i$ time beside the factors' measurement, $d_i^3$ per inversion; memory for two
    copies of all factors and one of the parameters.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*,
    ICML 2015, sections 4 and 6; the clip: J. Ba, R. Grosse, J. Martens, *Distributed Second-Order Optimization using
    Kronecker-Factored Approximations*, ICLR 2017, section 5.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.3,
        damping: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        factor_decay: float = 0.95,
        factor_interval: int = 1,
        inverse_interval: int = 10,
        kl_clip: float | None = 1e-3,
        curvature: Literal["mc", "exact"] = "mc",
        mc_samples: int = 1,
        weight_sharing: Literal["expand", "reduce"] = "expand",
        max_factor_size: int = 8192,
        fallback_lr: float = 1e-3,
    ) -> None:
        require_count("factor_interval", factor_interval)
        require_count("inverse_interval", inverse_interval)
        require_count("mc_samples", mc_samples)
        require_count("max_factor_size", max_factor_size)
        require_choice("curvature", curvature, ("mc", "exact"))
        require_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
        if kl_clip is not None:
            require_positive("kl_clip", kl_clip)
        extension: Extension = KFLR(weight_sharing=weight_sharing)
        if curvature == "mc":
            extension = KFAC(mc_samples=mc_samples, weight_sharing=weight_sharing)
        super().__init__(
            params,
            {
                "lr": lr,
                "damping": damping,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "factor_decay": factor_decay,
                "fallback_lr": fallback_lr,
            },
            curvature=KroneckerCurvature(extension, max_factor_size),
            schedule=Schedule(measure=factor_interval, invert=inverse_interval),
            step_rule=TrustClip(kl_clip),
        )

    def _check_group(self, group: ParamGroup) -> None:
        super()._check_group(group)
        require_fraction("momentum", group["momentum"])
        require_fraction("factor_decay", group["factor_decay"])

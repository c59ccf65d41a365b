"""Gradient descent preconditioned by the diagonal of the generalized Gauss-Newton matrix."""

from __future__ import annotations

from typing import Literal

from torch.optim.optimizer import ParamsT

from lightning_curv.extensions import DiagGGNExact, DiagGGNMC, Extension, JacobianExact, JacobianMC
from lightning_curv.optimizers.curvature.base import ParamGroup
from lightning_curv.optimizers.curvature.diagonal import DiagonalCurvature
from lightning_curv.optimizers.curvature.empirical import curved
from lightning_curv.optimizers.second_order import SecondOrderOptimizer
from lightning_curv.optimizers.settings import (
    require_choice,
    require_count,
    require_fraction,
    require_positive,
)
from lightning_curv.optimizers.step.schedule import Schedule
from lightning_curv.optimizers.step_size.levenberg_marquardt import LevenbergMarquardt
from lightning_curv.optimizers.step_size.rules import (
    ElementwiseClip,
    QuadraticModel,
    StepRule,
    TrustClip,
)


class DiagGGNOptimizer(SecondOrderOptimizer):
    r"""Diagonal Gauss-Newton with running means of gradient and curvature and a bounded step.

    With bias-corrected running means $\hat g$ of the gradient and $\hat h$ of the diagonal of the
    generalized Gauss-Newton matrix,

    $$d = \hat g / (\hat h + \lambda), \qquad
      \theta \leftarrow (1 - \eta_t w) \theta - \eta_t \, \mathrm{bound}(d).$$

    `bound="trust"` multiplies all of $d$ by
    $\min(1, \sqrt{\kappa / \sum_j \hat h_j d_j^2})$, `bound="elementwise"` clips each element to
    $\pm \rho$: learning rate and schedule act after the bound. Parameters without a diagonal take
    Adam steps at `fallback_lr` $\eta_t / \eta_0$, with the learning rate $\eta_0$ the optimizer was
    built with.

    The defaults suit networks trained on a mean cross-entropy.

    Args:
        params: Parameters, or dicts of parameter groups.
        lr: Learning rate $\eta$, per group; about 0.03 with `bound="elementwise"`. "auto": learning
            rate and momentum from the quadratic model, as in `KFACOptimizer`; `bound` is not used.
        damping: $\lambda$, per group, in the unit of the loss' curvature: scale it with the loss.
            "auto": relative to the mean of the diagonal, as in `KFACOptimizer`.
        betas: Decays in [0, 1) of the running means of gradient and diagonal, per group.
        weight_decay: $w$, decoupled, per group.
        interval: Measure the diagonal every so many steps.
        bound: "trust", "elementwise" or None.
        kl_clip: $\kappa$, bound on the squared length of a step of learning rate 1 in the
            curvature's metric.
        max_update: $\rho$, bound on each element of $d$.
        curvature: "mc" draws targets from the model, "exact" propagates one column per output.
            Where the loss has no second derivative or is piecewise linear, both take the gradients
            of the samples, divided by the root of the loss, and warn.
        mc_samples: Targets drawn per example if `curvature="mc"`.
        fallback_lr: Adam's learning rate for parameters without a diagonal, per group.
        safeguards: Bound how far layers move together, and take a step back after which the loss is
            far above its running mean, see `KFACOptimizer`.

    Raises:
        ValueError: A setting is out of range.
        TypeError: A parameter is complex or sparse.

    Cost: elementwise time beside the diagonal's measurement; memory for three copies of the
    parameters.

    Source: F. Dangel, F. Kunstner, P. Hennig, *BackPACK: Packing more into Backprop*, ICLR 2020,
    section 4; the elementwise bound: H. Liu et al., *Sophia*, ICLR 2024, algorithm 3.

    Example:
        >>> import torch
        >>> from lightning_curv import curvature
        >>> model, x, y = torch.nn.Linear(2, 3), torch.ones(4, 2), torch.arange(4) % 3
        >>> optimizer = DiagGGNOptimizer(model.parameters(), lr=0.3)
        >>> with curvature(*optimizer.extensions):
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> set(optimizer.summary().values())
        {'curvature'}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Literal["auto"] = 0.3,
        damping: float | Literal["auto"] = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        interval: int = 1,
        bound: Literal["trust", "elementwise"] | None = "trust",
        kl_clip: float = 1e-2,
        max_update: float = 0.1,
        curvature: Literal["mc", "exact"] = "mc",
        mc_samples: int = 1,
        fallback_lr: float = 1e-3,
        safeguards: bool = True,
    ) -> None:
        require_count("interval", interval)
        require_count("mc_samples", mc_samples)
        require_choice("bound", bound, ("trust", "elementwise", None))
        require_choice("curvature", curvature, ("mc", "exact"))
        require_positive("kl_clip", kl_clip)
        require_positive("max_update", max_update)
        rule: StepRule = TrustClip(kl_clip if bound == "trust" else None)
        if bound == "elementwise":
            rule = ElementwiseClip(max_update)
        extension: Extension = (
            DiagGGNMC(mc_samples=mc_samples) if curvature == "mc" else DiagGGNExact()
        )
        columns: Extension = JacobianMC(mc_samples) if curvature == "mc" else JacobianExact()
        curved(extension, columns)
        if lr == "auto":
            rule = QuadraticModel(columns, safeguards)
        super().__init__(
            params,
            {
                "lr": 1.0 if lr == "auto" else lr,
                "damping": damping,
                "betas": tuple(betas),
                "weight_decay": weight_decay,
                "fallback_lr": fallback_lr,
            },
            curvature=DiagonalCurvature(extension),
            schedule=Schedule(measure=interval),
            step_rule=rule,
            safeguards=safeguards,
            adaptation=LevenbergMarquardt(start=1.0),
        )

    def _check_group(self, group: ParamGroup) -> None:
        super()._check_group(group)
        for beta in group["betas"]:
            require_fraction("betas", beta)

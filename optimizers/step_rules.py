"""How far to go along preconditioned directions."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .curvature import Direction


class StepRule(Protocol):
    """Bounds the directions of one step. A learning-rate schedule acts on the result."""

    def __call__(self, directions: Sequence[Direction]) -> list[Tensor]: ...


class TrustClip:
    r"""Shrink all directions together until the step is short in the metric of the curvature.

    $$\nu = \min\Big(1, \sqrt{\kappa / \textstyle\sum_p \eta_p^2 \|d_p\|^2}\Big)$$

    with $\eta_p$ the learning rate *before* any schedule: were it the scheduled one, the schedule would cancel out
    wherever the clip is active.

    Args:
        kl_clip: $\kappa$, bound on the squared length of a step, about twice its KL divergence per example; None for
            no bound.

    Source: J. Ba, R. Grosse, J. Martens, *Distributed Second-Order Optimization using Kronecker-Factored
    Approximations*, ICLR 2017, section 5.
    """

    def __init__(self, kl_clip: float | None) -> None:
        self.kl_clip = kl_clip

    def __call__(self, directions: Sequence[Direction]) -> list[Tensor]:
        if self.kl_clip is None or not directions:
            return [direction.value for direction in directions]
        device = directions[0].value.device
        squares = [(d.base_lr**2 * d.squared_norm).to(device) for d in directions]
        # A zero length gives an infinite ratio, clamped to 1; nothing here waits for the device.
        shrink = (self.kl_clip / torch.stack(squares).sum().clamp_min(0.0)).sqrt().clamp_max(1.0)
        return [direction.value * shrink.to(direction.value) for direction in directions]


class ElementwiseClip:
    r"""Clip every element, $\operatorname{clip}(d, \pm \rho)$.

    Args:
        bound: $\rho$.

    Source: H. Liu et al., *Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training*,
    ICLR 2024, algorithm 3.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, directions: Sequence[Direction]) -> list[Tensor]:
        return [direction.value.clamp(-self.bound, self.bound) for direction in directions]

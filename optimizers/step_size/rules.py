"""How far to go along preconditioned directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device
from lightning_curv.distributed.failures import processes
from lightning_curv.extensions import Extension
from lightning_curv.optimizers.curvature.base import Direction
from lightning_curv.optimizers.linear_algebra.collectives import averaged
from lightning_curv.optimizers.linear_algebra.readings import Readings
from lightning_curv.optimizers.step_size.calibration import (
    averaged_curvature,
    keep_step,
    kept_curvature,
    kept_weights,
    shrink_of_kept,
)
from lightning_curv.optimizers.step_size.held_out import confirmed_share, judge_last
from lightning_curv.optimizers.step_size.quadratic_model import (
    Matrix,
    change,
    curvature_along,
    inner_products,
    minimizer,
    shortened,
)
from lightning_curv.terms.jacobian import Jacobian


@dataclass(frozen=True)
class Step:
    """Updates of the parameters, and how they came about.

    Args:
        updates: one per direction, to be added to the parameter.
        rate: learning rate that decoupled weight decay is multiplied by, besides the group's own.
        slope: Predicted change of the loss in first order, if the rule predicts it.
        quadratic: What the curvature adds to it.
        used: The share of what a step may promise, or of how far it may go.
        report: numbers for logs.
    """

    updates: list[Tensor]
    rate: float = 1.0
    slope: float | None = None
    quadratic: float = 0.0
    used: float = 0.0
    report: dict[str, float] = field(default_factory=dict)

    @property
    def predicted(self) -> float | None:
        """Predicted change of the loss, if the rule predicts it."""
        return None if self.slope is None else self.slope + self.quadratic

    def scaled(self, factor: float) -> Step:
        """The same step after its updates were multiplied by a factor."""
        if factor == 1.0:
            return self
        slope = None if self.slope is None else factor * self.slope
        quadratic = factor * factor * self.quadratic
        return replace(self, rate=factor * self.rate, slope=slope, quadratic=quadratic)


class StepRule(ABC):
    """What makes updates of directions. A learning-rate schedule acts on the result.

    Attributes:
        extension: what it needs from every backward pass, if anything.
        memory: Plain numbers that it keeps from step to step.
    """

    extension: Extension | None = None

    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}

    @abstractmethod
    def __call__(
        self,
        directions: Sequence[Direction],
        scale: float,
        bounds: Callable[[], tuple[float, float]],
        readings: Readings,
    ) -> Step:
        """Make the updates.

        Args:
            directions: of all parameters.
            scale: what the curvature in their Jacobians is to be multiplied by.
            bounds: Tells how much of a decrease the step may promise at most, and how far it may
                go: half of its squared length in the metric of the curvature. The host may not know
                it before `readings` were read.
            readings: Of the step.
        """


class TrustClip(StepRule):
    r"""Shrink all directions together until the step is short; then momentum.

    Lengths are those in the metric of the curvature:

    $$\nu = \min\Big(1, \sqrt{\kappa / \textstyle\sum_p \|d_p\|^2}\Big), \qquad
      \delta = -\eta_t \nu d + \mu \, \delta_{\text{last}}$$

    No learning rate is in $\nu$: a rate, or a schedule of it, would cancel out wherever the clip is
    active, which is nearly always.

    Args:
        kl_clip: $\kappa$, bound on the squared length of a step of rate 1, about twice its KL
            divergence per example; None for no bound.

    Source: J. Ba, R. Grosse, J. Martens, *Distributed Second-Order Optimization using
        Kronecker-Factored Approximations*, ICLR 2017, section 5.
    """

    def __init__(self, kl_clip: float | None) -> None:
        super().__init__()
        self.kl_clip = kl_clip

    def __call__(
        self,
        directions: Sequence[Direction],
        scale: float,
        bounds: Callable[[], tuple[float, float]],
        readings: Readings,
    ) -> Step:
        shrink = self._shrink(directions)
        updates = []
        for direction in directions:
            rate = shrink.to(direction.value) * -direction.group["lr"]
            updates.append(_with_momentum(direction, direction.value * rate))
        return Step(updates)

    def _shrink(self, directions: Sequence[Direction]) -> Tensor:
        """The factor ν, []."""
        if self.kl_clip is None or not directions:
            return torch.ones(())
        squares = on_one_device(d.squared_norm() for d in directions)
        squared_length = torch.stack(squares).sum().clamp_min(0.0)
        # A zero length gives an infinite ratio, clamped to 1; nothing here waits for the device.
        return (self.kl_clip / squared_length).sqrt().clamp_max(1.0)


class ElementwiseClip(StepRule):
    r"""Clip every element of the direction to $\pm \rho$; then momentum.

    Args:
        bound: $\rho$.

    Source: H. Liu et al., *Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
        Pre-training*, ICLR 2024, algorithm 3.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def __call__(
        self,
        directions: Sequence[Direction],
        scale: float,
        bounds: Callable[[], tuple[float, float]],
        readings: Readings,
    ) -> Step:
        updates = []
        for direction in directions:
            clipped = direction.value.clamp(-self.bound, self.bound)
            updates.append(_with_momentum(direction, clipped * -direction.group["lr"]))
        return Step(updates)


class QuadraticModel(StepRule):
    r"""Take the learning rate $\alpha$ and momentum $\beta$ that minimize the quadratic model.

    $$\delta = \eta_t (-\alpha d + \beta \, \delta_{\text{last}})$$

    minimizes $q$ of `quadratic_model` over the span of the direction $d$ and the last update,
    before the schedule $\eta_t$. A step that promises to take away more than all of the loss is
    shortened: where a classifier is confident the model knows nothing of the curvature that the
    step will meet, and the targets drawn for a small batch hide some of it from $d$ and $q$ alike.
    A parameter whose Jacobian is missing moves along without a say. With `averages`, of every step
    only so much is taken as the next batches have confirmed of those before (`held_out`).

    A step without any Jacobian, between two measurements, takes the running means of α and β, is
    shorter, and is judged by the curvature per length that was measured last.

    Args:
        extension: leaves the Jacobians on the parameters.
        averages: Whether the curvature along the directions is a running mean over batches, and
            steps are shortened to what the next batches confirm of them.
        keeps: Whether steps without Jacobians are made with what is kept; else they are zero.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, ICML 2015, section 7.
    """

    def __init__(self, extension: Extension, averages: bool = True, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps
        self.extension = extension
        self.averages = averages

    def __call__(
        self,
        directions: Sequence[Direction],
        scale: float,
        bounds: Callable[[], tuple[float, float]],
        readings: Readings,
    ) -> Step:
        if not directions:
            readings.read()
            return Step([])
        rows = _rows(directions)
        span = rows[:-1]
        asked = readings.ask(inner_products(span, rows))
        batches = _jacobians(directions)
        measured = damping = None
        if batches:
            damping = readings.ask(_damping_in_span(directions, span))
            measured = readings.ask(averaged(_curvature_in_span(directions, batches, span)))
        # The only time that the host waits in a step.
        readings.read()
        max_decrease, reach = bounds()
        products = _Products(asked.numbers)
        slope = products.slope
        if measured is not None and damping is not None:
            curvature = self._averaged(measured.numbers, batches, products.lengths, scale)
            w = minimizer(_sum(curvature, damping.numbers), slope)
        else:
            kept = kept_curvature(self.memory, products.lengths) if self.keeps else None
            if kept is None:
                return Step([torch.zeros_like(d.value) for d in directions])
            curvature = kept
            w = kept_weights(self.memory, slope)

        # What the loss can fall by is no more than `max_decrease`: damping does not count for that.
        quadratic = change(curvature, [0.0] * len(w), w)
        linear = sum(b * weight for b, weight in zip(slope, w, strict=True))
        shrink = shortened(quadratic, linear, max_decrease)
        if shrink * shrink * quadratic > reach:
            shrink = math.sqrt(reach / quadratic)
        if batches and self.keeps:
            keep_step(self.memory, w, shrink * shrink * quadratic)
        elif self.keeps:
            shrink = min(shrink, shrink_of_kept(self.memory, quadratic))
        if self.averages:
            if len(w) == 2:
                judge_last(self.memory, products.lengths[1], slope[1], curvature[1][1])
            self.memory["length_of_model"] = shrink * products.length_of(w)
            shrink *= confirmed_share(self.memory)
        w = [shrink * weight for weight in w]
        linear = shrink * linear
        quadratic = shrink * shrink * quadratic

        combined = torch.tensor(w, dtype=span.dtype, device=span.device) @ span
        sizes = [d.value.numel() for d in directions]
        updates = []
        for part, d in zip(combined.split(sizes), directions, strict=True):
            if d.group["lr"] == 1.0:
                scheduled = part
            else:
                scheduled = part * d.group["lr"]
            updates.append(scheduled.view(d.value.shape).to(d.value.device))
        # The first row is the direction, along which a step of rate α has the weight -α.
        rate = -w[0]
        momentum = sum(w[1:])
        promised = -(linear + quadratic)
        share_of_decrease = promised / max_decrease if max_decrease > 0 else 1.0
        used = max(share_of_decrease, quadratic / reach)
        report = {"learning_rate": rate, "momentum": momentum}
        return Step(updates, rate, linear, quadratic, used, report)

    def _averaged(
        self,
        measured: Matrix,
        batches: Sequence[dict[int, Jacobian]],
        lengths: list[float],
        scale: float,
    ) -> Matrix:
        """The matrix M of this batch, averaged with those before it; the rule remembers it."""
        curvature = [[scale * entry for entry in row] for row in measured]
        counts = [next(iter(batch.values())).samples for batch in batches]
        samples = processes() * sum(counts) if self.averages else math.inf
        return averaged_curvature(self.memory, curvature, lengths, samples)


@dataclass(frozen=True)
class _Products:
    """The inner products of the directions with each other and, in the last column, the gradient.

    Args:
        numbers: [K, K + 1].
    """

    numbers: Matrix

    @property
    def slope(self) -> list[float]:
        """The slope b, [K]."""
        return [row[-1] for row in self.numbers]

    @property
    def lengths(self) -> list[float]:
        """The lengths of the directions, [K]."""
        return [math.sqrt(row[i]) for i, row in enumerate(self.numbers)]

    def length_of(self, w: Sequence[float]) -> float:
        """The length of the combination of the directions with weights [K]."""
        no_slope = [0.0] * len(w)
        inner = [row[:-1] for row in self.numbers]
        return math.sqrt(max(2 * change(inner, no_slope, w), 0.0))


def _damping_in_span(directions: Sequence[Direction], span: Tensor) -> Tensor:
    """The matrix R, [K, K], in the coordinates that are damped.

    Args:
        directions: of all parameters.
        span: the directions that weights are looked for of, [K, P].
    """
    parts = list(span.split([d.value.numel() for d in directions], dim=1))
    for i, d in enumerate(directions):
        if d.damped is not None:
            weight, bias = d.damped(parts[i].reshape(-1, *d.value.shape), parts[i + 1])
            parts[i], parts[i + 1] = weight.flatten(1), bias
    span = torch.cat(parts, dim=1)
    dampings = [d.damping().to(span).expand(d.value.numel()) for d in directions]
    return inner_products(span * torch.cat(dampings), span)


def _curvature_in_span(
    directions: Sequence[Direction], batches: Sequence[dict[int, Jacobian]], span: Tensor
) -> Tensor:
    """The matrix M of the batches, [K, K]."""
    sizes = [d.value.numel() for d in directions]
    parts = [
        part.reshape(-1, *d.value.shape).to(d.value.device)
        for part, d in zip(span.split(sizes, dim=1), directions, strict=True)
    ]
    return curvature_along(batches, parts)


def _sum(first: Matrix, second: Matrix) -> Matrix:
    return [
        [a + b for a, b in zip(row, other, strict=True)]
        for row, other in zip(first, second, strict=True)
    ]


def _jacobians(directions: Sequence[Direction]) -> list[dict[int, Jacobian]]:
    """The Jacobians of every batch by the number of the direction; batches without any left out."""
    count = max((len(d.jacobians) for d in directions), default=0)
    batches: list[dict[int, Jacobian]] = []
    for k in range(count):
        batch: dict[int, Jacobian] = {}
        for i, direction in enumerate(directions):
            jacobian = direction.jacobians[k]
            if jacobian is not None:
                batch[i] = jacobian
        if batch:
            batches.append(batch)
    return batches


def _rows(directions: Sequence[Direction]) -> Tensor:
    """The direction, the last update if there is one, and the gradient, [K + 1, P]."""
    parts = [d.value for d in directions]
    if any(d.last is not None for d in directions):
        parts += [torch.zeros_like(d.value) if d.last is None else d.last for d in directions]
    parts += [d.grad for d in directions]
    size = sum(d.value.numel() for d in directions)
    flat = torch.cat(on_one_device(part.flatten() for part in parts))
    return flat.to(directions[0].value).view(-1, size)


def _with_momentum(direction: Direction, update: Tensor) -> Tensor:
    """The update plus μ times the last one, in place."""
    momentum = direction.group.get("momentum", 0.0)
    if not momentum or direction.last is None:
        return update
    return update.add_(direction.last, alpha=momentum)

"""From measured steps to the numbers that are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_curv.callbacks.monitoring.measurement import Measurement
from lightning_curv.callbacks.monitoring.quantities import Quantity
from lightning_curv.callbacks.monitoring.reduction import reduced
from lightning_curv.devices import on_one_device
from lightning_curv.precision import wide

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy


class RunningNoiseScale:
    r"""Ratio of exponential averages of $\mathrm{tr}\,\Sigma$ and $\|G\|^2$.

    Both averages start from zero, so that their start-up bias cancels in the ratio.

    Args:
        ema: decay of the averages, in [0, 1).
        variance: state, average of $\mathrm{tr}\,\Sigma$.
        signal: state, average of $\|G\|^2$.

    Example:
        >>> noise = RunningNoiseScale(ema=0.5)
        >>> noise.update(4.0, -1.0), noise.update(6.0, 3.0)
        (None, 3.2)
    """

    def __init__(self, ema: float, variance: float = 0.0, signal: float = 0.0) -> None:
        self.ema = ema
        self.variance = variance
        self.signal = signal

    def state_dict(self) -> dict[str, float]:
        return {"variance": self.variance, "signal": self.signal}

    @property
    def unresolved(self) -> bool:
        """Whether there are measurements, of batches too small to tell the gradient from noise."""
        return self.variance > 0 >= self.signal

    def update(self, variance: float, signal: float) -> float | None:
        """Add a measurement; None while the gradient cannot be told from noise."""
        if math.isfinite(variance) and math.isfinite(
            signal
        ):  # one sample has no variance, a scaler may overflow
            self.variance = self.ema * self.variance + (1 - self.ema) * variance
            self.signal = self.ema * self.signal + (1 - self.ema) * signal
        return self.variance / self.signal if self.signal > 0 else None


def suggested_batch_size(noise_scale: float) -> float:
    """The power of two next to the noise scale, at least one.

    Example:
        >>> suggested_batch_size(43.4), suggested_batch_size(0.2)
        (32.0, 1.0)
    """
    return 2.0 ** max(round(math.log2(noise_scale)), 0) if noise_scale > 0 else 1.0


@dataclass
class Job:
    """Quantities of one group of parameters.

    Args:
        quantities: what to compute.
        measurement: of which.
        noise: is updated, if the noise scale is wanted.
    """

    quantities: Sequence[Quantity]
    measurement: Measurement
    noise: RunningNoiseScale


def measure(jobs: Sequence[Job], strategy: Strategy) -> list[dict[str, float]]:
    """The values of every job by series; those that are not finite are left out.

    One reduction over processes, and one transfer from the device unless there are quantities of
    single entries.
    """
    measurements = [job.measurement for job in jobs]
    # Before the formulas, which may fail in one process: the others must not wait for it.
    _reduce(measurements, strategy)
    vectors = [measurement.on_device() for measurement in measurements]
    # Joined, so that the host waits for the device once for all jobs.
    joined = torch.cat(on_one_device(part for parts in vectors for part in parts))
    numbers, start = joined.cpu().double().numpy(), 0
    for measurement, parts in zip(measurements, vectors, strict=True):
        stop = start + sum(part.numel() for part in parts)
        measurement.set_numbers(numbers[start:stop])
        start = stop
    # 0 / 0 is no warning: what is not finite is left out.
    with np.errstate(all="ignore"):
        return [_with_noise_scale(job, _values(job)) for job in jobs]


def _reduce(measurements: Sequence[Measurement], strategy: Strategy) -> None:
    """One reduction over processes: all of them have the same keys and shapes."""
    sums = [measurement.local_sums() for measurement in measurements]
    if getattr(strategy, "world_size", 1) > 1:
        device = strategy.root_device
        tensors = [
            wide(torch.as_tensor(value, device=device))
            for group in sums
            for value in group.values()
        ]
        flat = reduced(torch.cat([tensor.reshape(-1) for tensor in tensors]), strategy, "mean")
        parts = flat.split([tensor.numel() for tensor in tensors])
        rest = iter([part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
        sums = [{key: next(rest) for key in group} for group in sums]
    for measurement, group in zip(measurements, sums, strict=True):
        measurement.set_sums(group)


def _values(job: Job) -> dict[str, float]:
    m = job.measurement
    values: dict[str, float] = {}
    if m.unseen:
        return values
    for quantity in job.quantities:
        if quantity.formula is not None and (m.covered or not quantity.fields):
            try:
                results = quantity.formula(m)
            except Exception as error:  # the run goes on without it
                m.failures.append(({quantity.name}, error))
                continue
            values.update(
                zip(quantity.series, map(float, results if len(quantity.series) > 1 else [results]))
            )
    if _noise_scale(job.quantities) and m.covered:
        # Not to be logged: `_with_noise_scale` takes them out again, after averaging.
        values |= {"_variance": float(m.variance), "_signal": float(m.signal)}
    return values


def _with_noise_scale(job: Job, numbers: dict[str, float]) -> dict[str, float]:
    if "_variance" in numbers:
        noise_scale = job.noise.update(numbers.pop("_variance"), numbers.pop("_signal"))
        if noise_scale is not None:
            derived = {
                "noise_scale": noise_scale,
                "suggested_batch_size": suggested_batch_size(noise_scale),
            }
            numbers |= {name: derived[name] for name in _noise_scale(job.quantities)}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _noise_scale(quantities: Sequence[Quantity]) -> list[str]:
    return [q.name for q in quantities if q.name in ("noise_scale", "suggested_batch_size")]

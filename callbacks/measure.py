"""From the statistics of a window to the numbers that are logged."""

import math
from collections.abc import Mapping

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor

from lightning_curv.callbacks.window import Statistics
from lightning_curv.metrics import unbiased_moments

QUANTILES = {"sample_norm_p5": 0.05, "sample_norm_median": 0.5, "sample_norm_p95": 0.95, "sample_norm_max": 1.0}


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
        """Whether there are measurements, but batches too small to tell the gradient from their noise."""
        return self.variance > 0 >= self.signal

    def update(self, variance: float, signal: float) -> float | None:
        """Add a measurement; None while the gradient cannot be told from noise."""
        if math.isfinite(variance) and math.isfinite(signal):  # one sample has no variance, a scaler may overflow
            self.variance = self.ema * self.variance + (1 - self.ema) * variance
            self.signal = self.ema * self.signal + (1 - self.ema) * signal
        return self.variance / self.signal if self.signal > 0 else None


def measure(
    statistics: Statistics,
    grads: Mapping[Tensor, Tensor],
    divisor: float,
    strategy: Strategy,
    noise: RunningNoiseScale,
) -> dict[str, float]:
    """The logged quantities by name; those that are not finite are left out.

    Args:
        statistics: of this process' samples.
        grads: accumulated gradient of each parameter, synchronised over processes and without a scaler's factor.
        divisor: of the accumulated gradient, gives the gradient of the window.
        strategy: averages over processes.
        noise: is updated.
    """
    norms = statistics.sample_norms
    grad_norms = {p: _norm(grad).to(norms) / divisor for p, grad in grads.items()}
    covered = torch.stack([norm for p, norm in grad_norms.items() if p in statistics.covered]).square().sum()
    trace = norms.new_zeros(()) if statistics.ggn_trace is None else statistics.ggn_trace
    packed = torch.stack([statistics.second_moment, statistics.concentration, trace])
    second_moment, concentration, trace = strategy.reduce(packed, reduce_op="mean")
    world_size = getattr(strategy, "world_size", 1)
    variance, signal = unbiased_moments(second_moment, covered, concentration / world_size)
    values = {
        "grad_norm": torch.stack(list(grad_norms.values())).norm(),
        "grad_variance": variance,
        **dict(zip(QUANTILES, norms.quantile(norms.new_tensor(list(QUANTILES.values()))))),
        "grad_signal": signal,
        "ggn_trace": trace if statistics.ggn_trace is not None else trace.new_tensor(math.nan),
    }
    numbers = dict(zip(values, torch.stack(list(values.values())).tolist()))  # the only synchronisation with the device
    noise_scale = noise.update(numbers["grad_variance"], numbers["grad_signal"])
    if noise_scale is not None:
        numbers["noise_scale"] = noise_scale
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _norm(grad: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad, dtype=torch.float32 if grad.dtype.itemsize < 4 else None)

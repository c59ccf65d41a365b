"""Unbiased variance and signal of gradients, pooled over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curv.metrics.wide_state import WideState


class _PooledMoments(WideState):
    r"""Sums over batches of $(N-1)\,\widehat{\mathrm{tr}\,\Sigma}$ and $(N-1)\,\widehat{\|G\|^2}$.

    The weight $N - 1$ pools batches of different sizes, and needs no division: a batch of one
    sample adds nothing.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    trace_sum: Tensor
    signal_sum: Tensor
    freedom: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("trace_sum", "signal_sum", "freedom"):
            # Sums of differences of near-equal numbers.
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sample_sq_norms: Tensor, grad_sq_norm: Tensor) -> None:
        r"""Add a batch.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            grad_sq_norm: $\|\bar g\|^2$, [].

        Raises:
            ValueError: `sample_sq_norms` is not a vector.
        """
        if sample_sq_norms.ndim != 1:
            raise ValueError(
                "`sample_sq_norms` must have one entry per sample, [N], found shape "
                f"{list(sample_sq_norms.shape)}."
            )
        n = len(sample_sq_norms)
        if n == 0:
            return
        total = sample_sq_norms.to(self.trace_sum).sum()
        mean = grad_sq_norm.to(self.trace_sum)
        self.trace_sum += total - n * mean
        self.signal_sum += n * mean - total / n
        self.freedom += n - 1


class GradientVariance(_PooledMoments):
    r"""Trace of the covariance of the per-sample gradients, unbiased and pooled over batches.

    $$\widehat{\mathrm{tr}\,\Sigma} =
    \frac{\sum_b \big(\sum_n \|g_{bn}\|^2 - N_b \|\bar g_b\|^2\big)}{\sum_b (N_b - 1)}$$

    NaN while no batch had more than one sample.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> metric = GradientVariance()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(4.0))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The pooled trace, []."""
        return self.trace_sum / self.freedom


class NoiseScale(_PooledMoments):
    r"""Simple gradient noise scale: the batch size where noise and signal are equal.

    It is $\mathrm{tr}(\Sigma) / \|G\|^2$.

    Numerator and denominator are unbiased and summed over batches before the ratio is taken; the
    mean of ratios is biased upwards. Infinite while the estimate of $\|G\|^2$ is not positive: the
    batches seen so far are too small to resolve the gradient. McCandlish et al., "An Empirical
    Model of Large-Batch Training", arXiv:1812.06162, 2018, eq. 2.9.

    The estimate assumes that $G$ changes little between the batches it is computed from; reset it
    now and then.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> metric = NoiseScale()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(4.0))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The ratio of the sums, []."""
        return torch.where(self.signal_sum > 0, self.trace_sum / self.signal_sum, torch.inf)

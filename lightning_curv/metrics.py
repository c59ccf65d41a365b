r"""Gradient noise as torchmetrics: summed over batches and processes, in any training loop.

Notation: $g_1, \dots, g_N$ are the gradients of the samples of a batch and $\bar g$ is their mean. If they are
independent with mean $G$ and covariance $\Sigma$, then $\mathbb{E}\|\bar g\|^2 = \|G\|^2 + \mathrm{tr}(\Sigma)/N$.

The metrics take the squared norms of the $g_n$, after a backward pass of a *mean* loss under
``curvature(BatchL2Grad())`` ``N**2 * sum(p.batch_l2 for p in parameters)``, or their inner products with $\bar g$.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "TIC",
    "GradientDiversity",
    "GradientVariance",
    "InnerProductTest",
    "MeanTrace",
    "NoiseScale",
    "NormTest",
    "OrthogonalityTest",
    "unbiased_moments",
]


def unbiased_moments(second_moment: Tensor, grad_sq_norm: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    r"""Trace of the gradient covariance and squared norm of the true gradient, both unbiased.

    For independent samples with weights $w_n$, $\sum_n w_n = 1$, and $\bar g = \sum_n w_n g_n$,

    $$\widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_n w_n \|g_n\|^2 - \|\bar g\|^2}{1 - \sum_n w_n^2}, \qquad
    \widehat{\|G\|^2} = \|\bar g\|^2 - \widehat{\mathrm{tr}\,\Sigma} \sum_n w_n^2 .$$

    For equal weights these are the estimators of McCandlish et al., "An Empirical Model of Large-Batch Training",
    arXiv:1812.06162, 2018, appendix A, with small batches of one sample. The second may be negative.

    Args:
        second_moment: $\sum_n w_n \|g_n\|^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $\sum_n w_n^2 < 1$, the inverse of the effective number of samples, [].

    Returns:
        The two estimates, [] and [].

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> unbiased_moments(g.square().sum(1).mean(), g.mean(0).square().sum(), torch.tensor(1 / 2))
        (tensor(2.), tensor(3.))
    """
    trace = (second_moment - grad_sq_norm) / (1 - concentration)
    return trace, grad_sq_norm - trace * concentration


class _PooledMoments(Metric):
    r"""Sums over batches of $(N-1)\,\widehat{\mathrm{tr}\,\Sigma}$ and $(N-1)\,\widehat{\|G\|^2}$.

    The weight $N - 1$ pools batches of different sizes, and needs no division: a batch of one sample adds nothing.
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
            # Sums of differences of near-equal numbers; on devices without float64 call `set_dtype` first.
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
                f"`sample_sq_norms` must have one entry per sample, [N], found shape {list(sample_sq_norms.shape)}."
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
        **kwargs: see `torchmetrics.Metric`.

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
    r"""Simple gradient noise scale $\mathrm{tr}(\Sigma) / \|G\|^2$: the batch size where noise and signal are equal.

    Numerator and denominator are unbiased and summed over batches before the ratio is taken; the mean of ratios is
    biased upwards. Infinite while the estimate of $\|G\|^2$ is not positive: the batches seen so far are too small to
    resolve the gradient. McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, 2018,
    eq. 2.9.

    The estimate assumes that $G$ changes little between the batches it is computed from; reset it now and then.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = NoiseScale()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(4.0))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The ratio of the sums, []."""
        return torch.where(self.signal_sum > 0, self.trace_sum / self.signal_sum, torch.inf)


class _Sums(Metric):
    """A ratio of sums over batches."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    numerator: Tensor
    denominator: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("numerator", "denominator"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, numerator: Tensor, denominator: Tensor) -> None:
        self.numerator += numerator.to(self.numerator)
        self.denominator += denominator.to(self.denominator)

    def compute(self) -> Tensor:
        """The ratio of the sums, []."""
        return self.numerator / self.denominator


class GradientDiversity(_Sums):
    r"""Gradient diversity $\sum_b \sum_n \|g_{bn}\|^2 / \sum_b \|\sum_n g_{bn}\|^2$.

    Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning", AISTATS 2018, definition 1.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = GradientDiversity()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(4.0))
        >>> metric.compute()
        tensor(0.6250, dtype=torch.float64)
    """

    def update(self, sample_sq_norms: Tensor, grad_sq_norm: Tensor) -> None:
        r"""Add a batch.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            grad_sq_norm: $\|\bar g\|^2$, [].
        """
        self._add(sample_sq_norms.sum(), len(sample_sq_norms) ** 2 * grad_sq_norm)


class NormTest(_Sums):
    r"""Relative error of a mini-batch gradient, the root of $\widehat{\mathrm{tr}\,\Sigma} / N$ over $\|\bar g\|^2$.

    Numerator and denominator are averaged over batches. Byrd et al., "Sample Size Selection in Optimization Methods
    for Machine Learning", Mathematical Programming 2012, eq. 3.5.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = NormTest()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(4.0))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def update(self, sample_sq_norms: Tensor, grad_sq_norm: Tensor) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            grad_sq_norm: $\|\bar g\|^2$, [].
        """
        n = len(sample_sq_norms)
        if n > 1:
            self._add((sample_sq_norms.sum() / n - grad_sq_norm) / (n - 1), grad_sq_norm)

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class InnerProductTest(_Sums):
    r"""Root of $\widehat{\mathrm{Var}}(g_n \cdot \bar g) / N$ over $\|\bar g\|^4$, both averaged over batches.

    Bollapragada, Byrd & Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", SIAM J. Optim. 2018,
    eq. 2.6.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = InnerProductTest()
        >>> metric.update(torch.tensor([2.0, 6.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def update(self, dots: Tensor) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            dots: $g_n \cdot \bar g$, [N], with mean $\|\bar g\|^2$.
        """
        if len(dots) > 1:
            self._add(dots.var() / len(dots), dots.mean().square())

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class OrthogonalityTest(_Sums):
    r"""The part of the error that `NormTest` measures which is orthogonal to $\bar g$.

    With $\|g_n\|^2 - (g_n \cdot \bar g)^2 / \|\bar g\|^2$ in place of the centred $\|g_n\|^2$.
    Bollapragada, Byrd & Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", SIAM J. Optim. 2018,
    eq. 3.2.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = OrthogonalityTest()
        >>> metric.update(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def update(self, sample_sq_norms: Tensor, dots: Tensor) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            dots: $g_n \cdot \bar g$, [N], with mean $\|\bar g\|^2$.
        """
        n = len(dots)
        if n > 1:
            orthogonal = sample_sq_norms.sum() - dots.square().sum() / dots.mean()
            self._add(orthogonal.clamp(min=0) / (n * (n - 1)), dots.mean())

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class MeanTrace(_Sums):
    """Mean over batches, weighted by their samples, of the trace of a curvature of the mean loss.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = MeanTrace()
        >>> metric.update(torch.tensor(2.0), 1)
        >>> metric.update(torch.tensor(6.0), 3)
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    def update(self, trace: Tensor, samples: int) -> None:
        """Add a batch.

        Args:
            trace: for example ``sum(p.ggn_trace_mc for p in parameters)``, [].
            samples: N.
        """
        self._add(samples * trace, torch.tensor(samples))


class TIC(_Sums):
    r"""Takeuchi information criterion from traces: $\sum_b \sum_n \|g_{bn}\|^2 / \sum_b N_b\,\mathrm{tr}\,H_b$.

    Thomas et al., "On the interplay between noise and curvature and its effect on optimization and generalization",
    AISTATS 2020, section 4.

    Args:
        **kwargs: see `torchmetrics.Metric`.

    Example:
        >>> metric = TIC()
        >>> metric.update(torch.tensor([1.0, 9.0]), torch.tensor(2.5))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def update(self, sample_sq_norms: Tensor, trace: Tensor) -> None:
        r"""Add a batch.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            trace: of the GGN or the Hessian of the mean loss, [].
        """
        self._add(sample_sq_norms.sum(), len(sample_sq_norms) * trace)

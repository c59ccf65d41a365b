"""Ratios of sums over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_curv.metrics import functional
from lightning_curv.metrics.wide_state import WideState


class Ratio(WideState):
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

    def add(self, numerator: Tensor, denominator: Tensor) -> None:
        self.numerator += numerator.to(self.numerator)
        self.denominator += denominator.to(self.denominator)

    def moments(self, squares: Tensor, grad_sq_norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of squares [N], the squared norm of the gradient and the concentration 1 / N.

        They are in the state's type: where there is little noise the first two are nearly equal,
        and their difference is taken next.
        """
        second_moment = squares.to(self.numerator).mean()
        return (
            second_moment,
            grad_sq_norm.to(self.numerator),
            second_moment.new_tensor(1 / len(squares)),
        )

    def compute(self) -> Tensor:
        """The ratio of the sums, []."""
        return self.numerator / self.denominator


class GradientDiversity(Ratio):
    r"""Gradient diversity $\sum_b \sum_n \|g_{bn}\|^2 / \sum_b \|\sum_n g_{bn}\|^2$.

    Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning", AISTATS
    2018, definition 1.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
        n = len(sample_sq_norms)
        if n:
            parts = functional.gradient_diversity(*self.moments(sample_sq_norms, grad_sq_norm))
            self.add(*(n**2 * part for part in parts))


class NormTest(Ratio):
    r"""Relative error of a mini-batch gradient.

    It is the root of $\widehat{\mathrm{tr}\,\Sigma} / N$ over $\|\bar g\|^2$.

    Numerator and denominator are averaged over batches. Byrd et al., "Sample Size Selection in
    Optimization Methods for Machine Learning", Mathematical Programming 2012, eq. 3.5.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
        if len(sample_sq_norms) > 1:
            self.add(*functional.norm_test(*self.moments(sample_sq_norms, grad_sq_norm)))

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class InnerProductTest(Ratio):
    r"""Relative error of the squared norm of a mini-batch gradient.

    It is the root of $\widehat{\mathrm{Var}}(g_n \cdot \bar g) / N$ over $\|\bar g\|^4$, both
    averaged over batches.

    Bollapragada, Byrd & Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", SIAM
    J. Optim. 2018, eq. 2.6.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
            dots = dots.to(self.numerator)
            self.add(*functional.inner_product_test(*self.moments(dots.square(), dots.mean())))

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class OrthogonalityTest(Ratio):
    r"""The part of the error that `NormTest` measures which is orthogonal to $\bar g$.

    With $\|g_n\|^2 - (g_n \cdot \bar g)^2 / \|\bar g\|^2$ in place of the centred $\|g_n\|^2$.
    Bollapragada, Byrd & Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", SIAM
    J. Optim. 2018, eq. 3.2.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
        if len(dots) > 1:
            second_moment = sample_sq_norms.to(self.numerator).mean()
            dots = dots.to(self.numerator)
            dot_moments = self.moments(dots.square(), dots.mean())
            self.add(*functional.orthogonality_test(second_moment, *dot_moments))

    def compute(self) -> Tensor:
        """The root of the ratio of the sums, []."""
        return super().compute().sqrt()


class MeanTrace(Ratio):
    """Mean over batches, weighted by their samples, of the trace of a curvature of the mean loss.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
            trace: for example `sum(p.ggn_trace_mc for p in parameters)`, [].
            samples: N.
        """
        self.add(samples * trace, torch.tensor(samples))


class TIC(Ratio):
    r"""Takeuchi information criterion from traces.

    It is $\sum_b \sum_n \|g_{bn}\|^2 / \sum_b N_b\,\mathrm{tr}\,H_b$.

    Thomas et al., "On the interplay between noise and curvature and its effect on optimization and
    generalization", AISTATS 2020, section 4.

    Args:
        **kwargs: See `torchmetrics.Metric`.

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
        self.add(sample_sq_norms.sum(), len(sample_sq_norms) * trace)


class CABS(Ratio):
    r"""Batch size $\mathrm{lr}\,\widehat{\mathrm{tr}\,\Sigma} / \ell$.

    Coupled adaptive batch size for plain SGD and a loss $\ell$ whose minimum is zero; numerator and
    denominator are averaged over batches. Balles, Romero & Hennig, "Coupling Adaptive Batch Sizes
    with Learning Rates", UAI 2017, eq. 22.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> metric = CABS()
        >>> squares = torch.tensor([1.0, 9.0])
        >>> metric.update(squares, torch.tensor(4.0), loss=torch.tensor(0.5), lr=0.1)
        >>> metric.compute()
        tensor(0.4000, dtype=torch.float64)
    """

    def update(
        self,
        sample_sq_norms: Tensor,
        grad_sq_norm: Tensor,
        loss: Tensor,
        lr: float,
    ) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            sample_sq_norms: $\|g_n\|^2$, [N].
            grad_sq_norm: $\|\bar g\|^2$, [].
            loss: $\ell$, mean over the samples, [].
            lr: learning rate.
        """
        if len(sample_sq_norms) > 1:
            variance, _ = functional.unbiased_moments(*self.moments(sample_sq_norms, grad_sq_norm))
            self.add(*functional.coupled_batch_size(variance, loss, lr))

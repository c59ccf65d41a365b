"""Ratios of sums for every entry of the gradient."""

from __future__ import annotations

from torch import Tensor

from lightning_curv.metrics.functional import entry_moments
from lightning_curv.metrics.ratios import Ratio
from lightning_curv.precision import wide


class _EntrywiseSums(Ratio):
    """Sums over batches for every entry of the gradient; scalars until the first batch."""

    def add(self, numerator: Tensor, denominator: Tensor) -> None:
        self.numerator = self.numerator + numerator.to(self.numerator)
        self.denominator = self.denominator + denominator.to(self.denominator)

    def _ratios(self) -> Tensor:
        """Of the sums, where the denominator is not zero."""
        kept = self.denominator > 0
        return self.numerator[kept] / self.denominator[kept]


class GradientSNR(_EntrywiseSums):
    r"""Gradient signal-to-noise ratio, the mean over the entries of the gradient.

    An entry $j$ has $\bar g_j^2 / \widehat{\mathrm{Var}}\,g_j$.

    Numerator and denominator are averaged over batches; entries without variance are left out, and
    NaN means that there is no other. Pure noise has $1/N$. Liu et al., "Understanding Why Neural
    Networks Generalize Well Through GSNR of Parameters", ICLR 2020, eq. 3.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = GradientSNR()
        >>> # Two samples with the gradients [1, 1] and [3, 1].
        >>> metric.update(torch.tensor([2.0, 1.0]), torch.tensor([10.0, 2.0]), 2)
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    def update(self, grad: Tensor, sum_grad_squared: Tensor, samples: int) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            grad: $\bar g$, [P].
            sum_grad_squared: $\sum_n g_{nj}^2$, [P].
            samples: N.
        """
        if samples > 1:
            square, variance = _moments(grad, sum_grad_squared, samples)
            self.add(square, variance)

    def compute(self) -> Tensor:
        """The mean of the ratios of the sums, []."""
        return self._ratios().mean()


class EvidenceCriterion(_EntrywiseSums):
    r"""Evidence criterion: positive where the gradient is mere noise.

    It is $1 - \mathrm{mean}_j\,N \bar g_j^2 / \widehat{\mathrm{Var}}\,g_j$.

    The evidence-based criterion for early stopping of plain SGD, $\bar g_j^2$ and
    $\widehat{\mathrm{Var}}\,g_j / N$ averaged over batches. Mahsereci et al., "Early Stopping
    without a Validation Set", arXiv:1703.09580, 2017, eq. 7.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = EvidenceCriterion()
        >>> # Two samples with the gradients [1, 1] and [3, 1].
        >>> metric.update(torch.tensor([2.0, 1.0]), torch.tensor([10.0, 2.0]), 2)
        >>> metric.compute()
        tensor(-3., dtype=torch.float64)
    """

    def update(self, grad: Tensor, sum_grad_squared: Tensor, samples: int) -> None:
        r"""Add a batch of at least two samples; a smaller one adds nothing.

        Args:
            grad: $\bar g$, [P].
            sum_grad_squared: $\sum_n g_{nj}^2$, [P].
            samples: N.
        """
        if samples > 1:
            square, variance = _moments(grad, sum_grad_squared, samples)
            self.add(square, variance / samples)

    def compute(self) -> Tensor:
        """One minus the mean of the ratios of the sums, []."""
        return 1 - self._ratios().mean()


class TICDiagonal(_EntrywiseSums):
    r"""Diagonal approximation of the Takeuchi information criterion.

    It is $\sum_j \overline{g_{nj}^2} / \overline{H}_{jj}$.

    Averages over the samples of all batches; entries without curvature are left out. Thomas et al.,
    "On the interplay between noise and curvature and its effect on optimization and
    generalization", AISTATS 2020, section 4.

    Args:
        **kwargs: See `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = TICDiagonal()
        >>> metric.update(torch.tensor([10.0, 2.0]), torch.tensor([5.0, 0.5]), 2)
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    def update(self, sum_grad_squared: Tensor, diagonal: Tensor, samples: int) -> None:
        r"""Add a batch.

        Args:
            sum_grad_squared: $\sum_n g_{nj}^2$, [P].
            diagonal: of the GGN or the Hessian of the mean loss, for example `p.diag_ggn_mc`,
                [P].
            samples: N.
        """
        self.add(sum_grad_squared, samples * diagonal)

    def compute(self) -> Tensor:
        """The sum of the ratios of the sums, []."""
        return self._ratios().sum()


def _moments(
    grad: Tensor,
    sum_grad_squared: Tensor,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Squares of the mean gradient's entries and unbiased variances of the samples', [P] each."""
    return entry_moments(wide(grad), wide(sum_grad_squared) / samples, 1 / samples)

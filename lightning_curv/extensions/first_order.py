r"""First-order quantities: functions of the per-sample gradients.

The loss is $s \sum_n \ell_n$ (mean: s = 1/N; sum: s = 1) and $g_n = \nabla \ell_n$. All
of them come with the user's own backward pass and need any loss, known or not.
"""

from __future__ import annotations

from torch import Tensor

from lightning_curv.extensions.base import Differentiable
from lightning_curv.extensions.subsampling import wanted_rows, wanted_samples
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.squares import squared_sizes


class BatchGrad(Differentiable):
    r"""Per-sample gradients $s\,g_n$, in `grad_batch` of shape `[N, *p]`.

    They sum to `.grad`. Cost: one more product per layer; memory: N times the parameters. Dangel,
    Kunstner & Hennig, *BackPACK*, ICLR 2020, eq. 2.

    Args:
        subsampling: Indices of the samples whose gradients are wanted, in the wanted order;
            default: all.

    Raises:
        IndexError: In `backward`: a batch has no such sample.
        TypeError: In `backward`: an index is no integer.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchGrad, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(BatchGrad()):
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).mean().backward()
        >>> layer.weight.grad_batch.squeeze(1)
        tensor([[0.5000, 1.0000],
                [1.5000, 2.0000]])
    """

    savefield = "grad_batch"
    totals = False
    forms = True

    def __init__(self, subsampling: list[int] | None = None) -> None:
        self.subsampling = subsampling

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Return the single column of J."""
        return wanted_samples(jacobian, self.subsampling).per_sample()[0]

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Return all of them, or those that are wanted."""
        return wanted_rows(gradients, self.subsampling)


class BatchL2Grad(Differentiable):
    r"""Squared norms of the per-sample gradients $\|s\,g_n\|^2$, in `batch_l2`, `[N]`.

    They are those of one parameter; sum over the parameters for the norm of the whole gradient.
    Cost: small; layers with shared weights use Gram matrices of their positions where these are
    cheaper than the per-sample gradient (Goodfellow, *Efficient per-example gradient computations*,
    2015; Rochette et al., 2019). Memory does not grow with N times the parameters.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchL2Grad, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(BatchL2Grad()):  # the gradients are the inputs
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        >>> layer.weight.batch_l2
        tensor([ 5., 25.])
    """

    savefield = "batch_l2"
    totals = False

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Take the squared norms of the single column of J."""
        return jacobian.squared_norms()[0]

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Sum the squares of their entries."""
        return squared_sizes(gradients.unsqueeze(-1).flatten(1)).sum(1)


class SumGradSquared(Differentiable):
    r"""Sum of the squared per-sample gradients $\sum_n (s\,g_n)^2$, in `sum_grad_squared`.

    It has the parameter's shape, and is the uncentred second moment times N; of complex parameters
    the squares are $|s\,g_n|^2$, real numbers. Cost: one more product per layer without
    weight sharing; no per-sample gradients are in memory.

    Example:
        >>> import torch
        >>> from lightning_curv import SumGradSquared, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(SumGradSquared()):  # the gradients are the inputs
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
        >>> layer.weight.sum_grad_squared
        tensor([[10., 20.]])
    """

    savefield = "sum_grad_squared"
    totals = False

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Sum the squares of the single column of J over the samples."""
        return jacobian.sum_squares()

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Sum their squares over the samples."""
        return squared_sizes(gradients).sum(0)


class Variance(Differentiable):
    r"""Variance of the per-sample gradients, in `variance` of the parameter's shape.

    It is the population variance over the batch,
    $\tfrac1N \sum_n (s\,g_n - \tfrac1N \sum_m s\,g_m)^2 \ge 0$, of the *scaled* gradients:
    for a mean loss multiply by N² for the variance of the $g_n$. It is free of cancellation,
    since no difference of float32 moments is taken. Of complex parameters it is the real number
    $\tfrac1N \sum_n |\cdot|^2$. Cost: as `SumGradSquared`.

    Example:
        >>> import torch
        >>> from lightning_curv import Variance, curvature
        >>> layer = torch.nn.Linear(2, 1)
        >>> with curvature(Variance()):  # the gradients are the inputs
        ...     layer(torch.tensor([[1.0, 2.0], [3.0, 6.0]])).sum().backward()
        >>> layer.weight.variance
        tensor([[1., 4.]])
    """

    savefield = "variance"

    def evaluate(self, jacobian: Jacobian) -> Tensor:
        """Take the variance of the single column of J over the samples."""
        return jacobian.variance()

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """Take their mean squared distance from the mean."""
        return gradients.var(0, correction=0)

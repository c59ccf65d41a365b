r"""The formulas of gradient noise, once: metrics add them up, the callback takes one batch.

Notation: samples have gradients $g_n$ and weights $w_n$ with $\sum_n w_n = 1$; the gradient is
$\bar g = \sum_n w_n g_n$, and $c = \sum_n w_n^2 < 1$ is the *concentration* of the weights, $1/N$
for equal ones. All functions take tensors of any one shape, or Python's or NumPy's numbers, and
return the same. Those of a ratio return its numerator and its denominator, since averages over
batches are taken of both before the division: the mean of ratios is biased.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", Tensor, float)


def unbiased_moments(
    second_moment: Number,
    grad_sq_norm: Number,
    concentration: Number,
) -> tuple[Number, Number]:
    r"""Trace of the gradient covariance and squared norm of the true gradient, both unbiased.

    For independent samples with weights $w_n$, $\sum_n w_n = 1$, and $\bar g = \sum_n w_n g_n$,

    $$\widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_n w_n \|g_n\|^2 - \|\bar g\|^2}{1 - \sum_n w_n^2},
    \qquad \widehat{\|G\|^2} = \|\bar g\|^2 - \widehat{\mathrm{tr}\,\Sigma} \sum_n w_n^2 .$$

    For equal weights these are the estimators of McCandlish et al., "An Empirical Model of
    Large-Batch Training", arXiv:1812.06162, 2018, appendix A, with small batches of one sample. The
    second may be negative.

    Args:
        second_moment: $\sum_n w_n \|g_n\|^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $\sum_n w_n^2 < 1$, the inverse of the effective number of samples, [].

    Returns:
        The two estimates, [] and [].

    Example:
        >>> import torch
        >>> g = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> grad_sq_norm = g.mean(0).square().sum()
        >>> unbiased_moments(g.square().sum(1).mean(), grad_sq_norm, torch.tensor(1 / 2))
        (tensor(2.), tensor(3.))
    """
    return unbiased_moments_of_parts(second_moment, grad_sq_norm, 1, concentration)


def unbiased_moments_of_parts(
    second_moment: Number,
    grad_sq_norm: Number,
    part_inverse: Number | float,
    whole_inverse: Number,
) -> tuple[Number, Number]:
    r"""The same two from gradients of parts of a batch: micro-batches, or those of processes.

    No gradient of a single sample is needed. Part $k$ of $n_k$ samples has the mean gradient $G_k$
    and the weight $v_k$, $\sum_k v_k = 1$, and $\bar g = \sum_k v_k G_k$. From
    $E\|G_k\|^2 = \|G\|^2 + \mathrm{tr}\,\Sigma / n_k$ and
    $E\|\bar g\|^2 = \|G\|^2 + \mathrm{tr}\,\Sigma \sum_k v_k^2 / n_k$ follow

    $$\widehat{\mathrm{tr}\,\Sigma} = \frac{\sum_k v_k \|G_k\|^2 - \|\bar g\|^2}{\sum_k v_k / n_k -
    \sum_k v_k^2 / n_k}, \qquad \widehat{\|G\|^2} = \|\bar g\|^2 - \widehat{\mathrm{tr}\,\Sigma}
    \sum_k v_k^2 / n_k .$$

    For parts of one size these are the estimators of two batch sizes of McCandlish et al., 2018,
    appendix A. They vary more than `unbiased_moments`: the trace by a factor of about
    $(N - 1) / (K - 1)$ for K parts of N samples. Where samples of one part influence each other
    (BatchNorm), $\mathrm{tr}\,\Sigma$ is n times the variance of the gradient of a part.

    Args:
        second_moment: $\sum_k v_k \|G_k\|^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        part_inverse: $\sum_k v_k / n_k$, [].
        whole_inverse: $\sum_k v_k^2 / n_k$, less than that, [].

    Returns:
        The two estimates, [] and [].

    Example:
        >>> # Two parts of 8 samples, with the gradients [1, 0] and [3, 0].
        >>> unbiased_moments_of_parts(5.0, 4.0, 1 / 8, 1 / 16)
        (16.0, 3.0)
    """
    trace = (second_moment - grad_sq_norm) / (part_inverse - whole_inverse)
    return trace, grad_sq_norm - trace * whole_inverse


def gradient_diversity(
    second_moment: Number,
    grad_sq_norm: Number,
    concentration: Number,
) -> tuple[Number, Number]:
    r"""Numerator and denominator of $\sum_n \|g_n\|^2 / \|\sum_n g_n\|^2$, each divided by $N^2$.

    From $1/N$ (equal gradients) upwards; batches up to $N$ times this speed training up. Yin et
    al., "Gradient
    Diversity: a Key Ingredient for Scalable Distributed Learning", AISTATS 2018, definition 1.

    Args:
        second_moment: $\sum_n w_n \|g_n\|^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $c$, [].

    Returns:
        The two parts, [] and [].

    Example:
        >>> gradient_diversity(5.0, 4.0, 1 / 2)  # gradients [1, 0] and [3, 0]
        (2.5, 4.0)
    """
    return second_moment * concentration, grad_sq_norm


def norm_test(
    second_moment: Number,
    grad_sq_norm: Number,
    concentration: Number,
) -> tuple[Number, Number]:
    r"""Numerator and denominator of the squared error of the gradient, relative to its norm.

    That is $c\,\widehat{\mathrm{tr}\,\Sigma} / \|\bar g\|^2$.

    Where the root of the ratio is above a θ of the user's choice the batch should grow. Byrd et
    al., "Sample Size Selection in Optimization Methods for Machine Learning", Mathematical
    Programming 2012, eq. 3.5.

    Args:
        second_moment: $\sum_n w_n \|g_n\|^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $c$, [].

    Returns:
        The two parts, [] and [].

    Example:
        >>> norm_test(5.0, 4.0, 1 / 2)  # gradients [1, 0] and [3, 0]
        (1.0, 4.0)
    """
    variance, _ = unbiased_moments(second_moment, grad_sq_norm, concentration)
    return variance * concentration, grad_sq_norm


def inner_product_test(
    dot_second_moment: Number,
    grad_sq_norm: Number,
    concentration: Number,
) -> tuple[Number, Number]:
    r"""Numerator and denominator of $c\,\widehat{\mathrm{Var}}(g_n \cdot \bar g) / \|\bar g\|^4$.

    The part of the error of `norm_test` that lies along $\bar g$. Bollapragada, Byrd & Nocedal,
    "Adaptive Sampling Strategies for Stochastic Optimization", SIAM J. Optim. 2018, eq. 2.6.

    Args:
        dot_second_moment: $\sum_n w_n (g_n \cdot \bar g)^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $c$, [].

    Returns:
        The two parts, [] and []; the first is at least zero.

    Example:
        >>> inner_product_test(20.0, 4.0, 1 / 2)  # gradients [1, 0] and [3, 0]
        (4.0, 16.0)
    """
    variance = (dot_second_moment - grad_sq_norm**2) / (1 - concentration)
    return _at_least_zero(variance) * concentration, grad_sq_norm**2


def orthogonality_test(
    second_moment: Number,
    dot_second_moment: Number,
    grad_sq_norm: Number,
    concentration: Number,
) -> tuple[Number, Number]:
    r"""Numerator and denominator of the part of the squared error that is orthogonal to $\bar g$.

    The mean square of the $g_n$ orthogonal to $\bar g$, times $c / (1 - c)$, over $\|\bar g\|^2$.
    It and the ratio of the `inner_product_test` add up to that of the `norm_test`. Bollapragada,
    Byrd & Nocedal, "Adaptive Sampling Strategies for Stochastic Optimization", SIAM J. Optim. 2018,
    eq. 3.2.

    Args:
        second_moment: $\sum_n w_n \|g_n\|^2$, [].
        dot_second_moment: $\sum_n w_n (g_n \cdot \bar g)^2$, [].
        grad_sq_norm: $\|\bar g\|^2$, [].
        concentration: $c$, [].

    Returns:
        The two parts, [] and []; the first is at least zero.

    Example:
        >>> orthogonality_test(2.0, 1.0, 1.0, 1 / 2)  # gradients [1, 1] and [1, -1]
        (1.0, 1.0)
    """
    orthogonal = _at_least_zero(second_moment - dot_second_moment / grad_sq_norm)
    return orthogonal * concentration / (1 - concentration), grad_sq_norm


def entry_moments(
    mean: Tensor,
    second_moment: Tensor,
    concentration: float,
) -> tuple[Tensor, Tensor]:
    r"""Squares of the gradient's entries and unbiased variances of the samples' entries.

    Their ratio is the gradient signal-to-noise ratio (Liu et al., "Understanding Why Neural
    Networks Generalize Well Through GSNR of Parameters", ICLR 2020, eq. 3); one minus the mean over
    the entries of the ratio divided by $c$ is the evidence-based criterion for early stopping of
    plain SGD, positive where the gradient is mere noise (Mahsereci et al., "Early Stopping without
    a Validation Set", arXiv:1703.09580, 2017, eq. 7).

    Args:
        mean: $\bar g$, [*p].
        second_moment: $\sum_n w_n g_{nj}^2$, [*p].
        concentration: $c$.

    Returns:
        $\bar g_j^2$ and $\widehat{\mathrm{Var}}\,g_j \ge 0$, [*p] each.

    Example:
        >>> import torch
        >>> # Two samples with the gradients [1, 1] and [3, 1].
        >>> entry_moments(torch.tensor([2.0, 1.0]), torch.tensor([5.0, 1.0]), 1 / 2)
        (tensor([4., 1.]), tensor([2., 0.]))
    """
    square = mean.square()
    return square, ((second_moment - square) / (1 - concentration)).clamp(min=0)


def coupled_batch_size(
    variance: Number,
    loss: Number,
    lr: float,
) -> tuple[Number, Number]:
    r"""Numerator and denominator of CABS, a batch size.

    That is $\mathrm{lr}\,\widehat{\mathrm{tr}\,\Sigma} / \ell$.

    For plain SGD and a loss whose minimum is zero. Balles, Romero & Hennig, "Coupling Adaptive
    Batch Sizes with Learning Rates", UAI 2017, eq. 22.

    Args:
        variance: $\widehat{\mathrm{tr}\,\Sigma}$, [].
        loss: $\ell$, the mean over the samples, [].
        lr: learning rate.

    Returns:
        The two parts, [] and [].

    Example:
        >>> coupled_batch_size(2.0, 0.5, 0.1)
        (0.2, 0.5)
    """
    return lr * variance, loss


def _at_least_zero(value: Number) -> Number:
    """Zero where rounding made a square negative; NaN stays."""
    return value * (value > 0)

"""Factored Tikhonov damping: one damping for a Kronecker product, split over its factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import mean_eigenvalue


def split_damping(
    factors: Sequence[Tensor],
    damping: float | Tensor,
    batched: bool,
) -> list[Tensor]:
    r"""Split a damping over Kronecker factors in proportion to their mean eigenvalues.

    With $t_i = \operatorname{tr}(F_i) / d_i$ and $k$ factors, factor $i$ is damped by

    $$\gamma_i = t_i \, \Big(\lambda / \prod_j t_j\Big)^{1/k},$$

    so that $\prod_i \gamma_i = \lambda$. For two factors $B, A$ this is
    $\gamma_B = \sqrt\lambda / \pi$ and $\gamma_A = \pi \sqrt\lambda$ with $\pi^2 = t_A / t_B$, the
    choice that minimizes the trace-norm bound on $\gamma_A B \otimes I + \gamma_B I \otimes A$; for
    one factor it is $\lambda$. Where a factor is zero every $\gamma_i$ is $\lambda^{1/k}$.

    Args:
        factors: Kronecker factors, each [d, d] or a diagonal [d]; all with a leading [G] if
            `batched`.
        damping: $\lambda > 0$, in the unit of the block's eigenvalues.
        batched: whether the factors carry a leading group dimension.

    Returns:
        One damping per factor, [G] if `batched`, else [].

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, ICML 2015, section 6.3.
    """
    order = len(factors)
    means = torch.stack([mean_eigenvalue(factor, batched) for factor in factors])
    # A zero factor, before anything was measured or of a layer that nothing reaches, has no
    # logarithm: all factors are then damped alike.
    usable = (means > 0).all(dim=0)
    # In logarithms: the product of small traces underflows in float32.
    logs = means.clamp_min(torch.finfo(means.dtype).tiny).log()
    split = torch.where(usable, logs - logs.mean(dim=0), 0.0)
    return list(split.exp() * damping ** (1.0 / order))

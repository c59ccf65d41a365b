"""Adam's direction, the update of parameters that have no curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import State
from lightning_curv.optimizers.linear_algebra.running_mean import next_weight, updated_mean


def adam_direction(
    state: State,
    grad: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    r"""Adam's direction $\hat m / (\sqrt{\hat v} + \epsilon)$.

    $\hat m$ and $\hat v$ are bias-corrected running means of $g$ and $g^2$, kept in `state`.

    Args:
        state: state of the parameter, updated.
        grad: $g$, shape of the parameter.
        betas: decays of the two means.
        eps: $\epsilon$.

    Returns:
        The direction, elements of size about 1, in float32 or wider.

    Source: D. Kingma, J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015, algorithm 1.
    """
    if "adam" not in state:
        zeros = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        state["adam"] = {"mean": zeros, "square": zeros.clone(), "weights": [0.0, 0.0]}
    adam = state["adam"]
    adam["weights"] = [
        next_weight(weight, beta) for weight, beta in zip(adam["weights"], betas, strict=True)
    ]
    of_mean, of_square = adam["weights"]
    grad = grad.to(adam["mean"].dtype)
    adam["mean"] = updated_mean(adam["mean"], grad, of_mean)
    adam["square"] = updated_mean(adam["square"], grad * grad, of_square)
    return adam["mean"] / (adam["square"].sqrt() + eps)

"""What a loss whose curvature can vanish demands of a step.

It is damped by at least so much, and may not promise more than the loss is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.distributed.failures import processes
from lightning_curv.extensions import GraphExtension
from lightning_curv.losses.categorical import Categorical
from lightning_curv.losses.likelihoods import Bernoulli
from lightning_curv.losses.parts import KnownPart, LossPart
from lightning_curv.passes.passes import Passes

NONNEGATIVE = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss}
# Of so many predictions in a batch or fewer, the least damping is the whole weight of the loss.
ROWS = 5
# The least damping of binary cross-entropy as a share of its weight.
BERNOULLI = 0.02


class LossLimits(GraphExtension):
    r"""The least damping of a loss, how far it can fall, its size if nothing is known of it, [6].

    These are $\lambda_0$; the loss, or inf if it can become negative; $|\ell|$; one nat per sample
    if it can (1/32 where the variance of a normal distribution is learned), else inf; the loss
    itself; and the number of samples. The Fisher information of a confident classifier vanishes
    faster than its gradient: damping that is relative to the curvature vanishes with it, and the
    fewer predictions a batch has the sooner it is trusted too far. With $w$ the weights of the
    loss' terms (mean: 1/N each), $\lambda_0$ is $\sum w \cdot \min(1, 5 / N)$ for cross-entropy of
    $N$ predictions in all processes together, $0.02 \sum w / E^2$ for binary cross-entropy of $E$
    outputs per sample, which are rarely all confident, and 0 for losses of constant curvature. Of a
    loss that torch has no function for nothing is known but its size $|\ell|$ (0 for known losses),
    which says how far a step may reasonably promise to go. Of the logarithm of a density, which has
    no lower bound, these nats are how far the first step may go in the metric of the model.
    """

    savefield = "loss_limits"
    independent = False

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """The same six numbers for all parameters."""
        samples = passes.samples.count
        loss = _total(passes)
        dtype = loss.dtype
        floors = [_floor(part, samples, loss) for part in passes.parts]
        floor = torch.stack([of_part.to(dtype) for of_part in floors]).sum()
        known_parts = [part for part in passes.parts if isinstance(part, KnownPart)]
        all_known = len(known_parts) == len(passes.parts)
        is_bounded = all_known and all(_nonnegative(part) for part in known_parts)
        max_decrease = torch.full_like(floor, math.inf)
        size = loss.abs() * (not all_known)
        if is_bounded:
            # Terms of negative weight, which `curvature="empirical"` takes, have no upper bound.
            negative = torch.stack([(part.likelihood.weight < 0).any() for part in known_parts])
            max_decrease = loss.where(~negative.any(), math.inf)
            size = loss.abs() * negative.any()
        reach = torch.full_like(floor, math.inf)
        if all_known and not is_bounded:
            nats = torch.stack([part.likelihood.nats.to(dtype) for part in known_parts]).max()
            reach = nats * min(part.likelihood.reach for part in known_parts)
        limits = torch.stack(
            [floor, max_decrease, size, reach, loss, torch.full_like(floor, samples)]
        )
        return {
            parameter: limits
            for parameters in passes.tape.parameters.values()
            for parameter in parameters
        }


class LossValue(GraphExtension):
    """The loss itself, [1], where nothing else is read of the graph; in the field of `LossLimits`.

    Args:
        parameters: Where it is left.
    """

    savefield = LossLimits.savefield
    independent = needs_samples = needs_likelihood = False
    reads_root = True

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """The same number for all parameters."""
        return dict.fromkeys(self._parameters, _total(passes)[None])


def _total(passes: Passes) -> Tensor:
    """The loss, [], in float32 or wider."""
    total = (passes.loss.detach() * passes.seed).sum()
    return total.to(torch.promote_types(total.dtype, torch.float32))


def _nonnegative(part: KnownPart) -> bool:
    """Whether the summand is a loss function that never falls below zero."""
    return isinstance(part.likelihood, (Bernoulli, Categorical)) or part.function in NONNEGATIVE


def _floor(part: LossPart, samples: int, loss: Tensor) -> Tensor:
    """The least damping of one summand of the loss, []."""
    if isinstance(part, KnownPart):
        likelihood = part.likelihood
    else:
        likelihood = None
    if isinstance(likelihood, Categorical):
        predictions = max(1, processes() * likelihood.weight.numel())
        return likelihood.weight.sum() * min(1.0, ROWS / predictions)
    if isinstance(likelihood, Bernoulli):
        inverse_outputs = samples / max(1, likelihood.weight.numel())
        return BERNOULLI * likelihood.weight.sum() * inverse_outputs**2
    return torch.zeros_like(loss)

"""What a loss whose curvature can vanish demands: a least damping, and a bound on what a step may promise."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.extensions import GraphExtension
from lightning_curv.losses.categorical import Categorical
from lightning_curv.losses.likelihoods import Bernoulli
from lightning_curv.losses.parts import KnownPart, LossPart
from lightning_curv.optimizers.linear_algebra.collectives import processes
from lightning_curv.passes.passes import Passes

NONNEGATIVE = {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss}
ROWS = 5  # predictions in a batch for which the least damping is the whole weight of the loss
BERNOULLI = 0.02


class LossLimits(GraphExtension):
    r"""Least damping $\lambda_0$, the loss, or inf if it can become negative, and the size of an unknown loss, [3].

    The Fisher information of a confident classifier vanishes faster than its gradient: damping that
    is relative to the curvature vanishes with it, and the fewer predictions a batch has the sooner
    it is trusted too far. With $w$ the weights of the loss' terms (mean: 1/N each), $\lambda_0$ is
    $\sum w \cdot \min(1, 5 / N)$ for cross-entropy of $N$ predictions in all processes together,
    $0.02 \sum w / E^2$ for binary cross-entropy of $E$ outputs per sample, which are rarely all
    confident, and 0 for losses of constant curvature. Of a loss that torch has no function for
    nothing is known but its size $|\ell|$ (0 for known losses), which says how far a step may
    reasonably promise to go.
    """

    savefield = "loss_limits"
    independent = False

    def compute(self, passes: Passes) -> dict[Tensor, Tensor]:
        """The same numbers for all parameters."""
        floor = torch.stack(
            [_floor(part, passes.samples.count).float() for part in passes.parts]
        ).sum()
        bounded = all(isinstance(part, KnownPart) and _nonnegative(part) for part in passes.parts)
        loss = (passes.loss.detach() * passes.seed).sum().float()
        unknown = not all(isinstance(part, KnownPart) for part in passes.parts)
        room = loss if bounded else torch.full_like(floor, math.inf)
        limits = torch.stack([floor, room, loss.abs() * unknown])
        return {
            parameter: limits for found in passes.tape.parameters.values() for parameter in found
        }


def _nonnegative(part: KnownPart) -> bool:
    return isinstance(part.likelihood, (Bernoulli, Categorical)) or part.function in NONNEGATIVE


def _floor(part: LossPart, samples: int) -> Tensor:
    likelihood = part.likelihood if isinstance(part, KnownPart) else None
    if isinstance(likelihood, Categorical):
        return likelihood.weight.sum() * min(
            1.0, ROWS / max(1, processes() * likelihood.weight.numel())
        )
    if isinstance(likelihood, Bernoulli):
        return (
            BERNOULLI * likelihood.weight.sum() * (samples / max(1, likelihood.weight.numel())) ** 2
        )
    return torch.zeros(())

"""Random positions of convolutions, enough for their Kronecker factors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lightning_curv.terms.jacobian import Jacobian


def subsampled(jacobian: Jacobian, positions: int, seed: int) -> Jacobian:
    r"""The Jacobian with only some random positions of a convolution.

    The cotangents are multiplied by $\sqrt{S/P}$. Sums of squares over the $S$ positions then keep
    their expectation, and so do means of squares of the inputs. The patches are gathered from a
    view of the input; they never exist for all positions.

    Args:
        jacobian: of any parameter; returned as it is unless it is a convolution's weight with more
            positions.
        positions: $P$, number of positions to keep, the same for all samples.
        seed: of the draw, without replacement.
    """
    (term, *others) = jacobian.terms
    count = term.positions
    if others or count <= positions or not term.has_kernel or term.lengths is not None:
        return jacobian
    # On the CPU, so that the positions are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:positions].to(term.g.device)
    gathered = term.at_positions(chosen)
    scaled = replace(gathered, g=gathered.g * math.sqrt(count / positions))
    return Jacobian(jacobian.parameter, [scaled], jacobian.signs)

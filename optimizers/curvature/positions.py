"""Random positions of convolutions, enough for their Kronecker factors."""

import math
from dataclasses import replace

import torch

from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term

KERNEL = "xyz"


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
    count = math.prod(size for letter, size in term.sizes().items() if letter in term.shared)
    is_convolution = any(letter in KERNEL for letter in term.par)
    if others or count <= positions or not is_convolution or term.lengths is not None:
        return jacobian
    # On the CPU, so that the positions are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:positions].to(term.g.device)
    gathered = _gathered(term, chosen, math.sqrt(count / positions))
    return Jacobian(jacobian.parameter, [gathered], jacobian.signs)


def _gathered(term: Term, chosen: torch.Tensor, factor: float) -> Term:
    """The term with only the chosen positions, and its cotangents times a factor.

    Args:
        term: of a convolution, with one letter per axis of the image as shared positions.
        chosen: numbers of the positions, row-major, [P].
        factor: of the cotangents.
    """
    assert term.x is not None
    sizes = term.sizes()
    shared = [letter for letter in term.out if letter in term.shared]
    indices = torch.unravel_index(chosen, [sizes[letter] for letter in shared])
    # The shared axes are moved behind those of column and sample, and indexed together.
    g_axes = [2 + term.out.index(letter) for letter in shared]
    x_axes = [1 + term.inp.index(letter) for letter in shared]
    g = term.g.movedim(g_axes, [2 + i for i in range(len(shared))])
    x = term.x.movedim(x_axes, [1 + i for i in range(len(shared))])
    samples = (slice(None),)
    columns_and_samples = (slice(None), slice(None))
    g = g[columns_and_samples + indices]
    x = x[samples + indices]
    out = "s" + "".join(letter for letter in term.out if letter not in shared)
    inp = "s" + "".join(letter for letter in term.inp if letter not in shared)
    return replace(term, out=out, inp=inp, g=g * factor, x=x)

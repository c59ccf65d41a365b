"""Random positions of convolutions, enough for their Kronecker factors."""

import math
from dataclasses import replace

import torch

from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term

KERNEL = "xyz"


def subsampled(jacobian: Jacobian, positions: int, seed: int) -> Jacobian:
    r"""The Jacobian with only some random positions of a convolution, the cotangents multiplied by $\sqrt{S/P}$.

    Sums of squares over the $S$ positions then keep their expectation, and so do means of squares
    of the inputs. The patches are gathered from a view of the input; they never exist for all
    positions.

    Args:
        jacobian: of any parameter; returned as it is unless it is a convolution's weight with more
            positions.
        positions: $P$, number of positions to keep, the same for all samples.
        seed: of the draw, without replacement.
    """
    (term, *others) = jacobian.terms
    count = math.prod(size for letter, size in term.sizes().items() if letter in term.shared)
    kernel = any(letter in KERNEL for letter in term.par)
    if others or count <= positions or not kernel or term.lengths is not None:
        return jacobian
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(count, generator=generator)[:positions].to(term.g.device)
    return Jacobian(
        jacobian.parameter, [_gathered(term, chosen, math.sqrt(count / positions))], jacobian.signs
    )


def _gathered(term: Term, chosen: torch.Tensor, factor: float) -> Term:
    sizes = term.sizes()
    shared = [letter for letter in term.out if letter in term.shared]
    index = torch.unravel_index(chosen, [sizes[letter] for letter in shared])
    g, x = term.g, term.x
    assert x is not None
    g_axes = [2 + term.out.index(letter) for letter in shared]
    x_axes = [1 + term.inp.index(letter) for letter in shared]
    samples = (slice(None),)
    g = g.movedim(g_axes, list(range(2, 2 + len(shared))))[samples + samples + index]
    x = x.movedim(x_axes, list(range(1, 1 + len(shared))))[samples + index]
    out = "s" + "".join(letter for letter in term.out if letter not in shared)
    inp = "s" + "".join(letter for letter in term.inp if letter not in shared)
    return replace(term, out=out, inp=inp, g=g * factor, x=x)

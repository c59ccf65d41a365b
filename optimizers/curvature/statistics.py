"""Kronecker factors of a block from the Jacobians of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_curv.extensions import KFLR
from lightning_curv.extensions.kronecker import Product, kronecker_factor
from lightning_curv.kernels.symmetric import gram
from lightning_curv.optimizers.curvature.positions import subsampled
from lightning_curv.optimizers.linear_algebra.factors import part_size, parts_of, split_gram
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.sides import SideName, interleaved, kronecker_sides, side_of
from lightning_curv.terms.term import Term


def kronecker_factors(
    jacobians: Sequence[Jacobian],
    sharing: KFLR,
    positions: int | None,
    seed: int,
    split: int | None = None,
    largest: int | None = None,
) -> list[Tensor]:
    r"""Factors of a parameter's block, or of the joint block of weight and bias.

    Weight $W$ and bias $b$ are the matrix $[W \; b]$ that acts on $(a, 1)$; its block is
    $B \otimes A'$ with

    $$A' = \begin{pmatrix} A & \bar a \\ \bar a^\top & 1 \end{pmatrix}, \qquad
      \bar a = \mathrm{mean}(a).$$

    Args:
        jacobians: of the parameter, or of weight and bias.
        sharing: makes the factors of one parameter; expand or reduce.
        positions: of a convolution to use, in expectation exact; None: all. All are used for
            "reduce", which sums over them before squaring.
        seed: of the positions.
        split: rows of the diagonal blocks, about, that larger factors are split into.
        largest: rows of the largest factor of which more than the diagonal is computed; None: of
            all. Factors of groups are whole.

    Returns:
        [F_1, …, F_k], see `lightning_curv.extensions.KFLR` and `factors`. Behind them, if $A'$ is
        split, $\bar a$; if the factors are those of a weight with outputs in front, its groups and
        inputs per group, [2], see `weight_and_bias`.

    Source: J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, ICML 2015, section 2.1 (homogeneous coordinates).
    """
    weight, *bias = jacobians
    if positions is not None and sharing.weight_sharing == "expand":
        weight = subsampled(weight, positions, seed)
    sides = kronecker_sides(weight.terms)
    widths = [_width(weight.terms[0], side, has_bias=bool(bias)) for side in sides]
    if any(side_of(weight.terms[0], side).groups for side in sides):
        # Diagonals of all groups look like one matrix: whoever takes them off knows the groups.
        largest = None
    too_large = largest is not None and any(width > largest for width in widths)
    if sides and (split or too_large):
        factors = []
        for side, width in zip(sides, widths, strict=True):
            product = _product(width, split, largest)
            factors.append(kronecker_factor(weight.terms[0], side, sharing.weight_sharing, product))
    else:
        factors = sharing.evaluate(weight)
    if not bias:
        layout = interleaved(weight.terms)
        if not layout:
            return factors
        # A tensor, as all statistics are: they are averaged over processes together.
        return [*factors, torch.tensor(layout, dtype=factors[0].dtype, device=factors[0].device)]
    outputs, inputs = factors
    if inputs.dim() == 1:
        return [outputs, torch.cat([inputs, inputs.new_ones(1)])]
    mean = mean_input(weight)
    is_whole = inputs.shape[0] == inputs.shape[1]
    # A whole factor has the mean in its last row.
    return [outputs, with_ones(inputs, mean), *([] if is_whole else [mean])]


def _width(term: Term, side: SideName, has_bias: bool) -> int:
    """The rows of a factor, with the 1 that is appended to the inputs later."""
    return side_of(term, side).width + (side == "inputs" and has_bias)


def _product(width: int, split: int | None, largest: int | None) -> Product:
    """What makes a factor, or the part of it that is kept, which alone is ever formed."""
    if largest is not None and width > largest:
        return _row_squares
    if split:
        return partial(split_gram, size=part_size(width, split))
    return gram


def _row_squares(x: Tensor) -> Tensor:
    """The diagonal of x xᵀ, [d]."""
    return torch.linalg.vector_norm(x, dim=1).square()


def mean_input(jacobian: Jacobian) -> Tensor:
    """The mean of a weight's inputs over samples and positions, flat."""
    term = jacobian.terms[0]
    assert term.x is not None
    axes = [0, *side_of(term, "inputs").positions]
    if term.lengths is None:
        return term.x.mean(axes).flatten()
    # Positions behind the length of a sample are zeros, which do not count.
    count = term.lengths.sum().clamp(min=1).to(term.x.device)
    return (term.x.sum(axes) / count).flatten()


def with_ones(second_moment: Tensor, mean: Tensor) -> Tensor:
    """The second moment of the inputs with a 1 appended.

    Args:
        second_moment: of the inputs, [d, d], or [d, s] if it is split.
        mean: of the inputs, [d].

    Returns:
        [d + 1, d + 1], or [d + 1, s] if it is split: the 1 is the last entry of the last block.
    """
    size, columns = second_moment.shape
    is_whole = columns == size
    result = second_moment.new_zeros(size + 1, columns + is_whole)
    result[:size, :columns] = second_moment
    last_block = parts_of(result, False)[-1]
    inputs_of_block = len(last_block) - 1
    last_block[-1, :-1] = last_block[:-1, -1] = mean[size - inputs_of_block :]
    last_block[-1, -1] = 1.0
    return result

"""Kronecker factors of a block from the Jacobians of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_curv.extensions import KFLR
from lightning_curv.extensions.kronecker import kronecker_factor
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
    if split and sides:
        factors = [
            _split_factor(weight.terms[0], side, sharing, split, has_bias=bool(bias))
            for side in sides
        ]
    else:
        factors = sharing.evaluate(weight)
    if not bias:
        layout = interleaved(weight.terms)
        if not layout:
            return factors
        # A tensor, as all statistics are: they are averaged over processes together.
        return [*factors, torch.tensor(layout, dtype=factors[0].dtype, device=factors[0].device)]
    outputs, inputs = factors
    mean = mean_input(weight)
    is_whole = inputs.shape[0] == inputs.shape[1]
    # A whole factor has the mean in its last row.
    return [outputs, with_ones(inputs, mean), *([] if is_whole else [mean])]


def _split_factor(
    term: Term,
    side: SideName,
    sharing: KFLR,
    split: int,
    has_bias: bool,
) -> Tensor:
    """The diagonal blocks of one factor, which is never formed as a whole.

    Args:
        term: of a weight.
        side: whose factor it is.
        sharing: expand or reduce.
        split: rows of the diagonal blocks, about.
        has_bias: whether a 1 is appended to the inputs later; their number says how to split.
    """
    size = side_of(term, side).width + (side == "inputs" and has_bias)
    product = partial(split_gram, size=part_size(size, split))
    return kronecker_factor(term, side, sharing.weight_sharing, product)


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

r"""Columns of a diagonal residual that meet in no entry of a parameter, taken together.

A nonlinearity of one entry each that reads the output $z$ of an op with parameters has a
residual $R = \operatorname{diag}(r)$ there, which stands for one signed column per entry of
$z$. Where every entry of the parameter contributes to one entry of $z$ only, as the
row of a weight does, these columns are nonzero in different entries of the parameter. Two columns
have then the same squares, $\sqrt{r_+}$ with the sign 1 and $\sqrt{r_-}$ with the sign
-1, and cost no pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.graph.dependence import uses_below
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import Use
from lightning_curv.second_derivatives.local_curvature import DiagonalResidual, Residual
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.owners import ChosenOwners, Owners
from lightning_curv.terms.term import Term


def jacobians_of(passes: Passes, residual: Residual) -> Iterator[dict[Tensor, Jacobian]]:
    """The Jacobians of the columns of a residual, as few as are needed for their squares."""
    found = _use_at(passes, residual)
    if found is None or not isinstance(residual, DiagonalResidual):
        yield from passes.jacobians(residual.columns())
        return
    node, use, owners = found
    merged = _merged(passes, residual, node, use)
    if merged is not None:
        yield merged
        passes = _without(passes, node)
    if merged is None or uses_below(passes.tape, residual.edges):
        # They are the owners of the op's output: no pass has to find them.
        residual = replace(residual, owners=lambda: owners)
        yield from passes.jacobians(residual.columns())


def _use_at(passes: Passes, residual: Residual) -> tuple[Node, Use, Owners] | None:
    """The op with parameters whose output the residual's nonlinearity reads, and its owners."""
    edge = residual.edges[0]
    use = passes.tape.uses.get(edge.node)
    if use is None or use.output_nr != edge.output_nr or use.pull is not None:
        return None
    # Where rows have no owners that hold for every op, a pass of its own has to find them.
    owners = passes.samples.uses.get(edge.node)
    if owners is None or isinstance(owners, ChosenOwners):
        return None
    return edge.node, use, owners


def _merged(
    passes: Passes,
    residual: DiagonalResidual,
    node: Node,
    use: Use,
) -> dict[Tensor, Jacobian] | None:
    """The Jacobians of the two columns; `None`: columns meet in some entry of a parameter."""
    times = Counter(p for found in passes.tape.parameters.values() for p in found)
    # A column that reaches a parameter twice is squared after the sum of both.
    if any(times[parameter] > 1 for parameter in passes.tape.parameters[node]):
        return None
    # The square of a column's Jacobian is to be r times that of a unit: its scale is the root.
    roots = residual.values.abs().sqrt()
    negative = residual.values < 0  # what is no number stays in the positive column
    g = torch.stack([roots.masked_fill(negative, 0), roots.masked_fill(~negative, 0)])
    terms = passes.terms(node, use, g)
    if not all(_keeps_entries_apart(term, g) for _, term in terms):
        return None
    # The sign of a column is that of its square in the sum, for every sample.
    ones = g.new_ones(passes.samples.count)
    signs = torch.stack([ones, -ones])
    return {parameter: Jacobian(parameter, [term], signs) for parameter, term in terms}


def _keeps_entries_apart(term: Term, g: Tensor) -> bool:
    """Whether every entry of the cotangents has entries of the parameter of its own.

    The rule must have taken the cotangents as they are, in another order of axes at most.
    """
    same = term.g.untyped_storage().data_ptr() == g.untyped_storage().data_ptr()
    return same and term.g.numel() == g.numel() and not term.shared


def _without(passes: Passes, node: Node) -> Passes:
    """Passes to all other ops with parameters."""
    uses = {other: use for other, use in passes.tape.uses.items() if other is not node}
    return replace(passes, tape=replace(passes.tape, uses=uses))

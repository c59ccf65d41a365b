"""Parameters that are used once: products need passes between their op and the loss alone.

The op itself is applied to a vector, and transposed, by its rule where that is a linear layer, a
norm or alike: without the gradient by the parameter that autograd would form to differentiate it a
second time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.dependence import uses_below
from lightning_curv.graph.joins import Join
from lightning_curv.graph.tape import leaves
from lightning_curv.passes.passes import Passes, apply_rule
from lightning_curv.recording.records import Use, shape_at
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.owners import Owners
from lightning_curv.terms.parameter_axes import applied
from lightning_curv.terms.term import Term


@dataclass(frozen=True)
class SingleUse:
    """The only use of a parameter, by its own value.

    Attributes:
        edge: The op's output in the graph.
        use: The recorded op.
        name: The argument that holds the parameter.
        owners: Which sample owns each row of the output.
        lowest: Whether no other op with parameters is below.
    """

    edge: GradientEdge
    use: Use
    name: str
    owners: Owners
    lowest: bool

    @cached_property
    def linear(self) -> bool:
        """Whether the op can be applied to a vector by its rule."""
        return self._order is not None

    @cached_property
    def _order(self) -> bool | None:
        """Whether the cotangents of the op's term are those at its output, in order.

        `None` if its rule cannot be applied to vectors.
        """
        rule = self.use.rule
        value = self.use.operands[self.name].tensor
        if not (rule.affine and rule.parameters):
            return None
        g = value.detach().new_zeros(1, *shape_at(self.edge))
        try:
            term = self._term(g)
        except UnsupportedError:
            return None
        reindexed = term.g.untyped_storage().data_ptr() == g.untyped_storage().data_ptr()
        dense = (
            term.adjoint is None
            and not term.classes
            and (term.x is None or term.x.dtype == g.dtype)
        )
        if not (reindexed and dense and term.g.dtype == g.dtype and term.g.numel() == g.numel()):
            return None
        return term.g.is_contiguous()

    @property
    def needs_value(self) -> bool:
        """Whether a pass may need the parameter's value."""
        return not (self.linear and self.lowest)

    def forward(self, vector: Tensor) -> Tensor:
        """The derivative of the op's output in the direction of a vector like the parameter."""
        shape = shape_at(self.edge)
        if self._order:
            out = vector.new_empty(()).expand(1, *shape)
        else:
            out = vector.new_empty(1, *shape)
        term = self._term(out)
        image = applied(term, vector)
        if self._order:
            return image.expand(term.g.shape[1:]).reshape(shape)
        term.g[0].copy_(image)  # a view of `out`
        return out[0]

    def transposed(self, g: Tensor) -> Tensor:
        """The gradient by the parameter for a cotangent at the op's output."""
        value = self.use.operands[self.name].tensor
        return Jacobian(value, [self._term(g[None])]).total()[0]

    @torch.no_grad()
    def _term(self, g: Tensor) -> Term:
        self.use.check()
        return apply_rule(self.use, self.owners, g)[self.name]


def single_uses(passes: Passes) -> dict[Tensor, SingleUse]:
    """The parameters that are used once, by themselves and by ops of one output; and these uses."""
    counts: Counter[Tensor] = Counter(parameter for parameter, _ in passes.tape.stray)
    uses: dict[Tensor, tuple[Node, Use, str]] = {}
    for node, use in passes.tape.uses.items():
        for name, operand in use.operands.items():
            counts.update(leaves(operand.edge) if operand.derived else [operand.tensor])
            if not operand.derived and use.rule.outputs is None and not isinstance(node, Join):
                uses[operand.tensor] = node, use, name
    lowest = {
        node: not uses_below(passes.tape, use.inputs.values()) for node, use, _ in uses.values()
    }
    return {
        p: SingleUse(
            GradientEdge(node, use.output_nr),
            use,
            name,
            passes.samples.uses[node],
            lowest[node],
        )
        for p, (node, use, name) in uses.items()
        if counts[p] == 1
    }

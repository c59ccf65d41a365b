"""Joins: where what depends on no sample meets the samples.

A relative position table, a prompt, a token that is written into a tensor in place, a parameter of
an op that nobody
recorded: their cotangents are sums over the samples. One node above, the cotangents are still
    apart, row by row. There
they are given to the node sample by sample, and what comes out is pulled back to the parameters.
This needs no rule for the node, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.differentiation.internal_pass import internal_pass, nothing_below
from lightning_curv.recording.records import Operand, Use, shape_at
from lightning_curv.rules.registry import Rule
from lightning_curv.terms.owners import BatchAxis, ChosenOwners, Owners

CHUNK_BYTES = 2**25  # of cotangents that are pulled through a node at once


class Join:
    """One output of a node, and the input where what depends on no sample enters.

    Attributes:
        node: The node.
        output_nr: The output.
        edge: The input, in the graph.
        recorded: The recorded op whose last node it is, where the op is made of several nodes.
    """

    def __init__(
        self,
        node: Node,
        output_nr: int,
        edge: GradientEdge,
        recorded: Use | None = None,
    ) -> None:
        self.node = node
        self.output_nr = output_nr
        self.edge = edge
        self.recorded = recorded

    @property
    def data(self) -> set[Node]:
        """The nodes where the other inputs are."""
        if self.recorded:  # whose own nodes are between its output and its inputs
            others = {edge.node for edge in self.recorded.inputs.values()}
        else:
            others = {after for after, _ in self.node.next_functions if after is not None}
        return others - {self.edge.node}

    def use(self, dtype: torch.dtype, device: torch.device) -> Use:
        """The join as a use of the parameters behind its input."""
        shape = shape_at(self.edge)
        # Only shape and type of the argument matter: one number in memory.
        value = torch.zeros((), dtype=_dtype_at(self.edge, dtype), device=device).expand(shape)
        # A use needs a rule, but `pull` takes its place.
        rule = Rule(lambda *_, **__: {}, needs_values=lambda _: (), affine=False)
        output = GradientEdge(self.node, self.output_nr)
        use = Use(
            function=cast("Any", _Named(self.node.name())),
            rule=rule,
            arguments={"value": value},
            operands={"value": Operand(value, self.edge)},
            inputs={},
            shape=shape_at(output),
            dtype=_dtype_at(output, dtype),
            output_nr=self.output_nr,
            pull=self.pull,
        )
        return use

    def pull(self, g: Tensor, owners: Owners) -> Tensor:
        """Pull cotangents `[V, *]` of the output to the input for every sample, `[V, N, *]`."""
        shape = shape_at(self.edge)
        columns = []
        for column in g:
            # One pass where the node broadcasts, as for a bias or a position table; else one per
            # sample.
            whole = self._broadcast(column, owners, shape)
            columns.append(
                self._sample_by_sample(column, owners, shape) if whole is None else whole
            )
        return torch.stack(columns)

    def _broadcast(self, g: Tensor, owners: Owners, shape: torch.Size) -> Tensor | None:
        """Make one pass, where the node broadcasts its input and autograd adds up what it repeats.

        `None`: it is no such node.
        """
        if isinstance(owners, ChosenOwners):
            whole = self._broadcast(g, owners.whole, shape)
            if whole is None:
                return None
            return whole[owners.chosen.to(whole.device)]
        if (
            not isinstance(owners, BatchAxis)
            or owners.inner
            or not g.ndim
            or g.shape[owners.axis] != owners.count
        ):
            return None
        if g.shape == shape or self.recorded:
            return None
        # With the output's cotangents as they are: does the node sum over the samples?
        entries = self._call(g)
        if entries is None or entries.shape != g.shape or len(shape) > g.ndim:
            return None
        # The sum over the axes that were broadcast is left to us, all but that of the samples.
        aligned = [1] * (g.ndim - len(shape)) + list(shape)
        if aligned[owners.axis] != 1:
            return None
        summed = [
            axis
            for axis in range(g.ndim)
            if axis != owners.axis and aligned[axis] == 1 != g.shape[axis]
        ]
        total = entries.sum(summed, keepdim=True) if summed else entries
        return total.movedim(owners.axis, 0).reshape(owners.count, *shape)

    def _sample_by_sample(self, g: Tensor, owners: Owners, shape: torch.Size) -> Tensor:
        owner = owners.owner(g.shape).to(g.device)
        # Of every entry, which broadcasts against the cotangents.
        owner = owner.reshape([1] * (g.ndim - owner.ndim) + list(owner.shape))
        # A copy of all cotangents per sample: some samples at a time.
        size = max(1, CHUNK_BYTES // max(1, g.numel() * g.element_size()))
        columns = g.new_zeros(owners.count, *shape)
        for samples in owner[owner >= 0].unique().split(size):  # others have no row here
            masks = owner == samples.reshape(-1, *[1] * owner.ndim)
            columns[samples] = self._calls(g * masks, shape).to(g.dtype)
        return columns

    def _calls(self, gs: Tensor, shape: torch.Size) -> Tensor:
        """The node applied to every entry of the leading axis."""
        if self.recorded:
            return torch.stack([self._reduced(g, shape) for g in gs])
        try:
            results = torch.func.vmap(partial(self._reduced, shape=shape))(gs)
        except (RuntimeError, NotImplementedError):  # an op without a batching rule
            results = torch.stack([self._reduced(g, shape) for g in gs])
        return results

    def _reduced(self, g: Tensor, shape: torch.Size) -> Tensor:
        gradient = strided(self._call(g))
        if gradient is None:
            return g.new_zeros(shape)
        if gradient.shape == shape:
            return gradient
        return gradient.sum_to_size(shape)

    def _call(self, g: Tensor) -> Tensor | None:
        """The node's own derivative; several inputs that lead to one place add up there."""
        if self.recorded:
            with internal_pass(), nothing_below(self.data):
                (gradient,) = torch.autograd.grad(
                    [GradientEdge(self.node, self.output_nr)],
                    [self.edge],
                    [g],
                    retain_graph=True,
                    allow_unused=True,
                )
            return gradient
        node: Any = self.node
        outputs = len(node._input_metadata)
        g = g.contiguous()  # some ops look at the strides
        gradients = [g if i == self.output_nr else None for i in range(outputs)]
        if not callable(node):  # of a custom function, which expects tensors
            gradients = [
                self._zeros(i, g) if part is None else part for i, part in enumerate(gradients)
            ]
        if callable(node):
            result = node(*gradients)
        else:
            result = node.apply(*gradients)
        # What a node returns, in the order of its inputs.
        parts = result if isinstance(result, tuple) else (result,)
        here = [
            part
            for part, after in zip(parts, node.next_functions, strict=False)
            if after == self.edge[:2]
        ]
        here = [part for part in here if part is not None]
        return sum(here[1:], start=here[0]) if here else None

    def _zeros(self, number: int, g: Tensor) -> Tensor:
        return g.new_zeros(shape_at(GradientEdge(self.node, number)))


@dataclass(frozen=True)
class _Named:
    """Stands for a function that is known by its node only."""

    __name__: str


def node_of(key: Node | Join) -> Node:
    """The node where the cotangents of a use arrive."""
    return key.node if isinstance(key, Join) else key


def strided(g: Tensor | None) -> Tensor | None:
    """A cotangent whose memory has strides, as that of a sparse tensor has not."""
    if g is None or g.layout in (torch.strided, torch.jagged):
        return g
    return g.to_dense()


def _dtype_at(edge: GradientEdge, default: torch.dtype) -> torch.dtype:
    dtype = edge.node._input_metadata[edge.output_nr].dtype
    return dtype if isinstance(dtype, torch.dtype) else default

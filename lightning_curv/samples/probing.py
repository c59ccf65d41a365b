"""Probing a graph: weights of the samples at the top of the loss tell who owns each row below.

Backpropagation is linear. Two passes whose cotangents differ by one weight per sample give, at
every row of every tensor, cotangents that differ by the weight of the row's owner; where they
differ by anything else, samples mix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.heads import Head
from lightning_curv.recording.records import shape_at
from lightning_curv.samples.weights import Code, Tolerance, consistent, generic, spread
from lightning_curv.terms.owners import (
    BatchAxis,
    Owners,
    RowOwners,
    batch_axes,
    largest_entry,
)

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes

Cotangents = Sequence[Tensor | None]


@dataclass(frozen=True)
class Place:
    """A tensor whose owners are asked for.

    Attributes:
        edge: Where it is in the graph.
        shape: Its shape.
        axes: What comes into question first.
        rows: The axes that may make up rows in any order, the fewest first.
    """

    edge: GradientEdge
    shape: torch.Size
    axes: Sequence[BatchAxis]
    rows: Sequence[tuple[int, ...]]

    @classmethod
    def anywhere(cls, edge: GradientEdge, count: int) -> Place:
        """Any axis, or any axes together, may carry the samples."""
        shape = shape_at(edge)
        axes = range(len(shape))
        single = [(axis,) for axis in axes]
        leading = [tuple(range(k)) for k in range(2, len(shape) + 1)]
        choices = batch_axes(shape, axes, count)
        if not shape:  # a number is a row of its own, of whichever sample
            choices = [BatchAxis(count)]
        return cls(edge, shape, choices, single + leading)


@dataclass(frozen=True)
class Finding:
    """What the weights say of a place.

    Attributes:
        owners: Who owns its rows; `None`: samples mix, or the losses do not depend on it.
        reached: Whether the losses depend on it, in these numbers.
        options: All axes that agree with the weights, where there are several.
        silent: Whether nothing arrives there, so that the weights say nothing.
    """

    owners: Owners | None
    reached: bool = True
    options: Sequence[BatchAxis] = ()
    silent: bool = False

    @property
    def mixed(self) -> bool:
        """Whether several samples share a row."""
        return self.owners is None and self.reached


class Probe:
    """Weighted passes from the top of a loss.

    Args:
        passes: The graph.
        heads: Where they start, and who owns the rows there.
        count: N.
        strict: Whether rows must be multiplied by the weights to the last digits.
    """

    def __init__(
        self,
        passes: Passes,
        heads: Sequence[tuple[Head, Owners]],
        count: int,
        strict: bool = False,
    ) -> None:
        self.passes = passes
        self.heads = heads
        self.count = count
        self.strict = strict
        self.conclusive = True
        self.told_of_all = True
        self._ones = [generic(head.like) for head, _ in heads]
        # What arrived at which edges, by the number of the pass.
        self._arrived: dict[int, dict[tuple[Node, int], Tensor | None]] = {}

    def findings(self, places: Sequence[Place]) -> list[Finding]:
        """What the weights say of every place."""
        if self.count <= 1:
            return [Finding(_trivial(place, self.count)) for place in places]
        edges = [place.edge for place in places]
        # One weight per sample: neighbours must differ, for it is neighbours that are mixed up.
        values = spread(self.count, self.passes.tape.eps)
        first = self._pass(0, edges, None)
        second = self._pass(1, edges, values)
        exact = Tolerance.exact(self.passes.tape.eps)
        findings = []
        for place, plain, weighted in zip(places, first, second, strict=True):
            findings.append(self._cheap(place, plain, weighted, values, exact))
        if any(finding.mixed for finding in findings):
            self._look_closer(places, first, second, values, findings)
        return self._settled(places, findings)

    def _look_closer(
        self,
        places: Sequence[Place],
        first: Cotangents,
        second: Cotangents,
        values: Tensor,
        findings: list[Finding],
    ) -> None:
        """Look for rows in any order, and for rounding errors, where no axis agrees exactly."""
        edges = [place.edge for place in places]
        eps = self.passes.tape.eps
        allowed = [Tolerance.exact(eps)]
        # What cancels between samples leaves rounding errors, which are not multiplied by weights.
        if not self.strict:
            rounded = Tolerance.rounded(eps, largest_entry(first))
            allowed = [replace(allowed[0], noise=rounded.noise), rounded]
        columns: list[Cotangents] | None = None
        for attempt, tolerance in enumerate(allowed):
            for i, place in enumerate(places):
                if attempt and findings[i].mixed:
                    findings[i] = self._cheap(place, first[i], second[i], values, tolerance)
            mixed = [i for i, finding in enumerate(findings) if finding.mixed]
            unknown = [i for i in mixed if places[i].rows]
            # A pass per digit, for all places together, and only where some place needs it.
            if unknown and columns is None:
                spellings = self._code.values(self.count)
                columns = [self._pass(k, edges, digit) for k, digit in enumerate(spellings, 2)]
            for i in unknown:
                spelled = [column[i] for column in columns or ()]
                findings[i] = self._rows(places[i], first[i], spelled, tolerance)

    def _settled(self, places: Sequence[Place], findings: list[Finding]) -> list[Finding]:
        """Where rows of zeros leave a choice, the owners of as many rows elsewhere."""
        sure: dict[int, set[BatchAxis]] = {}
        for place, finding in zip(places, findings, strict=True):
            owners = finding.owners
            if not isinstance(owners, BatchAxis) or finding.options:
                continue
            if place.shape and finding.reached:
                rows = place.shape[owners.axis]
                sure.setdefault(rows, set()).add(owners)
        settled = []
        for place, finding in zip(places, findings, strict=True):
            elsewhere = []
            for option in finding.options:
                rows = place.shape[option.axis]
                if option in sure.get(rows, ()):
                    elsewhere.append(option)
            settled.append(Finding(elsewhere[0]) if len(elsewhere) == 1 else finding)
        return settled

    @property
    def _code(self) -> Code:
        return Code.of(self.count, self.passes.tape.eps)

    def _pass(
        self, number: int, edges: Sequence[GradientEdge], values: Tensor | None
    ) -> Cotangents:
        """The cotangents at some edges for seeds that are weighted by the samples.

        Args:
            number: Of the weights: what was asked with the same ones before takes no pass.
            edges: Where the cotangents are wanted.
            values: The weights of the samples; `None`: 1.
        """
        arrived = self._arrived.setdefault(number, {})
        missing = [edge for edge in edges if edge[:2] not in arrived]
        if missing:
            seeds = self._ones
            if values is not None:
                weighted = []
                for one, (_, owners) in zip(seeds, self.heads, strict=True):
                    weighted.append(one * owners.weights(one, values))
                seeds = weighted
            tops = [head.edge for head, _ in self.heads]
            found = self.passes.backward(tops, missing, seeds)
            arrived.update(zip((edge[:2] for edge in missing), found, strict=True))
        return [arrived[edge[:2]] for edge in edges]

    def _cheap(
        self,
        place: Place,
        first: Tensor | None,
        second: Tensor | None,
        values: Tensor,
        tolerance: Tolerance,
    ) -> Finding:
        """Which axes agree with two passes."""
        if first is None or second is None:
            return Finding(_trivial(place, self.count), reached=False, silent=True)
        # A node may give a cotangent of an expanded shape.
        first = first.reshape(place.shape)
        second = second.reshape(place.shape)
        # Zero without weights, and not with them: sums of samples that cancelled.
        zero = not bool(first.any())
        if zero and not bool(second.any()):
            self.conclusive = False
            options = place.axes if len(place.axes) > 1 else ()
            return Finding(_trivial(place, self.count), options=options, silent=True)
        # A finite sum is one read; only an infinite one has to be looked into.
        finite = bool(first.sum().isfinite()) or bool(first.isfinite().all())
        if not finite:
            self.conclusive = False
        # Weights are powers of two: where kernels add up in the same order, as they mostly do, they
        # are there to the last digit, and two reads of the memory tell.
        agreeing = []
        if finite and not zero:
            for axis in place.axes:
                if torch.equal(first * axis.weights(first, values), second):
                    agreeing.append(axis)
        if not agreeing:
            agreeing = consistent(first, second, tolerance, place.axes, values)
        if not agreeing:
            return Finding(None)
        self.told_of_all = self.told_of_all and _reaches_all(agreeing[0], first)
        options = agreeing if len(agreeing) > 1 else ()
        return Finding(agreeing[0], options=options)

    def _rows(
        self,
        place: Place,
        first: Tensor | None,
        spelled: Cotangents,
        tolerance: Tolerance,
    ) -> Finding:
        """Owners of rows in any order, by weights that spell the number of the sample."""
        assert first is not None
        plain = first.reshape(place.shape)
        columns = []
        for g in spelled:
            columns.append(torch.zeros_like(plain) if g is None else g.reshape(place.shape))
        for axes in place.rows:
            owners = self._code.read(plain, columns, axes, self.count, tolerance)
            if owners is not None:
                return Finding(owners)
        return Finding(None)


def _reaches_all(owners: BatchAxis, cotangent: Tensor) -> bool:
    """Whether something arrives at every sample; what is zero, a saturated unit, tells nothing."""
    rest = [axis for axis in range(cotangent.ndim) if axis != owners.axis]
    arriving = cotangent.any(rest) if rest else cotangent.bool()
    if len(arriving) != owners.count:
        split = (-1, owners.count) if owners.inner else (owners.count, -1)
        arriving = arriving.reshape(split).any(0 if owners.inner else 1)
    return bool(arriving.all())


def owners_at(passes: Passes, edges: Sequence[GradientEdge]) -> dict[GradientEdge, Owners | None]:
    """Who owns the rows of the tensors at `edges`; `None`: no loss reaches them.

    Raises:
        UnsupportedError: Samples mix.
    """
    if not edges:
        return {}
    samples = passes.samples
    heads = []
    for part in passes.parts:
        for edge, like, owners in zip(part.edges, part.likes, part.owners, strict=True):
            heads.append((Head(edge, like), owners))
    places = [Place.anywhere(edge, samples.count) for edge in edges]
    findings = Probe(passes, heads, samples.count).findings(places)
    owners_of_edges: dict[GradientEdge, Owners | None] = {}
    for place, finding in zip(places, findings, strict=True):
        if finding.mixed:
            raise UnsupportedError(
                f"Expected rows of {samples.count} samples in a tensor of shape "
                f"{tuple(place.shape)}, found rows that belong to several of them: an op mixes "
                "samples."
            )
        owners_of_edges[place.edge] = finding.owners if finding.reached else None
    return owners_of_edges


def _trivial(place: Place, count: int) -> Owners:
    """Owners of a place of which the weights say nothing, or where there is one sample."""
    if place.axes:
        return place.axes[0]
    if count <= 1:
        return BatchAxis(count, place.rows[0][0] if place.rows else 0)
    if not place.rows or not place.rows[0]:
        return BatchAxis(count)
    axes = place.rows[0]
    rows = math.prod(place.shape[axis] for axis in axes)
    nobody = torch.full((rows,), -1)
    return RowOwners(count, nobody, axes)

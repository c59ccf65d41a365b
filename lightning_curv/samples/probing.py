"""Probing a graph: weights of the samples at the top of the loss tell who owns each row below.

Backpropagation is linear. Two passes whose cotangents differ by one weight per sample give, at
every row of every tensor, cotangents that differ by the weight of the row's owner; where they
differ by anything else, samples mix.

The weights are powers of two, factors that do not round: what a sample's rows get is multiplied by
them to the last digit, in every precision, rounding errors included. Rows that are tiny beside
others are told apart like all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.heads import Head
from lightning_curv.recording.records import shape_at
from lightning_curv.terms.owners import (
    BatchAxis,
    Owners,
    RowOwners,
    batch_axes,
    golden,
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
        owners: Who owns its rows; ``None``: samples mix, or the losses do not depend on it.
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
        self._ones = [_generic(head.like) for head, _ in heads]

    def findings(self, places: Sequence[Place]) -> list[Finding]:
        """What the weights say of every place."""
        if self.count <= 1:
            return [Finding(_trivial(place, self.count)) for place in places]
        edges = [place.edge for place in places]
        # One weight per sample: neighbours must differ, for it is neighbours that are mixed up.
        values = spread(self.count, self.passes.tape.eps)
        first = self._pass(edges, None)
        second = self._pass(edges, values)
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
                columns = [self._pass(edges, weights) for weights in self._code.values(self.count)]
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

    def _pass(self, edges: Sequence[GradientEdge], values: Tensor | None) -> Cotangents:
        """The cotangents at some edges for seeds that are weighted by the samples."""
        if not edges:
            return ()
        seeds = self._ones
        if values is not None:
            weighted = []
            for one, (_, owners) in zip(seeds, self.heads, strict=True):
                weighted.append(one * owners.weights(one, values))
            seeds = weighted
        tops = [head.edge for head, _ in self.heads]
        return self.passes.backward(tops, edges, seeds)

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


FINE = 1e-4  # between the roundings of float32 and of float16


def base_of(eps: float) -> int:
    """How many powers of two are weights; float16, whose numbers end at 65504, holds fewer."""
    return 4 if FINE < eps < 2e-3 else 16


def spread(count: int, eps: float) -> Tensor:
    """Powers of two, ``[N]``: neighbours have different ones, and equal ones are far apart."""
    exponents = ((golden(count) - 1) * base_of(eps)).floor()
    return 2.0**exponents


@dataclass(frozen=True)
class Tolerance:
    """How much a weighted cotangent may differ from the weight times the unweighted one.

    Attributes:
        relative: To the largest entry of a row.
        absolute: Besides.
        noise: Cotangents up to here may be rounding errors of larger ones.
    """

    relative: float
    absolute: float
    noise: float = 0.0

    @classmethod
    def exact(cls, eps: float) -> Tolerance:
        """Bound the effect of another order of additions, and the last digits of tiny numbers."""
        # The smallest numbers of float16, and of float32, which bfloat16 has too.
        tiny = 2.0**-24 if FINE < eps < 2e-3 else 2.0**-149
        relative = 16 * 2.0**-23 if eps < FINE else 2 * eps
        return cls(relative, absolute=64 * tiny)

    @classmethod
    def rounded(cls, eps: float, scale: float) -> Tolerance:
        """Whatever rounding may do to numbers that were as large as ``scale``."""
        noise = 8 * eps * scale
        # Coarse types have few digits to spare: a thousand roundings would allow anything.
        roundings = 1e3 if eps < 1e-6 else 32
        return cls(eps * roundings, absolute=noise, noise=noise)


@dataclass(frozen=True)
class Code:
    """Numbers of samples, spelled by one weight per pass.

    The digits are the exponents of powers of two.

    Attributes:
        base: The number of digits.
        digits: The number of passes; the last one repeats the first digit in other weights, to be
            sure.
    """

    base: int
    digits: int

    @classmethod
    def of(cls, count: int, eps: float) -> Code:
        """The code for N samples in types of number that round by ``eps``."""
        base = max(2, min(count, base_of(eps)))
        # Less a little: the logarithm of a power of the base may be rounded up.
        exponent = math.log(max(2, count), base) - 1e-9
        return cls(base, max(1, math.ceil(exponent)))

    def values(self, count: int) -> list[Tensor]:
        """The weights of the samples in every pass."""
        number = torch.arange(count)
        spelled = [number // self.base**k % self.base for k in range(self.digits)]
        check = (self.base - 1 - spelled[0] + sum(spelled[1:])) % self.base
        digits = [*spelled, check]
        return [2.0 ** digit.double() for digit in digits]

    def read(
        self,
        plain: Tensor,
        columns: Sequence[Tensor],
        axes: tuple[int, ...],
        count: int,
        tolerance: Tolerance,
    ) -> RowOwners | None:
        """The owners of the rows; ``None``: a row has several.

        Rows of rounding errors have none or any: what arrives there is nothing, whatever is
        backpropagated.
        """
        plain_rows = _rows_of(plain, axes)
        if not bool(plain_rows.isfinite().all()):
            return None
        # MPS has no float64.
        wide = plain_rows.float() if plain_rows.device.type == "mps" else plain_rows.double()
        if wide.shape[1]:
            largest = wide.abs().amax(1)
        else:
            largest = wide.new_zeros(len(wide))
        smallest = torch.finfo(wide.dtype).tiny
        scale = largest.clamp(min=smallest)
        normal = wide / scale[:, None]  # the largest entry is 1
        norms = normal.square().sum(1)
        owned = largest > tolerance.absolute
        digits = []
        for column in columns:
            weighted = _rows_of(column, axes).to(wide.dtype) / scale[:, None]
            # The weight of a row by least squares, rounded to a power of two.
            ratio = (normal * weighted).sum(1) / norms.clamp(min=smallest)
            exponent = ratio.clamp(min=1).log2().round()
            digit = exponent.nan_to_num(0.0, 0.0, 0.0).clamp(0, self.base - 1)
            weights = 2.0**digit
            if wide.shape[1]:
                error = (weighted / weights[:, None] - normal).abs().amax(1)
            else:
                error = norms
            allowed = tolerance.relative + tolerance.absolute / scale
            # Negated, so that NaN is an error.
            wrong = ~(error <= allowed) & owned
            if bool(wrong.any()):
                return None
            digits.append(digit.long())
        number = sum(digit * self.base**k for k, digit in enumerate(digits[:-1]))
        assert isinstance(number, Tensor)
        check = (self.base - 1 - digits[0] + sum(digits[1:-1])) % self.base
        # Samples that share a row mix their weights: what that spells is hardly ever a sample.
        misspelled = (number >= count) | (check != digits[-1])
        if bool((misspelled & owned).any()):
            return None
        # Where all rows are rounding errors, which of them are zero is chance, and other passes
        # will differ.
        unowned = (largest == 0) & (largest > tolerance.noise).any()
        index = number.clamp(max=count - 1).masked_fill(unowned, -1)
        return RowOwners(count, index, axes)


def _rows_of(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The rows of a tensor whose rows are made up by some axes, ``[R, E]``."""
    no_index = torch.zeros(0, dtype=torch.long)
    rows = RowOwners(0, no_index, axes).rows(tensor)
    if tensor.ndim > len(axes):
        return rows.flatten(1)
    return rows[:, None]


def consistent(
    first: Tensor,
    second: Tensor,
    tolerance: Tolerance,
    choices: Iterable[BatchAxis],
    values: Tensor,
) -> list[BatchAxis]:
    """The axes that two cotangents agree with.

    The second started as the first times `Owners.weights`.

    Backpropagation is linear: as long as samples do not mix, every entry keeps the weight of its
    sample. Entries that are not finite tell nothing.

    Args:
        first: Cotangent of any shape.
        second: The other one.
        tolerance: Of their difference.
        choices: What comes into question.
        values: The weights of the samples.
    """
    # What is not finite cannot be compared; it is counted as agreeing.
    unknown = ~(first.isfinite() & second.isfinite())
    first = first.masked_fill(unknown, 0)
    magnitudes = first.abs()

    def deviation(axis: BatchAxis) -> Tensor:
        unweighted = second / axis.weights(first, values)
        return unweighted.masked_fill_(unknown, 0).sub_(first)

    def allowed(axis: BatchAxis) -> Tensor:
        """Of every row: one of large numbers must not hide what happens in the others."""
        rest = [other for other in range(first.ndim) if other != axis.axis]
        if rest and first.numel():
            largest = magnitudes.amax(rest, keepdim=True)
        else:
            largest = magnitudes
        return tolerance.relative * largest + tolerance.absolute

    norms: dict[BatchAxis, float] = {}
    for choice in choices:
        difference = deviation(choice)
        within = difference.abs() <= allowed(choice)
        if bool(within.all()):
            norms[choice] = float(difference.norm())
    # Where the rounding is coarse, more than one may agree, but the right one by far the best.
    rounding = 4 * torch.finfo(first.dtype).eps * float(first.norm())
    most = 8 * min(norms.values(), default=0.0) + rounding
    return [choice for choice, norm in norms.items() if norm <= most]


def owners_at(passes: Passes, edges: Sequence[GradientEdge]) -> dict[GradientEdge, Owners | None]:
    """Who owns the rows of the tensors at ``edges``; ``None``: no loss reaches them.

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


def forward_owners(
    passes: Passes,
    heads: Sequence[Head],
    sources: Sequence[tuple[Head, Owners]],
    count: int,
    by_entry: bool = False,
) -> list[RowOwners] | None:
    """Owners of the rows of heads, from those of tensors that the network computes from its inputs.

    The derivative of the heads in a direction that is weighted by the samples is found by
    differentiating a backward pass by its seeds.

    Args:
        passes: The graph.
        heads: Whose rows are asked for.
        sources: Tensors with known owners.
        count: N.
        by_entry: Whether every entry is a row of its own, and some may depend on no sample.

    Returns:
        The owners; ``None``: a row depends on several samples, or the graph cannot be
        differentiated twice.
    """
    with torch.enable_grad(), internal_pass():
        # The backward pass is linear in its seeds: any will do, zeros are the cheapest.
        seeds = [torch.zeros_like(head.like).contiguous().requires_grad_() for head in heads]
        edges = [source.edge for source, _ in sources]
        try:
            pulled = torch.autograd.grad(
                [head.edge for head in heads],
                edges,
                seeds,
                create_graph=True,
                allow_unused=True,
            )
            if by_entry and all(g is None for g in pulled):
                return [_nobodys(head, count) for head in heads]
            # A gradient without a graph is the same for all seeds: the heads do not depend on it.
            reached = []
            for g, (source, owners) in zip(pulled, sources, strict=True):
                if g is not None and g.requires_grad:
                    reached.append((g, source, owners))
            if not reached:
                return None
            # The same for every weighting: only the weights of the samples differ.
            directions = [_generic(g.detach()) for g, *_ in reached]

            def derivative(values: Tensor | None) -> Cotangents:
                vectors = directions
                if values is not None:
                    vectors = []
                    for direction, (_, source, owners) in zip(directions, reached, strict=True):
                        weights = owners.weights(source.like, values)
                        weighted = direction.reshape(source.like.shape) * weights
                        vectors.append(weighted.reshape(direction.shape))
                return torch.autograd.grad(
                    [g for g, *_ in reached],
                    seeds,
                    vectors,
                    retain_graph=True,
                    allow_unused=True,
                )

            eps = max(passes.tape.eps, torch.finfo(seeds[0].dtype).eps)
            code = Code.of(count, eps)
            plain = derivative(None)
            columns = [derivative(values) for values in code.values(count)]
        except RuntimeError:
            return None
    tolerances = [Tolerance.exact(eps), Tolerance.rounded(eps, largest_entry(plain))]
    owners_of_heads = []
    for i, head in enumerate(heads):
        shape = head.like.shape
        if by_entry and not head.like.ndim:
            shape = torch.Size([1])
        if not shape or (plain[i] is None and not by_entry):
            return None
        of_head = []
        for cotangent in (plain[i], *(column[i] for column in columns)):
            if cotangent is None:
                of_head.append(torch.zeros(shape, dtype=head.like.dtype, device=head.like.device))
            else:
                of_head.append(cotangent.reshape(shape))
        first, *others = of_head
        axes = tuple(range(len(shape))) if by_entry else (0,)
        # To the last digits if possible: the coarser tolerance takes rounding errors for owners.
        options = (code.read(first, others, axes, count, tolerance) for tolerance in tolerances)
        rows = next((rows for rows in options if rows is not None), None)
        if rows is None:
            return None
        if not by_entry and bool((rows.index < 0).any()):
            return None
        owners_of_heads.append(rows)
    return owners_of_heads


def _nobodys(head: Head, count: int) -> RowOwners:
    """The owners of entries that depend on no sample."""
    shape = head.like.shape or torch.Size((1,))
    nobody = torch.full((shape.numel(),), -1)
    return RowOwners(count, nobody, tuple(range(len(shape))))


def _generic(like: Tensor) -> Tensor:
    """Numbers that no structure annihilates."""
    numbers = torch.linspace(1, 2, like.numel(), device=like.device)
    return numbers.to(like.dtype).reshape(like.shape)


def _trivial(place: Place, count: int) -> Owners:
    """Owners of a place of which the weights say nothing, or where there is one sample."""
    if place.axes:
        return place.axes[0]
    if count <= 1:
        return BatchAxis(count, 0)
    if not place.rows or not place.rows[0]:
        return BatchAxis(count)
    axes = place.rows[0]
    rows = math.prod(place.shape[axis] for axis in axes)
    nobody = torch.full((rows,), -1)
    return RowOwners(count, nobody, axes)

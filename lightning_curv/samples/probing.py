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

from lightning_curv.differentiation.internal_pass import unheard
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
        rows = [(axis,) for axis in axes] + [tuple(range(k)) for k in range(2, len(shape) + 1)]
        return cls(
            edge,
            shape,
            batch_axes(shape, axes, count) or ([] if shape else [BatchAxis(count)]),
            rows,
        )


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
        values = spread(self.count, self.passes.tape.eps)
        first = self._pass(edges, None)
        second = self._pass(edges, values)
        exact = Tolerance.exact(self.passes.tape.eps)
        found = [
            self._cheap(place, plain, weighted, values, exact)
            for place, plain, weighted in zip(places, first, second, strict=True)
        ]
        if any(finding.mixed for finding in found):
            self._look_closer(places, first, second, values, found)
        return self._settled(places, found)

    def _look_closer(
        self,
        places: Sequence[Place],
        first: Cotangents,
        second: Cotangents,
        values: Tensor,
        found: list[Finding],
    ) -> None:
        """Look where no axis agrees to the last digits for rows in any order, and for rounding errors."""
        edges = [place.edge for place in places]
        eps = self.passes.tape.eps
        allowed = [Tolerance.exact(eps)]
        # what cancels between samples leaves rounding errors, which are not multiplied by weights
        if not self.strict:
            rounded = Tolerance.rounded(eps, largest_entry(first))
            allowed = [replace(allowed[0], noise=rounded.noise), rounded]
        columns: list[Cotangents] | None = None
        for attempt, tolerance in enumerate(allowed):
            for i, place in enumerate(places):
                if attempt and found[i].mixed:
                    found[i] = self._cheap(place, first[i], second[i], values, tolerance)
            unknown = [i for i, finding in enumerate(found) if finding.mixed and places[i].rows]
            if unknown and columns is None:
                columns = [self._pass(edges, weights) for weights in self._code.values(self.count)]
            for i in unknown:
                found[i] = self._rows(
                    places[i],
                    first[i],
                    [column[i] for column in columns or ()],
                    tolerance,
                )

    def _settled(self, places: Sequence[Place], found: list[Finding]) -> list[Finding]:
        """Where rows of zeros leave a choice, the owners of as many rows elsewhere."""
        sure: dict[int, set[BatchAxis]] = {}
        for place, finding in zip(places, found, strict=True):
            if (
                isinstance(finding.owners, BatchAxis)
                and not finding.options
                and place.shape
                and finding.reached
            ):
                sure.setdefault(place.shape[finding.owners.axis], set()).add(finding.owners)
        for i, (place, finding) in enumerate(zip(places, found, strict=True)):
            same = [o for o in finding.options if o in sure.get(place.shape[o.axis], ())]
            found[i] = Finding(same[0]) if len(same) == 1 else finding
        return found

    @property
    def _code(self) -> Code:
        return Code.of(self.count, self.passes.tape.eps)

    def _pass(self, edges: Sequence[GradientEdge], values: Tensor | None) -> Cotangents:
        """The cotangents at some edges for seeds that are weighted by the samples."""
        if not edges:
            return ()
        seeds = self._ones
        if values is not None:
            seeds = [
                one * owners.weights(one, values)
                for one, (_, owners) in zip(seeds, self.heads, strict=True)
            ]
        return self.passes.backward([head.edge for head, _ in self.heads], edges, seeds)

    def _cheap(
        self,
        place: Place,
        first: Tensor | None,
        second: Tensor | None,
        values: Tensor,
        tolerance: Tolerance,
    ) -> Finding:
        if first is None or second is None:
            return Finding(_trivial(place, self.count), reached=False, silent=True)
        first = first.reshape(place.shape)
        second = second.reshape(place.shape)
        zero = not bool(first.any())
        if zero and not bool(second.any()):
            self.conclusive = False
            options = place.axes if len(place.axes) > 1 else ()
            return Finding(_trivial(place, self.count), options=options, silent=True)
        finite = bool(first.sum().isfinite()) or bool(first.isfinite().all())
        if not finite:
            self.conclusive = False
        # Weights are powers of two: where kernels add up in the same order, as they mostly do, they
        # are there to the last digit, and two reads of the memory tell.
        agreeing = [
            axis
            for axis in (place.axes if finite and not zero else ())
            if torch.equal(first * axis.weights(first, values), second)
        ]
        agreeing = agreeing or consistent(first, second, tolerance, place.axes, values)
        if not agreeing:
            return Finding(None)
        self.told_of_all = self.told_of_all and _reaches_all(agreeing[0], first)
        return Finding(agreeing[0], options=agreeing if len(agreeing) > 1 else ())

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
        columns = [
            torch.zeros_like(plain) if g is None else g.reshape(place.shape) for g in spelled
        ]
        options = (
            self._code.read(plain, columns, axes, self.count, tolerance) for axes in place.rows
        )
        return Finding(next((rows for rows in options if rows is not None), None))


def _reaches_all(owners: BatchAxis, cotangent: Tensor) -> bool:
    """Whether something arrives at every sample; what is zero, a saturated unit, tells nothing."""
    rest = [axis for axis in range(cotangent.ndim) if axis != owners.axis]
    arriving = cotangent.any(rest) if rest else cotangent.bool()
    if len(arriving) != owners.count:
        split = (-1, owners.count) if owners.minor else (owners.count, -1)
        arriving = arriving.reshape(split).any(0 if owners.minor else 1)
    return bool(arriving.all())


FINE = 1e-4  # between the roundings of float32 and of float16


def base_of(eps: float) -> int:
    """How many powers of two are weights; float16, whose numbers end at 65504, holds fewer."""
    return 4 if FINE < eps < 2e-3 else 16


def spread(count: int, eps: float) -> Tensor:
    """Powers of two, ``[N]``: neighbours have different ones, and equal ones are far apart."""
    return 2.0 ** ((golden(count) - 1) * base_of(eps)).floor()


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
        tiny = 2.0**-24 if FINE < eps < 2e-3 else 2.0**-149
        return cls(16 * 2.0**-23 if eps < FINE else 2 * eps, 64 * tiny)

    @classmethod
    def rounded(cls, eps: float, scale: float) -> Tolerance:
        """Whatever rounding may do to numbers that were as large as ``scale``."""
        noise = 8 * eps * scale
        return cls(eps * (1e3 if eps < 1e-6 else 32), noise, noise)


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
        return cls(base, max(1, math.ceil(math.log(max(2, count), base) - 1e-9)))

    def values(self, count: int) -> list[Tensor]:
        """The weights of the samples in every pass."""
        number = torch.arange(count)
        spelled = [number // self.base**k % self.base for k in range(self.digits)]
        check = (self.base - 1 - spelled[0] + sum(spelled[1:])) % self.base
        return [2.0 ** digit.double() for digit in [*spelled, check]]

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
        rest = RowOwners(count, torch.zeros(0, dtype=torch.long), axes)
        if plain.ndim > len(axes):
            a = rest.rows(plain).flatten(1)
        else:
            a = rest.rows(plain)[:, None]
        if not bool(a.isfinite().all()):
            return None
        wide = a.double() if a.device.type != "mps" else a.float()
        if wide.shape[1]:
            largest = wide.abs().amax(1)
        else:
            largest = wide.new_zeros(len(wide))
        normal = (
            wide / largest.clamp(min=torch.finfo(wide.dtype).tiny)[:, None]
        )  # the largest entry is 1
        norms = normal.square().sum(1)
        owned = largest > tolerance.absolute
        digits = []
        for column in columns:
            if column.ndim > len(axes):
                b = rest.rows(column).flatten(1)
            else:
                b = rest.rows(column)[:, None]
            b = b.to(wide.dtype) / largest.clamp(min=torch.finfo(wide.dtype).tiny)[:, None]
            ratio = (normal * b).sum(1) / norms.clamp(min=torch.finfo(wide.dtype).tiny)
            digit = (
                ratio.clamp(min=1).log2().round().nan_to_num(0.0, 0.0, 0.0).clamp(0, self.base - 1)
            )
            weights = 2.0**digit
            if wide.shape[1]:
                error = (b / weights[:, None] - normal).abs().amax(1)
            else:
                error = norms
            allowed = tolerance.relative + tolerance.absolute / largest.clamp(
                min=torch.finfo(wide.dtype).tiny
            )
            if bool((~(error <= allowed) & owned).any()):
                return None
            digits.append(digit.long())
        number = sum(digit * self.base**k for k, digit in enumerate(digits[:-1]))
        assert isinstance(number, Tensor)
        check = (self.base - 1 - digits[0] + sum(digits[1:-1])) % self.base
        if bool((((number >= count) | (check != digits[-1])) & owned).any()):
            return None
        # where all rows are rounding errors, which of them are zero is chance, and other passes
        # will differ
        unowned = (largest == 0) & (largest > tolerance.noise).any()
        return RowOwners(count, number.clamp(max=count - 1).masked_fill(unowned, -1), axes)


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
    unknown = ~(first.isfinite() & second.isfinite())
    first = first.masked_fill(unknown, 0)
    magnitudes = first.abs()

    def deviation(axis: BatchAxis) -> Tensor:
        return (second / axis.weights(first, values)).masked_fill_(unknown, 0).sub_(first)

    def allowed(axis: BatchAxis) -> Tensor:
        """Of every row: one of large numbers must not hide what happens in the others."""
        rest = [other for other in range(first.ndim) if other != axis.axis]
        if rest and first.numel():
            largest = magnitudes.amax(rest, keepdim=True)
        else:
            largest = magnitudes
        return tolerance.relative * largest + tolerance.absolute

    norms = {
        c: float(d.norm()) for c in choices if bool(((d := deviation(c)).abs() <= allowed(c)).all())
    }
    # Where the rounding is coarse, more than one may agree, but the right one by far the best.
    most = 8 * min(norms.values(), default=0.0) + 4 * torch.finfo(first.dtype).eps * float(
        first.norm()
    )
    return [choice for choice, norm in norms.items() if norm <= most]


def owners_at(passes: Passes, edges: Sequence[GradientEdge]) -> dict[GradientEdge, Owners | None]:
    """Who owns the rows of the tensors at ``edges``; ``None``: no loss reaches them.

    Raises:
        UnsupportedError: Samples mix.
    """
    if not edges:
        return {}
    samples = passes.samples
    heads = [
        (Head(edge, like), owners)
        for part in passes.parts
        for edge, like, owners in zip(part.edges, part.likes, part.owners, strict=True)
    ]
    places = [Place.anywhere(edge, samples.count) for edge in edges]
    found: dict[GradientEdge, Owners | None] = {}
    for place, finding in zip(
        places,
        Probe(passes, heads, samples.count).findings(places),
        strict=True,
    ):
        if finding.mixed:
            raise UnsupportedError(
                f"Expected rows of {samples.count} samples in a tensor of shape "
                f"{tuple(place.shape)}, found rows that belong to several of them: an op mixes "
                "samples."
            )
        found[place.edge] = finding.owners if finding.reached else None
    return found


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
    with torch.enable_grad(), unheard():
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
            reached = [
                (g, *source) for g, source in zip(pulled, sources, strict=True) if g is not None
            ]
            reached = [(g, source, owners) for g, source, owners in reached if g.requires_grad]
            if not reached:
                return None
            directions = [_generic(g.detach()) for g, *_ in reached]

            def derivative(values: Tensor | None) -> Cotangents:
                vectors = directions
                if values is not None:
                    vectors = [
                        (
                            v.reshape(source.like.shape) * owners.weights(source.like, values)
                        ).reshape(v.shape)
                        for v, (_, source, owners) in zip(directions, reached, strict=True)
                    ]
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
    found = []
    for i, head in enumerate(heads):
        shape = head.like.shape
        if by_entry and not head.like.ndim:
            shape = torch.Size([1])
        if not shape or (plain[i] is None and not by_entry):
            return None
        first, *others = (
            torch.zeros(shape, dtype=head.like.dtype, device=head.like.device)
            if g is None
            else g.reshape(shape)
            for g in (plain[i], *(column[i] for column in columns))
        )
        axes = tuple(range(len(shape))) if by_entry else (0,)
        options = (code.read(first, others, axes, count, tolerance) for tolerance in tolerances)
        rows = next((rows for rows in options if rows is not None), None)
        if rows is None or (not by_entry and bool((rows.index < 0).any())):
            return None
        found.append(rows)
    return found


def _nobodys(head: Head, count: int) -> RowOwners:
    """The owners of entries that depend on no sample."""
    shape = head.like.shape or torch.Size((1,))
    return RowOwners(count, torch.full((shape.numel(),), -1), tuple(range(len(shape))))


def _generic(like: Tensor) -> Tensor:
    """Numbers that no structure annihilates."""
    return torch.linspace(1, 2, like.numel(), device=like.device).to(like.dtype).reshape(like.shape)


def _trivial(place: Place, count: int) -> Owners:
    """Owners of a place of which the weights say nothing, or where there is one sample."""
    if place.axes:
        return place.axes[0]
    if count <= 1:
        return BatchAxis(count, 0)
    rows = math.prod(place.shape[axis] for axis in (place.rows[0] if place.rows else ()))
    axes = place.rows[0] if place.rows else ()
    if axes:
        return RowOwners(count, torch.full((rows,), -1), axes)
    return BatchAxis(count)

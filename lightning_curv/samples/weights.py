"""Weights that tell samples apart: powers of two, the numbers that they spell, and rounding.

They are factors that do not round: what a sample's rows get is multiplied by them to the last
digit, in every precision, rounding errors included. Rows that are tiny beside others are told apart
like all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.precision import wide
from lightning_curv.terms.owners import BatchAxis, RowOwners, golden

FINE = 1e-4  # between the roundings of float32 and of float16


def base_of(eps: float) -> int:
    """How many powers of two are weights; float16, whose numbers end at 65504, holds fewer."""
    return 4 if FINE < eps < 2e-3 else 16


def spread(count: int, eps: float) -> Tensor:
    """Powers of two, `[N]`: neighbours have different ones, and equal ones are far apart."""
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
        """Whatever rounding may do to numbers that were as large as `scale`."""
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
        """The code for N samples in types of number that round by `eps`."""
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
        """The owners of the rows; `None`: a row has several.

        Rows of rounding errors have none or any: what arrives there is nothing, whatever is
        backpropagated.
        """
        some = few(math.prod(plain.shape[axis] for axis in axes))
        # What is wrong is mostly wrong everywhere: some rows tell it at a fraction of the price.
        if some is not None and self._spelled(plain, columns, axes, count, tolerance, some) is None:
            return None
        found = self._spelled(plain, columns, axes, count, tolerance)
        if found is None:
            return None
        number, largest = found
        # Where all rows are rounding errors, which of them are zero is chance, and other passes
        # will differ.
        unowned = (largest == 0) & (largest > tolerance.noise).any()
        index = number.clamp(max=count - 1).masked_fill(unowned, -1)
        return RowOwners(count, index, axes)

    def _spelled(
        self,
        plain: Tensor,
        columns: Sequence[Tensor],
        axes: tuple[int, ...],
        count: int,
        tolerance: Tolerance,
        some: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """The numbers that rows spell and their largest entries, [R]; `None`: one has several.

        Only those of `some` rows, if given.
        """
        plain_rows = _rows_of(plain, axes, some)
        if not bool(plain_rows.isfinite().all()):
            return None
        exact_rows = wide(plain_rows)
        if exact_rows.shape[1]:
            largest = exact_rows.abs().amax(1)
        else:
            largest = exact_rows.new_zeros(len(exact_rows))
        smallest = torch.finfo(exact_rows.dtype).tiny
        scale = largest.clamp(min=smallest)
        normal = exact_rows / scale[:, None]  # the largest entry is 1
        norms = normal.square().sum(1)
        owned = largest > tolerance.absolute
        digits = []
        for column in columns:
            weighted = _rows_of(column, axes, some).to(exact_rows.dtype) / scale[:, None]
            # The weight of a row by least squares, rounded to a power of two.
            ratio = (normal * weighted).sum(1) / norms.clamp(min=smallest)
            exponent = ratio.clamp(min=1).log2().round()
            digit = exponent.nan_to_num(0.0, 0.0, 0.0).clamp(0, self.base - 1)
            weights = 2.0**digit
            if exact_rows.shape[1]:
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
        return number, largest


def few(rows: int) -> Tensor | None:
    """The numbers of some rows, an eighth of them or 64; `None`: there are too few to choose."""
    if rows < 8:
        return None
    return torch.linspace(0, rows - 1, min(rows // 8, 64)).long()


def _rows_of(tensor: Tensor, axes: tuple[int, ...], some: Tensor | None = None) -> Tensor:
    """The rows of a tensor whose rows are made up by some axes, or some of them, `[R, E]`."""
    no_index = torch.zeros(0, dtype=torch.long)
    rows = RowOwners(0, no_index, axes).rows(tensor)
    if some is not None:
        rows = rows[some.to(rows.device)]
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
    norms: dict[BatchAxis, float] = {}
    for choice in choices:
        weights = choice.weights(first, values)
        some = few(first.shape[choice.axis]) if first.ndim else None
        if some is not None:
            # What mixes samples mostly mixes all of them: some of the rows tell.
            some = some.to(first.device)
            part = first.index_select(choice.axis, some)
            weighted = second.index_select(choice.axis, some)
            if _deviation(part, weighted, weights[some], choice.axis, tolerance) is None:
                continue
        norm = _deviation(first, second, weights, choice.axis, tolerance)
        if norm is not None:
            norms[choice] = norm
    if not norms:
        return []
    # Where the rounding is coarse, more than one may agree, but the right one by far the best.
    finite = first.masked_fill(~(first.isfinite() & second.isfinite()), 0)
    rounding = 4 * torch.finfo(first.dtype).eps * float(finite.norm())
    most = 8 * min(norms.values()) + rounding
    return [choice for choice, norm in norms.items() if norm <= most]


def _deviation(
    first: Tensor,
    second: Tensor,
    weights: Tensor,
    axis: int,
    tolerance: Tolerance,
) -> float | None:
    """By how much the second differs from the first times the weights; `None`: by too much."""
    # What is not finite cannot be compared; it is counted as agreeing.
    unknown = ~(first.isfinite() & second.isfinite())
    first = first.masked_fill(unknown, 0)
    unweighted = second / weights
    difference = unweighted.masked_fill_(unknown, 0).sub_(first)
    # Of every row: one of large numbers must not hide what happens in the others.
    rest = [other for other in range(first.ndim) if other != axis]
    largest = first.abs()
    if rest and first.numel():
        largest = largest.amax(rest, keepdim=True)
    allowed = tolerance.relative * largest + tolerance.absolute
    within = difference.abs() <= allowed
    return float(difference.norm()) if bool(within.all()) else None


def generic(like: Tensor) -> Tensor:
    """Numbers that no structure annihilates."""
    numbers = torch.linspace(1, 2, like.numel(), device=like.device)
    return numbers.to(like.dtype).reshape(like.shape)

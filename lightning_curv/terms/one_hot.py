"""Terms with one-hot inputs (embeddings): every contraction without a dense one-hot matrix.

How many rows a batch touches depends on the values of its indices. On the processor they are
counted; on other devices the host would wait for that, so that results have as many places as there
may be rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages
from lightning_curv.terms.safe_norms import row_norms
from lightning_curv.terms.squares import signed
from lightning_curv.terms.term import ROUNDING, Term


class Rows(NamedTuple):
    """Per-sample gradients of an embedding as its touched rows, each (sample, index) pair once.

    They are made to be changed in place.
    """

    g: Tensor  # [V, U, *], zeros where no row is
    sample: Tensor  # [U]
    token: Tensor  # [U]
    exists: Tensor | None = None  # [U], whether there is a row at all; None: everywhere


def rows(term: Term) -> Rows:
    """The touched rows of the per-sample gradients; repeated tokens of a sample are added up."""
    term = term.canonical()
    sample, index, position = _touched_unread(term)
    # One number per sample and index: sorting numbers is faster than sorting pairs. One index more
    # than there are classes: see `_touched_unread`.
    numbers = term.classes + 1
    pair = index + numbers * sample
    key, inverse, exists = _distinct(pair, most=numbers * term.g.shape[1])
    g = _at(term.g.flatten(1, 2), position, 1)
    summed = _added(g, inverse, len(key))
    owner = key // numbers
    token = key % numbers
    if exists is None:
        return Rows(summed, owner, token)
    exists = exists & (token < term.classes)
    absent = ~exists.reshape(-1, *[1] * (summed.ndim - 2))
    return Rows(summed.masked_fill_(absent, 0), owner, token.clamp(max=term.classes - 1), exists)


def _distinct(numbers: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The distinct ones of some numbers, ascending, which of them each is, and which there are.

    On other devices than the processor the first and last result have a place for each number, or
    `most` places if that is less; those behind the last distinct number hold zeros.
    """
    if numbers.device.type == "cpu" or not len(numbers):
        return *numbers.unique(return_inverse=True), None
    ascending, order = numbers.sort()
    starts = torch.ones_like(ascending)
    starts[1:] = ascending[1:] != ascending[:-1]
    place = starts.cumsum(0) - 1
    inverse = torch.empty_like(place).scatter_(0, order, place)
    distinct = numbers.new_zeros(min(len(numbers), most)).scatter_(0, place, ascending)
    exists = torch.arange(len(distinct), device=numbers.device) <= place[-1]
    return distinct, inverse, exists


def _added(g: Tensor, place: Tensor, places: int) -> Tensor:
    """Sums of the entries `g [V, M, *]` that go to the same place, `[V, places, *]`."""
    sums = g.new_zeros(len(g), places, *g.shape[2:])
    return sums.index_add_(1, place, g)


def _touched(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, index and flat position of every non-zero one-hot row of a canonical term."""
    assert term.x is not None
    index = term.x.flatten()
    # A negative index is a row of zeros, such as that of `padding_idx`.
    position = (index >= 0).nonzero().squeeze(1)
    positions_per_sample = max(term.x.shape[1], 1)
    sample = position // positions_per_sample
    return sample, index[position], position


def _touched_unread(term: Term) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, for which the host does not wait for another device.

    There it is of every row: those of zeros have an index behind the last class, and the positions
    are `None`.
    """
    assert term.x is not None
    if term.x.device.type == "cpu":
        return _touched(term)
    index = term.x.flatten()
    sample = torch.arange(len(index), device=index.device) // max(term.x.shape[1], 1)
    return sample, index.where(index >= 0, term.classes), None


def _at(g: Tensor, position: Tensor | None, axis: int) -> Tensor:
    """Cotangents at some positions; all of them: nothing is copied."""
    # No padding: the usual case.
    if position is None or len(position) == g.shape[axis]:
        return g
    return g.index_select(axis, position)


def dot(term: Term, vector: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with `vector [classes, *]`, `[V, N]`."""
    touched = rows(term)
    products = touched.g * vector[touched.token]
    by_row = products.flatten(2).sum(2)
    return _added(by_row, touched.sample, term.g.shape[1])


def second_moment(term: Term, reduce: bool) -> Tensor:
    """The diagonal of the mean over samples of x xᵀ, `[classes]`.

    Args:
        term: The term of an embedding.
        reduce: Whether x is the mean of a sample's positions, instead of one of them (expand).
    """
    term = term.canonical()
    assert term.x is not None
    sample, index, _ = _touched_unread(term)
    samples, positions = term.x.shape
    if not reduce:
        if term.lengths is None:
            number = samples * positions
        else:
            number = max(1, int(term.lengths.sum()))
        # x xᵀ of a one-hot row is one on the diagonal: the moment is how often the index occurs.
        return _occurrences(index, term.classes).to(term.g.dtype) / number
    if term.lengths is None:
        lengths = torch.full((samples,), positions, device=term.x.device)
    else:
        lengths = term.lengths.clamp(min=1).to(term.x.device)
    numbers = term.classes + 1  # see `rows`
    pair = index + numbers * sample
    key, inverse, _ = _distinct(pair, most=numbers * samples)
    counts = _occurrences(inverse, len(key))
    # An entry of the mean of a sample's positions is the share of them that hold the index.
    shares = counts / lengths[key // numbers]
    squares = shares.square()
    result = term.g.new_zeros(numbers)
    result.index_add_(0, key % numbers, squares.to(result.dtype))
    return result[:-1] / samples


def per_sample(term: Term) -> Tensor:
    """The per-sample gradients themselves, `[V, N, classes, *]`."""
    touched = rows(term)
    columns, samples = term.g.shape[:2]
    size = samples * term.classes
    rest = touched.g.shape[2:]
    dense = huge_pages.empty(touched.g, columns, size, *rest).zero_()
    place = touched.sample * term.classes + touched.token
    # A sum though every pair is there once: rows of zeros that are none have the place of another.
    dense.index_add_(1, place, touched.g)
    return dense.unflatten(1, (samples, term.classes))


def total(term: Term) -> Tensor:
    """Sum over the samples, `[V, classes, *]`."""
    return _scatter(rows(term), term.classes)


def weighted_total(term: Term, weights: Tensor) -> Tensor:
    """Sum over the samples of the first column, times `weights [N]`, `[classes, *]`."""
    term = term.canonical()
    sample, index, position = _touched_unread(term)
    g = _at(term.g[0].flatten(0, 1), position, 0)
    # No repeated token is added up first: a sum that is linear in the rows does not need it.
    weight_of_row = weights.to(g.dtype)[sample]
    weight_of_row = weight_of_row.reshape(-1, *[1] * (g.ndim - 1))
    total = g.new_zeros(term.classes + 1, *g.shape[1:])
    return total.index_add_(0, index, g * weight_of_row)[:-1]


def sum_squares(term: Term, signs: Tensor | None = None) -> Tensor:
    """Sum over columns and samples of the squared per-sample gradients, `[classes, *]`."""
    touched = rows(term)
    row_signs = None if signs is None else signs[:, touched.sample]
    squares = signed(touched.g.square_(), row_signs)
    over_columns = squares.sum(0, keepdim=True)
    summed = touched._replace(g=over_columns)
    return _scatter(summed, term.classes)[0]


def variance(term: Term) -> Tensor:
    """Population variance over the samples of the first column, `[classes, *]`.

    Rows that no sample touches have none; a sample that does not touch a row has zeros there.
    """
    touched = rows(term)
    samples = term.g.shape[1]
    mean = _scatter(touched, term.classes)[0] / samples
    deviations = touched.g.sub_(mean[touched.token])
    if touched.exists is not None:
        absent = ~touched.exists.reshape(-1, *[1] * (mean.ndim - 1))
        deviations = deviations.masked_fill_(absent, 0)
    squares = touched._replace(g=deviations.square_())
    exists = torch.ones_like(touched.token) if touched.exists is None else touched.exists
    touching = mean.new_zeros(term.classes)
    touching.index_add_(0, touched.token, exists.to(mean.dtype))
    others = samples - touching
    others = others.reshape(-1, *[1] * (mean.ndim - 1))
    # The zeros of a sample that does not touch a row deviate by the mean.
    by_touching = _scatter(squares, term.classes)[0]
    by_others = others * mean.square()
    return (by_touching + by_others) / samples


def squared_norms(term: Term) -> Tensor:
    """Squared norms of the per-sample gradients, `[V, N]`."""
    touched = rows(term)
    row_norms = torch.linalg.vector_norm(touched.g.flatten(2), dim=2)
    return _added(row_norms.square_(), touched.sample, term.g.shape[1])


def norms(term: Term) -> tuple[Tensor, Tensor]:
    """The norms, rounded up as in `ghost_norms.norms`, and those without cancelling; `[V, N]`.

    The second are what the norms would be if nothing cancelled where a sample repeats a token. Only
    the rows of such tokens are added up before they are squared.
    """
    samples = term.g.shape[1]
    eps = torch.finfo(term.g.dtype).eps
    term = term.canonical()
    if term.g.device.type != "cpu":
        return _norms_unread(term)
    sample, index, position = _touched(term)
    pair = index + term.classes * sample  # see `rows`
    key, number, counts = pair.unique(return_inverse=True, return_counts=True)
    g = _at(term.g.flatten(1, 2), position, 1)
    # Of the rows as they are, before any are added up.
    norms = row_norms(g, 2)
    # Tokens that a sample has once: the squares of their rows add up as they are.
    repeats = (counts > 1)[number]
    single_squares = norms.square().masked_fill_(repeats, 0)
    squares = _added(single_squares, sample, samples)
    repeated = repeats.nonzero().squeeze(1)
    if not len(repeated):
        return squares.sqrt(), squares.sqrt()
    # The others: the rows of one token are summed before they are squared, and may cancel.
    some, place = number[repeated].unique(return_inverse=True)
    owners = key[some] // term.classes
    repeated_rows = _at(g, repeated, 1)
    summed_rows = _added(repeated_rows, place, len(some))
    sums = row_norms(summed_rows, 2).square_()
    norm_sums = _added(norms[:, repeated], place, len(some))
    without_cancelling = norm_sums.square_()
    sizes = squares + _added(without_cancelling, owners, samples)
    # By rounding the sum may be less than the true one: by a share of what cancelled.
    rounded_up = sums.add_(without_cancelling, alpha=ROUNDING * eps)
    squares = squares + _added(rounded_up, owners, samples)
    return squares.sqrt(), sizes.sqrt()


def _norms_unread(term: Term) -> tuple[Tensor, Tensor]:
    """`norms` of a canonical term, for which the host does not wait: all rows are added up."""
    samples = term.g.shape[1]
    numbers = term.classes + 1  # see `rows`
    sample, index, _ = _touched_unread(term)
    key, place, exists = _distinct(index + numbers * sample, most=numbers * samples)
    g = term.g.flatten(1, 2)
    sums = row_norms(_added(g, place, len(key)), 2).square_()
    without_cancelling = _added(row_norms(g, 2), place, len(key)).square_()
    # As on the processor, nothing is added where a sample has a token once.
    repeated = _occurrences(place, len(key)) > 1
    rounding = without_cancelling * (ROUNDING * torch.finfo(g.dtype).eps)
    squares = sums.add_(rounding.where(repeated, 0.0))
    # Rows of zeros have an index behind the last class.
    absent = key % numbers == term.classes
    if exists is not None:
        absent |= ~exists
    owners = key // numbers
    squares = _added(squares.masked_fill_(absent, 0), owners, samples)
    sizes = _added(without_cancelling.masked_fill_(absent, 0), owners, samples)
    return squares.sqrt(), sizes.sqrt()


def _occurrences(index: Tensor, count: int) -> Tensor:
    """How often each of `count` indices occurs; what is behind them is left out."""
    # Not `bincount`, which looks for the largest index before it makes memory.
    occurrences = index.new_zeros(count + 1)
    return occurrences.index_add_(0, index, torch.ones_like(index))[:count]


def _scatter(touched: Rows, classes: int) -> Tensor:
    """The sum over the samples, `[V, classes, *]`."""
    return _added(touched.g, touched.token, classes)

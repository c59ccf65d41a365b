"""Terms with one-hot inputs (embeddings): every contraction without a dense one-hot matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages
from lightning_curv.terms.safe_norms import row_norms
from lightning_curv.terms.term import ROUNDING, Term, signed


class Rows(NamedTuple):
    """Per-sample gradients of an embedding as its touched rows, each (sample, index) pair once.

    They are made to be changed in place.
    """

    g: Tensor  # [V, U, *]
    sample: Tensor  # [U]
    token: Tensor  # [U]


def rows(term: Term) -> Rows:
    """The touched rows of the per-sample gradients; repeated tokens of a sample are added up."""
    term = term.canonical()
    sample, index, position = _touched(term)
    pair = index + term.classes * sample  # one number per sample and index
    key, inverse = pair.unique(return_inverse=True)
    g = _at(term.g.flatten(1, 2), position, 1)
    return Rows(_added(g, inverse, len(key)), key // term.classes, key % term.classes)


def _added(g: Tensor, place: Tensor, places: int) -> Tensor:
    """Sums of the entries ``g [V, M, *]`` that go to the same place, ``[V, places, *]``."""
    return g.new_zeros(len(g), places, *g.shape[2:]).index_add_(1, place, g)


def _touched(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, index and flat position of every non-zero one-hot row of a canonical term."""
    assert term.x is not None
    index = term.x.flatten()
    position = (index >= 0).nonzero().squeeze(1)
    return position // max(term.x.shape[1], 1), index[position], position


def _at(g: Tensor, position: Tensor, axis: int) -> Tensor:
    """Cotangents at some positions; all of them: nothing is copied."""
    if len(position) == g.shape[axis]:
        return g
    return g.index_select(axis, position)


def dot(term: Term, vector: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with ``vector [classes, *]``, ``[V, N]``."""
    touched = rows(term)
    products = (touched.g * vector[touched.token]).flatten(2).sum(2)
    return _added(products, touched.sample, term.g.shape[1])


def second_moment(term: Term, reduce: bool) -> Tensor:
    """The diagonal of the mean over samples of x xᵀ, ``[classes]``.

    Args:
        term: The term of an embedding.
        reduce: Whether x is the mean of a sample's positions, instead of one of them (expand).
    """
    term = term.canonical()
    assert term.x is not None
    sample, index, _ = _touched(term)
    samples, positions = term.x.shape
    if not reduce:
        if term.lengths is None:
            number = samples * positions
        else:
            number = max(1, int(term.lengths.sum()))
        return torch.bincount(index, minlength=term.classes).to(term.g.dtype) / number
    if term.lengths is None:
        lengths = torch.full((samples,), positions, device=term.x.device)
    else:
        lengths = term.lengths.clamp(min=1).to(term.x.device)
    key, counts = (index + term.classes * sample).unique(return_counts=True)
    token = key % term.classes
    owner = key // term.classes
    squares = (counts / lengths[owner]).square()
    result = term.g.new_zeros(term.classes)
    return result.index_add_(0, token, squares.to(result.dtype)) / samples


def per_sample(term: Term) -> Tensor:
    """The per-sample gradients themselves, ``[V, N, classes, *]``."""
    touched = rows(term)
    columns, samples = term.g.shape[:2]
    size = samples * term.classes
    dense = huge_pages.empty(touched.g, columns, size, *touched.g.shape[2:]).zero_()
    dense[:, touched.sample * term.classes + touched.token] = touched.g
    return dense.unflatten(1, (samples, term.classes))


def total(term: Term) -> Tensor:
    """Sum over the samples, ``[V, classes, *]``."""
    return _scatter(rows(term), term.classes)


def weighted_total(term: Term, weights: Tensor) -> Tensor:
    """Sum over the samples of the first column, times ``weights [N]``, ``[classes, *]``."""
    term = term.canonical()
    sample, index, position = _touched(term)
    g = _at(term.g[0].flatten(0, 1), position, 0)
    by_row = weights.to(g.dtype)[sample].reshape(-1, *[1] * (g.ndim - 1))
    total = g.new_zeros(term.classes, *g.shape[1:])
    return total.index_add_(0, index, g * by_row)


def sum_squares(term: Term, signs: Tensor | None = None) -> Tensor:
    """Sum over columns and samples of the squared per-sample gradients, ``[classes, *]``."""
    touched = rows(term)
    row_signs = None if signs is None else signs[:, touched.sample]
    squares = signed(touched.g.square_(), row_signs)
    summed = touched._replace(g=squares.sum(0, keepdim=True))
    return _scatter(summed, term.classes)[0]


def variance(term: Term) -> Tensor:
    """Population variance over the samples of the first column, ``[classes, *]``.

    Rows that no sample touches have none; a sample that does not touch a row has zeros there.
    """
    touched = rows(term)
    samples = term.g.shape[1]
    mean = _scatter(touched, term.classes)[0] / samples
    deviations = touched.g.sub_(mean[touched.token]).square_()
    touching = torch.bincount(touched.token, minlength=term.classes)
    others = samples - touching.to(mean.dtype)
    others = others.reshape(-1, *[1] * (mean.ndim - 1))
    by_touching = _scatter(touched._replace(g=deviations), term.classes)[0]
    return (by_touching + others * mean.square()) / samples


def squared_norms(term: Term) -> Tensor:
    """Squared norms of the per-sample gradients, ``[V, N]``."""
    touched = rows(term)
    squares = torch.linalg.vector_norm(touched.g.flatten(2), dim=2).square_()
    return _added(squares, touched.sample, term.g.shape[1])


def norms(term: Term) -> tuple[Tensor, Tensor]:
    """The norms, rounded up as in `ghost_norms.norms`, and those without cancelling; ``[V, N]``.

    The second are what the norms would be if nothing cancelled where a sample repeats a token. Only
    the rows of such tokens are added up before they are squared.
    """
    samples = term.g.shape[1]
    eps = torch.finfo(term.g.dtype).eps
    term = term.canonical()
    sample, index, position = _touched(term)
    pair = index + term.classes * sample  # one number per sample and index
    key, number, counts = pair.unique(return_inverse=True, return_counts=True)
    g = _at(term.g.flatten(1, 2), position, 1)
    norms = row_norms(g, 2)
    repeats = (counts > 1)[number]
    squares = _added(norms.square().masked_fill_(repeats, 0), sample, samples)
    repeated = repeats.nonzero().squeeze(1)
    if not len(repeated):
        return squares.sqrt(), squares.sqrt()
    some, place = number[repeated].unique(return_inverse=True)
    owners = key[some] // term.classes
    summed_rows = _added(_at(g, repeated, 1), place, len(some))
    sums = row_norms(summed_rows, 2).square_()
    without_cancelling = _added(norms[:, repeated], place, len(some)).square_()
    sizes = squares + _added(without_cancelling, owners, samples)
    rounded_up = sums.add_(without_cancelling, alpha=ROUNDING * eps)
    squares = squares + _added(rounded_up, owners, samples)
    return squares.sqrt(), sizes.sqrt()


def _scatter(touched: Rows, classes: int) -> Tensor:
    """The sum over the samples, ``[V, classes, *]``."""
    return _added(touched.g, touched.token, classes)

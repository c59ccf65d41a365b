"""Terms with one-hot inputs (embeddings): every contraction without a dense one-hot matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curv.kernels import huge_pages
from lightning_curv.terms.safe_norms import row_norms
from lightning_curv.terms.term import ROUNDING, Term, signed


class Rows(NamedTuple):
    """Per-sample gradients of an embedding as its touched rows, each (sample, index) pair once; made to be changed."""

    g: Tensor  # [V, U, *]
    sample: Tensor  # [U]
    token: Tensor  # [U]


def rows(term: Term) -> Rows:
    """The touched rows of the per-sample gradients; repeated tokens of a sample are added up."""
    term = term.canonical()
    sample, index, position = _touched(term)
    key, inverse = (index + term.classes * sample).unique(return_inverse=True)
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
    return g if len(position) == g.shape[axis] else g.index_select(axis, position)


def dot(term: Term, vector: Tensor) -> Tensor:
    """Inner products of the per-sample gradients with ``vector [classes, *]``, ``[V, N]``."""
    touched = rows(term)
    products = (touched.g * vector[touched.token]).flatten(2).sum(2)
    return products.new_zeros(len(products), term.g.shape[1]).index_add_(
        1, touched.sample, products
    )


def second_moment(term: Term, reduce: bool) -> Tensor:
    """Diagonal of the mean over samples of x xᵀ, ``[classes]``; x: the positions (expand) or their mean (reduce)."""
    term = term.canonical()
    assert term.x is not None
    sample, index, _ = _touched(term)
    samples, positions = term.x.shape
    lengths = (
        torch.full((samples,), positions) if term.lengths is None else term.lengths.clamp(min=1)
    )
    lengths = lengths.to(term.x.device)
    if not reduce:
        number = samples * positions if term.lengths is None else max(1, int(term.lengths.sum()))
        return torch.bincount(index, minlength=term.classes).to(term.g.dtype) / number
    key, counts = (index + term.classes * sample).unique(return_counts=True)
    result = term.g.new_zeros(term.classes)
    return (
        result.index_add_(
            0, key % term.classes, (counts / lengths[key // term.classes]).square().to(result.dtype)
        )
        / samples
    )


def per_sample(term: Term) -> Tensor:
    """``[V, N, classes, *]``, dense."""
    touched, samples = rows(term), term.g.shape[1]
    dense = huge_pages.empty(
        touched.g, term.g.shape[0], samples * term.classes, *touched.g.shape[2:]
    ).zero_()
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
    g = g * weights.to(g.dtype)[sample].reshape(-1, *[1] * (g.ndim - 1))
    return g.new_zeros(term.classes, *g.shape[1:]).index_add_(0, index, g)


def sum_squares(term: Term, signs: Tensor | None = None) -> Tensor:
    """Sum over columns and samples of the squared per-sample gradients, ``[classes, *]``."""
    touched = rows(term)
    squares = signed(touched.g.square_(), None if signs is None else signs[:, touched.sample])
    return _scatter(touched._replace(g=squares.sum(0, keepdim=True)), term.classes)[0]


def variance(term: Term) -> Tensor:
    """Population variance over the samples of the first column, ``[classes, *]``; untouched rows are zero."""
    touched, samples = rows(term), term.g.shape[1]
    mean = _scatter(touched, term.classes)[0] / samples
    deviations = touched.g.sub_(mean[touched.token]).square_()
    untouched = samples - torch.bincount(touched.token, minlength=term.classes).to(mean.dtype)
    untouched = untouched.reshape(-1, *[1] * (mean.ndim - 1))
    return (
        _scatter(touched._replace(g=deviations), term.classes)[0] + untouched * mean.square()
    ) / samples


def squared_norms(term: Term) -> Tensor:
    """Squared norms of the per-sample gradients, ``[V, N]``."""
    touched = rows(term)
    squares = torch.linalg.vector_norm(touched.g.flatten(2), dim=2).square_()
    return _added(squares, touched.sample, term.g.shape[1])


def norms(term: Term) -> tuple[Tensor, Tensor]:
    """The same, rounded up as in `grams.norms`, and what repeated rows would have without cancelling; ``[V, N]`` each.

    Only the rows of tokens that a sample repeats are added up before they are squared.
    """
    samples, eps = term.g.shape[1], torch.finfo(term.g.dtype).eps
    term = term.canonical()
    sample, index, position = _touched(term)
    key, pair, counts = (index + term.classes * sample).unique(
        return_inverse=True, return_counts=True
    )
    g = _at(term.g.flatten(1, 2), position, 1)
    norms = row_norms(g, 2)
    repeats = (counts > 1)[pair]
    squares = _added(norms.square().masked_fill_(repeats, 0), sample, samples)
    sizes = squares
    repeated = repeats.nonzero().squeeze(1)
    if len(repeated):
        some, place = pair[repeated].unique(return_inverse=True)
        sums = row_norms(_added(_at(g, repeated, 1), place, len(some)), 2).square_()
        every, owners = (
            _added(norms[:, repeated], place, len(some)).square_(),
            key[some] // term.classes,
        )
        sizes = squares + _added(every, owners, samples)
        squares = squares + _added(sums.add_(every, alpha=ROUNDING * eps), owners, samples)
    return squares.sqrt(), sizes.sqrt()


def _scatter(touched: Rows, classes: int) -> Tensor:
    result = touched.g.new_zeros(touched.g.shape[0], classes, *touched.g.shape[2:])
    return result.index_add_(1, touched.token, touched.g)

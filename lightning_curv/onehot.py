"""Terms with one-hot inputs (embeddings): every contraction without a dense one-hot matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_curv import memory
from lightning_curv.terms import ROUNDING, Term, signed


class Rows(NamedTuple):
    """Per-sample gradients of an embedding as its touched rows, each (sample, index) pair once; made to be changed."""

    g: Tensor  # [V, U, *]
    sample: Tensor  # [U]
    token: Tensor  # [U]


def rows(term: Term) -> Rows:
    """The touched rows of the per-sample gradients; repeated tokens of a sample are added up."""
    return _added(*_entries(term), term.classes)


def _entries(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of all tokens ``[V, M, *]``, a number per (sample, index) pair ``[U]``, the pair of each token."""
    term = term.canonical()
    sample, index, position = _touched(term)
    key, inverse = (index + term.classes * sample).unique(return_inverse=True)
    return _at(term.g.flatten(1, 2), position, 1), key, inverse


def _added(g: Tensor, key: Tensor, inverse: Tensor, classes: int) -> Rows:
    g = g.new_zeros(len(g), len(key), *g.shape[2:]).index_add_(1, inverse, g)
    return Rows(g, key // classes, key % classes)


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
    return products.new_zeros(len(products), term.g.shape[1]).index_add_(1, touched.sample, products)


def second_moment(term: Term, reduce: bool) -> Tensor:
    """Diagonal of the mean over samples of x xᵀ, ``[classes]``; x: the positions (expand) or their mean (reduce)."""
    term = term.canonical()
    assert term.x is not None
    sample, index, _ = _touched(term)
    samples, positions = term.x.shape
    if not reduce:
        return torch.bincount(index, minlength=term.classes).to(term.g.dtype) / (samples * positions)
    key, counts = (index + term.classes * sample).unique(return_counts=True)
    result = term.g.new_zeros(term.classes)
    return result.index_add_(0, key % term.classes, (counts / positions).square().to(result.dtype)) / samples


def per_sample(term: Term) -> Tensor:
    """``[V, N, classes, *]``, dense."""
    touched, samples = rows(term), term.g.shape[1]
    dense = memory.empty(touched.g, term.g.shape[0], samples * term.classes, *touched.g.shape[2:]).zero_()
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
    return (_scatter(touched._replace(g=deviations), term.classes)[0] + untouched * mean.square()) / samples


def squared_norms(term: Term, above: bool = False) -> Tensor:
    """Squared norms of the per-sample gradients, ``[V, N]``; ``above`` as in `grams.norms`, for repeated tokens."""
    g, key, inverse = _entries(term)
    touched = _added(g, key, inverse, term.classes)
    norms = torch.linalg.vector_norm(touched.g.flatten(2), dim=2).square_()
    if above and len(key) < len(inverse):
        tokens = torch.linalg.vector_norm(g.flatten(2), dim=2)
        sizes = torch.zeros_like(norms).index_add_(1, inverse, tokens)
        norms += ROUNDING * torch.finfo(g.dtype).eps * sizes.square_()
    return norms.new_zeros(norms.shape[0], term.g.shape[1]).index_add_(1, touched.sample, norms)


def _scatter(touched: Rows, classes: int) -> Tensor:
    result = touched.g.new_zeros(touched.g.shape[0], classes, *touched.g.shape[2:])
    return result.index_add_(1, touched.token, touched.g)

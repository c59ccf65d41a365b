"""Norms of per-sample gradients by Gram matrices of the shared positions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_curv import matmul
from lightning_curv.latest import Latest
from lightning_curv.pieces import CHUNK_BYTES, Matrices
from lightning_curv.terms import ROUNDING, Term

_GRAMS = Latest(), Latest()  # of cotangents, of inputs


def pay(term: Term) -> bool:
    """Whether Gram matrices over the shared positions are cheaper than the per-sample gradient; crossover measured."""
    m = Matrices(term)
    out, inp = m.size(m.outputs), m.size(m.inputs)
    return m.regular and m.size(m.shared) * (out + inp) <= 1.25 * out * inp


def norms(term: Term, above: bool = False) -> Tensor:
    """‖Σ_s g_s ⊗ x_s‖² = Σ_{s,t} ⟨g_s, g_t⟩ ⟨x_s, x_t⟩ per column and sample; both Gram matrices in chunks.

    Args:
        term: The term.
        above: Whether to add what rounding may take away, `ROUNDING` times (Σ_s ‖g_s‖ ‖x_s‖)²: where large positions
            cancel, that is more than the rest.
    """
    m = Matrices(term)
    assert term.x is not None
    columns = len(term.g)
    size = max(1, CHUNK_BYTES // max(1, m.size(m.shared) ** 2 * columns * m.size(m.both) * term.g.element_size()))
    found = []
    for start in range(0, term.g.shape[1], size):
        g, x = m.of(start, start + size)  # [n, q, V·o, s], [n, q, i, s]
        x = x.flatten(0, 1)
        g = g.flatten(0, 1).unflatten(1, (columns, -1))
        rest = start, size, *m.both, *m.shared
        g_gram, _ = _GRAMS[0].of(term.g, (term.out, *rest), partial(_gram, g.flatten(0, 1)))
        x_gram, _ = _GRAMS[1].of(term.x, (term.inp, *rest), partial(_gram, x))
        g_gram = g_gram.unflatten(0, (-1, columns))
        products = torch.einsum("bvst,bst->vb", g_gram, x_gram)
        if above:
            positions = g_gram.diagonal(dim1=2, dim2=3) * x_gram.diagonal(dim1=1, dim2=2)[:, None]
            products += ROUNDING * torch.finfo(x.dtype).eps * positions.sqrt().sum(2).square().mT
        found.append(products.unflatten(1, (-1, m.size(m.both))).sum(2))
    return torch.cat(found, dim=1).clamp_(min=0)


def _gram(x: Tensor) -> Tensor:
    """⟨x_s, x_t⟩ for ``x [b, i, s]``."""
    return matmul.bmm(x.mT, x)

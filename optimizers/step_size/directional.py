"""Directional derivatives of the recorded columns along several directions at once."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.terms.chunks import CHUNK_BYTES
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def directional_derivatives(jacobian: Jacobian, vectors: Tensor) -> Tensor:
    """Inner products of J[v, n] with vectors of the parameter's shape, [K, *p] → [K, V, N].

    As `Jacobian.dot`, but the inputs are read once for all vectors, and a convolution is applied as
    one.
    """
    if len(jacobian.terms) == 1 and _forming_pays(jacobian.terms[0], len(vectors)):
        flat = vectors.to(jacobian.terms[0].g.dtype).flatten(1).mT
        return torch.cat([j.flatten(2) @ flat for j in jacobian.chunks()], dim=1).movedim(2, 0)
    products = [_products(term, vectors.to(term.g.dtype)) for term in jacobian.terms]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0)


def _forming_pays(term: Term, count: int) -> bool:
    """Whether a matrix meets so many positions of every sample that its gradients per sample are cheaper."""
    if term.x is None or term.classes or len(term.g) > 1 or {*term.par} != {"o", "i"}:
        return False
    sizes = term.sizes()
    positions = math.prod(sizes[letter] for letter in term.shared)
    return positions > 1 and sizes["i"] <= count * positions


def _products(term: Term, vectors: Tensor) -> Tensor:
    if term.classes:
        return torch.stack([Jacobian(vectors[0], [term]).dot(vector) for vector in vectors])
    if (term.out, term.par, term.x) == ("o", "o", None):  # a bias
        return (term.g @ vectors.mT).movedim(2, 0)
    if term.x is None:
        sizes = term.sizes()
        vectors = vectors.reshape(-1, *(sizes[letter] for letter in term.par))
        return torch.einsum(f"vn{term.out},K{term.par}->Kvn", term.g, vectors)
    if (term.out, term.inp, term.par) == ("o", "i", "oi"):  # a linear layer: no overhead
        outputs = F.linear(term.x, vectors.flatten(0, 1)).unflatten(
            1, (len(vectors), -1)
        )  # [N, K, o]
        if len(term.g) == 1:
            return (outputs * term.g[0].unsqueeze(1)).sum(-1).T.unsqueeze(1)
        return torch.einsum("nko,vno->kvn", outputs, term.g)
    sizes = term.sizes()
    vectors = vectors.reshape(-1, *(sizes[letter] for letter in term.par))
    per_sample = len(vectors) * max(math.prod(term.g.shape[2:]), math.prod(term.x.shape[1:]))
    size = max(1, 4 * CHUNK_BYTES // max(1, per_sample * term.g.element_size()))
    parts = [
        _outputs_times_cotangents(term[i : i + size], vectors)
        for i in range(0, max(1, len(term.x)), size)
    ]
    return torch.cat(parts, dim=2)


def _outputs_times_cotangents(term: Term, vectors: Tensor) -> Tensor:
    outputs = _convolved(term, vectors)
    if outputs is None:
        outputs = torch.einsum(f"n{term.inp},K{term.par}->Kn{term.out}", term.x, vectors)
    return torch.einsum("vna,Kna->Kvn", term.g.flatten(2), outputs.flatten(2))


def _convolved(term: Term, vectors: Tensor) -> Tensor | None:
    """The op's outputs for every vector, [K, n, *out], if its inputs are a view of the input of a convolution."""
    dims = len(term.inp) // 2
    if dims not in CONVOLUTIONS or (term.inp, term.par) != (
        "i" + "xyz"[:dims] + "stu"[:dims],
        "oi" + "xyz"[:dims],
    ):
        return None
    assert term.x is not None
    kernel, positions = term.x.shape[2 : 2 + dims], term.x.shape[2 + dims :]
    n, i, *strides = term.x.stride()
    units = [math.gcd(a, b) for a, b in zip(strides[:dims], strides[dims:], strict=True)]
    if not all(units):
        return None
    dilation = [stride // unit for stride, unit in zip(strides[:dims], units, strict=True)]
    step = [stride // unit for stride, unit in zip(strides[dims:], units, strict=True)]
    size = [
        (k - 1) * d + (p - 1) * s + 1
        for k, d, p, s in zip(kernel, dilation, positions, step, strict=True)
    ]
    if math.prod(size) > math.prod(kernel) * math.prod(positions):
        return None  # a copy of the patches, not a view
    image = term.x.as_strided((*term.x.shape[:2], *size), (n, i, *units))
    outputs = CONVOLUTIONS[dims](image, vectors.flatten(0, 1), stride=step, dilation=dilation)
    return outputs.unflatten(1, (len(vectors), -1)).movedim(1, 0)

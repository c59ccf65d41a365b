"""Products with Kronecker factors of many blocks, those of equal shapes in one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import kronecker_matmul

# From this many elements on a processor gains nothing from one product, and pays for the copies.
LARGE = 2**15

Product = tuple[Sequence[Tensor], Tensor, bool]  # factors, v, batched


def kronecker_matmuls(products: Sequence[Product]) -> list[Tensor]:
    """The result of `factors.kronecker_matmul` for each, in one batched product per shape."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (factors, v, batched) in enumerate(products):
        # A large product on a CPU gains nothing from company: it is a group of its own.
        alone = i if v.device.type == "cpu" and v.numel() >= LARGE else None
        shapes = tuple(factor.shape for factor in factors)
        groups[v.shape, v.dtype, v.device, batched, shapes, alone].append(i)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = kronecker_matmul(*products[members[0]])
        else:
            together = _together([products[i] for i in members])
            results.update(zip(members, together, strict=True))
    return [results[i] for i in range(len(products))]


def _together(products: Sequence[Product]) -> list[Tensor]:
    """One batched product: each of the products, or each of their groups, is a group of it."""
    _, first, batched = products[0]
    join = torch.cat if batched else torch.stack
    factors_of_axes = zip(*(factors for factors, _, _ in products), strict=True)
    factors = [join(list(factors_of_axis)) for factors_of_axis in factors_of_axes]
    vectors = torch.stack([v for _, v, _ in products])
    result = kronecker_matmul(factors, vectors, batched=True)
    return list(result.view(len(products), *first.shape).unbind())

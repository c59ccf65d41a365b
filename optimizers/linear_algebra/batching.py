"""Products with Kronecker factors of many blocks, those of equal shapes in one."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_curv.optimizers.linear_algebra.factors import kronecker_matmul

LARGE = 2**15  # elements from which on a processor gains nothing, and pays for the copies

Product = tuple[Sequence[Tensor], Tensor, bool]  # factors, v, batched


def kronecker_matmuls(products: Sequence[Product]) -> list[Tensor]:
    """`factors.kronecker_matmul` of each, with one batched product for all of the same shapes."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (factors, v, batched) in enumerate(products):
        alone = (i,) if v.device.type == "cpu" and v.numel() >= LARGE else ()
        shapes = tuple(factor.shape for factor in factors)
        groups[v.shape, v.dtype, v.device, batched, shapes, alone].append(i)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        found = (
            [kronecker_matmul(*products[members[0]])]
            if len(members) == 1
            else _together([products[i] for i in members])
        )
        results.update(zip(members, found, strict=True))
    return [results[i] for i in range(len(products))]


def _together(products: Sequence[Product]) -> list[Tensor]:
    _, first, batched = products[0]
    join = torch.cat if batched else torch.stack
    factors = [
        join(list(same)) for same in zip(*(factors for factors, _, _ in products), strict=True)
    ]
    result = kronecker_matmul(factors, torch.stack([v for _, v, _ in products]), batched=True)
    return list(result.view(len(products), *first.shape).unbind())

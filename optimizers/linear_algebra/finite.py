"""One check of many tensors for inf and NaN."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device


def finite_flags(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each tensor is finite; a single synchronisation with the device where all are."""
    tensors = list(tensors)
    if not tensors:
        return []
    # A norm is finite only if all entries are; one kernel for all tensors.
    flags = torch.stack(on_one_device(torch._foreach_norm(tensors))).isfinite().tolist()
    # A norm may overflow where its tensor does not.
    return [
        norm_is_finite or bool(tensor.isfinite().all())
        for norm_is_finite, tensor in zip(flags, tensors, strict=True)
    ]

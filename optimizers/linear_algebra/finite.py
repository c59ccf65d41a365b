"""One check of many tensors for inf and NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device


def finite_flags(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each tensor is finite; a single synchronisation with the device where all are."""
    return flags_and_numbers([*tensors], [])[0]


def flags_and_numbers(
    tensors: Sequence[Tensor], numbers: Sequence[Tensor]
) -> tuple[list[bool], list[float]]:
    """Whether each tensor is finite, and some numbers [] beside, in one transfer from the device.

    It synchronises once more for every tensor whose norm is not finite.
    """
    if not tensors and not numbers:
        return [], []
    # A norm is finite only if all entries are; one kernel for all tensors.
    norms = torch._foreach_norm([*tensors]) if tensors else ()
    read: list[float] = torch.stack(on_one_device([*norms, *numbers])).tolist()
    # A norm may overflow where its tensor does not.
    flags = [
        math.isfinite(norm) or bool(tensor.isfinite().all())
        for norm, tensor in zip(read, tensors, strict=False)
    ]
    return flags, read[len(tensors) :]

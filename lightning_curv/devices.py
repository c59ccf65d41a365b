"""Parameters of one model on several devices, as parts of a pipeline are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def on_one_device(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Small tensors of several parameters, all on the device of the first one.

    Args:
        tensors: that are to be stacked, joined or added up.

    Cost: a copy of those that are elsewhere; nothing where all are on one device.
    """
    found = list(tensors)
    devices = {tensor.device for tensor in found}
    # To ask a tensor for its device is cheaper than to ask it for itself on that device.
    if len(devices) < 2:
        return found
    return [tensor.to(found[0].device) for tensor in found]

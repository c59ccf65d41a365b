"""Parameters that processes share among each other: FSDP2, and tensor parallelism.

Under `fully_shard` a module's parameters are `DTensor`s of which every process has a part. The ops
of a forward pass see other tensors, gathered for the while of it: these are the leaves of its
graph.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

from torch import Tensor
from torch import distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

# What FSDP knows of a gathered parameter, by that parameter; None: it belongs to no FSDP.
_known = WeakTensorKeyDictionary()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this process may have a part only."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def shard_of(gathered: Tensor) -> Any | None:
    """What FSDP2 knows of a parameter that it has gathered; None if it is no such parameter."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if gathered not in _known:
        _look([gathered])
    found = _known[gathered]
    return None if found is None else found()


def _look(parameters: Sequence[Tensor]) -> None:
    """Find parameters among those of all modules under FSDP2, once: it takes a tenth of a second.

    FSDP2 has no public way from a gathered parameter to the module.
    """
    for parameter in parameters:
        _known[parameter] = None
    for module in _modules():
        for shard in _shards(module):
            gathered = getattr(shard, "_unsharded_param", None)
            if gathered is not None:
                _known[gathered] = ref(shard)


def _modules() -> Iterator[Any]:
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    if kind is not None:
        yield from (thing for thing in gc.get_objects() if issubclass(type(thing), kind))


def _shards(module: Any) -> Iterator[Any]:
    """The parameters of one module under FSDP2, as FSDP knows them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.13 there was one
        groups = [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            yield from group.fsdp_params


def find_shards(parameters: Iterable[Tensor]) -> dict[Tensor, Any]:
    """What FSDP2 knows of those parameters that it has gathered."""
    found = {parameter: shard_of(parameter) for parameter in parameters}
    return {parameter: shard for parameter, shard in found.items() if shard is not None}

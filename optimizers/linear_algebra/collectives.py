"""Curvature of the whole batch when its samples are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from zlib import crc32

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_curv.distributed.failures import processes, together

Field = list[Tensor]


def averaged_over_ranks(fields: Sequence[Field | None], device: torch.device) -> list[Field | None]:
    """Average fields over all processes; a field that some process lacks is dropped everywhere.

    So is one that has other shapes elsewhere: processes that exchange unequal numbers wait for each
    other without end.

    Data parallelism averages gradients of each process' mean loss, so curvature averages too.
    Without it the inverses, and soon the parameters, would drift apart.

    Args:
        fields: tensors of each parameter or None, the parameters in the same order on all
            processes.
        device: where the processes can communicate.

    Returns:
        The averages; `fields` unchanged where a single process runs.

    Cost: two collectives, one of a number per parameter and one of all tensors in a flat copy.
    """
    if processes() == 1:
        return list(fields)
    # The least and the largest over the processes: what some process lacks has the code 0.
    codes = torch.tensor(list(map(_code, fields)), dtype=torch.int64, device=device)
    extremes = torch.stack([codes, -codes])
    together(dist.all_reduce, extremes, op=dist.ReduceOp.MIN)
    least = extremes[0].tolist()
    largest = (-extremes[1]).tolist()
    shared = [
        field if low == high != 0 else None
        for field, low, high in zip(fields, least, largest, strict=True)
    ]
    tensors = [tensor for field in shared for tensor in field or ()]
    if not tensors:
        return shared
    sums = iter(summed(tensors))
    world = processes()
    # In place: the sums are views of the flat copy, which nobody else has.
    return [None if field is None else [next(sums).div_(world) for _ in field] for field in shared]


def _code(field: Field | None) -> int:
    """A number for the shapes of a field, the same in all processes; 0: there is none."""
    if field is None:
        return 0
    return 1 + crc32(repr([tuple(tensor.shape) for tensor in field]).encode())


def largest_over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The largest of whole numbers over all processes, place by place.

    Args:
        numbers: of this process, as many in all.
        device: where the processes can communicate.

    Returns:
        The maxima; `numbers` unchanged where a single process runs.

    Cost: one collective of a number per place.
    """
    if processes() == 1:
        return list(numbers)
    largest = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    together(dist.all_reduce, largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of several tensors over all processes.

    Args:
        tensors: the shares of this process, not none at all; the same shapes in the same order on
            all processes. They are not changed.

    Returns:
        The sums, in the shapes of the tensors, on the device of the first one; all of them in
        float64 if one of the tensors is, else in float32. They are views of one flat tensor.

    Cost: one collective of a flat copy.
    """
    device = tensors[0].device
    wide = wide_dtype(tensor.dtype for tensor in tensors)
    flat = torch.cat([tensor.detach().to(device, wide).flatten() for tensor in tensors])
    together(dist.all_reduce, flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def wide_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype in which processes exchange tensors: float64 if one of them is, else float32."""
    if torch.float64 in set(dtypes):
        return torch.float64
    return torch.float32


def averaged(tensor: Tensor) -> Tensor:
    """The mean of a small tensor over all processes."""
    if processes() > 1:
        together(dist.all_reduce, tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


def from_process_0(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of process 0, in all processes.

    Args:
        tensor: of this process, of the shape and type that it has in all.
        device: where the processes can communicate, and the copy is.
    """
    sent = tensor.to(device, copy=True)
    if processes() > 1:
        together(dist.broadcast, sent, src=0)
    return sent

"""Curvature of the whole batch when its samples are spread over processes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

Field = list[Tensor]


def averaged_over_ranks(fields: Sequence[Field | None], device: torch.device) -> list[Field | None]:
    """Average fields over all processes; a field that some process lacks is dropped everywhere.

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
    # A minimum over the processes: what some process lacks is absent.
    is_here = [field is not None for field in fields]
    present = torch.tensor(is_here, dtype=torch.int32, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MIN)
    shared = [
        field if everywhere else None
        for field, everywhere in zip(fields, present.tolist(), strict=True)
    ]
    tensors = [tensor for field in shared for tensor in field or ()]
    if not tensors:
        return shared
    sums = iter(summed(tensors))
    world = processes()
    # In place: the sums are views of the flat copy, which nobody else has.
    return [None if field is None else [next(sums).div_(world) for _ in field] for field in shared]


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
    device, wide = tensors[0].device, wide_dtype(tensor.dtype for tensor in tensors)
    flat = torch.cat([tensor.detach().to(device, wide).flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def wide_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype in which processes exchange tensors: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in set(dtypes) else torch.float32


def processes() -> int:
    """The number of processes that share the batch; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def averaged(tensor: Tensor) -> Tensor:
    """The mean of a small tensor over all processes."""
    if processes() > 1:
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor

"""What the batch of a training step says of its samples: their number, and the tensors of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from lightning_curv.samples.batch import Batch

BatchSize = Callable[[Any], int] | int | None
_VALUES = (Number, str, bytes, type(None), torch.dtype, torch.device)
_NO_DATA = (
    torch.Size,
    torch.Generator,
    nn.Module,
    ReferenceType,
    type,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
)


def describe_batch(batch: Any, size: BatchSize = None) -> Batch:
    """What is known of a batch.

    Args:
        batch: what `training_step` gets, before it runs.
        size: the number of samples or a function of the batch; `None`: the one that Lightning
            extracts, the leading size of the first tensor. Where tensors have several, it is not
            known.

    Returns:
        Its tensors are left out if it also holds data of other kinds, such as texts or arrays.

    Raises:
        ValueError: `size` is a function, but the batch is an iterator over batches; or it gives no
            number.
    """
    # To look at batches of a `dataloader_iter` is to take them away from the step.
    if isinstance(batch, Iterator):
        if callable(size):
            raise ValueError(
                "`batch_size` must be a number where `training_step` takes a `dataloader_iter`, "
                "found a function."
            )
        return Batch(size)
    tensors: list[Tensor] = []
    complete = _collect(batch, tensors, {})
    # With other data there, a tensor of the step need not come from one of these: nothing follows.
    known = tensors if tensors and complete else None
    if size is not None:
        return Batch(_number(size(batch)) if callable(size) else size, tensors=known)
    # Several leading sizes say nothing: sequences first, ragged parts, tables beside samples.
    sizes = {len(tensor) for tensor in tensors if tensor.ndim}
    return Batch(expected=sizes.pop() if len(sizes) == 1 else None, tensors=known)


class Contents:
    """The tensors of a batch as they are now.

    Args:
        batch: Any batch.
    """

    def __init__(self, batch: Any) -> None:
        tensors: list[Tensor] = []
        _collect(batch, tensors, {})
        self._tensors = [(tensor, _version(tensor)) for tensor in tensors]

    def are(self, other: Contents) -> bool:
        """Whether the others are the same tensors, and none was written to in between.

        Writes that torch does not count, through `.data`, are not seen.
        """
        return len(self._tensors) == len(other._tensors) and all(
            mine is theirs and version == now
            for (mine, version), (theirs, now) in zip(self._tensors, other._tensors, strict=True)
        )


def _version(tensor: Tensor) -> int:
    # Tensors of inference mode count no versions; asking for one is an error.
    return -1 if tensor.is_inference() else tensor._version


def _number(size: Any) -> int:
    if isinstance(size, Tensor) and size.numel() == 1:
        size = size.item()
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(
            f"`batch_size` must give the number of samples in a batch, found {size!r}."
        )
    return size


def _collect(value: Any, tensors: list[Tensor], seen: dict[int, Any]) -> bool:
    """Collect the tensors below a value; false if tensors may be made of other data in it."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            tensors.append(value)
            seen[id(value)] = value
        return True
    if id(value) in seen or isinstance(value, (*_VALUES, *_NO_DATA)):
        return True
    # Held, as the id of an object that is gone may be that of another one.
    seen[id(value)] = value
    entries = _entries(value)
    if entries is None:
        return False
    # A list, for `all` would stop at the first that is incomplete and miss the tensors behind it.
    return False not in [_collect(entry, tensors, seen) for entry in entries]


def _entries(value: Any) -> list[Any] | None:
    """What a collection or an object consists of.

    `None`: data of another kind, one value per sample for instance.
    """
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        entries = list(value)
        # Texts or labels, one per sample: the step may make tensors of them.
        if len(entries) > 1 and all(isinstance(entry, _VALUES) for entry in entries):
            return None
        return entries
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if hasattr(value, "__dict__"):
        return list(vars(value).values())
    return None

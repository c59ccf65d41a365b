"""Provenance of tensors without gradient: what came from outside, and what was made from nothing.

A table of relative positions or a mask made by `torch.arange` is the same for every sample; a
batch of inputs is not, and the graph cannot tell them apart, for it ends where gradients end. So
recording notes for every tensor without gradient which tensors from outside of the recorded code it
was computed from: its *roots*. No roots: a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch

Numbers = Mapping[
    int, Tensor
]  # see `row_numbers`: for every size that rows were counted in, their numbers


# One is made at nearly every call that reads the batch: a frozen one takes five times as long.
@dataclass(slots=True, unsafe_hash=True)
class Root:
    """A tensor from outside, which is not kept alive. Nobody changes it.

    Attributes:
        shape: Its shape.
        stride: Its strides; none where the layout of its memory has none.
        pointer: Where its memory is; 0: unknown.
        offset: Where it begins there.
        whole: The tensor that its rows were drawn from, a data set perhaps.
        made: Whether recorded code made it of numbers of Python's or numpy's.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    pointer: int
    offset: int = 0
    whole: Root | None = None
    made: bool = False

    @classmethod
    def of(cls, tensor: Tensor, whole: Root | None = None) -> Root:
        """The root that a tensor is."""
        if tensor.is_nested:  # of its axes only the first is sure to have a size
            return cls((tensor.size(0),), (), 0, 0, whole)
        shape = tuple(tensor.shape)
        # Sparse, or packed for a library: its memory is not of one piece.
        if tensor.layout is not torch.strided:
            return cls(shape, (), 0, 0, whole)
        try:  # this is `pointer_of`
            pointer = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):
            pointer = 0
        return cls(shape, tensor.stride(), pointer, int(tensor.storage_offset()), whole)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def pointer_of(tensor: Tensor) -> int:
    """Where the memory of a tensor is; 0: it has none of its own, as under `vmap`."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


@dataclass(slots=True, unsafe_hash=True)
class Roots:
    """What a tensor was computed from. Nobody changes it.

    Attributes:
        tensors: Tensors without gradient that came from outside of the recorded code, each once.
        data: Whether it was also computed from values of the network that depend on data
            (`h.detach()`).
        routed: Whether the rows of the leading axis of some root may be in another order, or some
            missing.
        numbers: Which rows they are, where something looked at them, empty ones if it is not known;
            `None`: in order.
        pooled: The numbers of rows that were taken together, as by a mean over the batch.
    """

    tensors: tuple[Root, ...] = ()
    data: bool = False
    routed: bool = False
    numbers: Numbers | None = field(default=None, compare=False)
    pooled: frozenset[int] = frozenset()

    @property
    def constant(self) -> bool:
        """Whether it depends on nothing from outside."""
        return not self.tensors and not self.data

    @property
    def moved(self) -> Roots:
        """The same for a tensor that has the rows in another order."""
        if self.routed or not self.tensors:
            return self
        return replace(self, routed=True)

    def __or__(self, other: Roots) -> Roots:
        if other is self or other.constant:
            return self
        if self.constant:
            return other
        tensors = tuple(dict.fromkeys(self.tensors + other.tensors))
        pooled = self.pooled | other.pooled
        return Roots(tensors, self.data or other.data, self.routed or other.routed, pooled=pooled)


CONSTANT = Roots()
DATA = Roots(data=True)


class _Noted(ref[Tensor]):
    """A tensor that is not kept alive, and its roots."""

    __slots__ = ("place", "roots")
    place: int
    roots: Roots


# Roots of tensors without gradient that recorded code has made, by the `id` of the tensor: tensors
# compare by their entries, and `WeakTensorKeyDictionary` takes longer than most ops to look one up.
_KNOWN: dict[int, _Noted] = {}


def _forget(noted: _Noted, known: dict[int, _Noted] = _KNOWN) -> None:
    """The tensor is gone: its place may soon be that of another one."""
    if known.get(noted.place) is noted:
        del known[noted.place]


def roots_of(tensor: Tensor) -> Roots:
    """The roots of a tensor without gradient: itself, unless recorded code has made it."""
    if functorch.is_functorch_wrapped_tensor(tensor):
        tensor = physical(tensor)
    noted = _KNOWN.get(id(tensor))
    if noted is not None and noted() is tensor:
        return noted.roots
    return Roots((Root.of(tensor),))


def note(tensor: Tensor, roots: Roots) -> None:
    """Remember the roots of a tensor."""
    if functorch.is_functorch_wrapped_tensor(tensor):
        tensor = physical(tensor)
    noted = _Noted(tensor, _forget)
    noted.place = id(tensor)
    noted.roots = roots
    _KNOWN[noted.place] = noted


def shapes(roots: Roots) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors that something was computed from."""
    # As a rule it is one, or none.
    if len(roots.tensors) == 1:
        return (roots.tensors[0].shape,)
    return tuple([root.shape for root in roots.tensors])


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter; the check of `isinstance` is slow where it is none."""
    kind = type(tensor)
    return kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter))


def physical(tensor: Tensor) -> Tensor:
    """The tensor, or what is behind it under transforms as `vmap`, with all axes."""
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def transforming() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return functorch.maybe_current_level() is not None


def mapped(tensor: Tensor) -> list[int]:
    """The axes that `vmap` maps over, of what is behind a tensor, the outermost first."""
    axes: list[int] = []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            axes.insert(0, functorch.maybe_get_bdim(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return axes


def united(found: Iterable[Roots]) -> Roots:
    """The roots of a value that was computed from several tensors."""
    result = CONSTANT
    for roots in found:
        if roots is not CONSTANT:
            result = result | roots
    return result


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments or results of a call."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found

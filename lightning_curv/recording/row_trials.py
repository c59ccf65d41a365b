"""Rows of what a function makes, found by trial: which entries change with which rows of the batch?

Most functions that a raw batch passes through are known to `row_numbers`. Any other is called
again, on a batch in which the rows are others whose number has a certain bit, and on one in which
all the rest are: an entry that changes in one of the two belongs to those rows, one that changes in
both to rows of several samples. All bits together spell the number, by 2 log₂ N calls; for calls of
one kind, as their arguments' shapes and options tell, that is done once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_curv.recording.provenance import Numbers, tensors_in, transforming

Known = Sequence[tuple[Tensor, Numbers]]
# Per result: numbers of rows; sizes whose rows were taken together.
Tried = list[tuple[Numbers, frozenset[int]]]

LARGEST = 2**25  # entries that are read: a function of more is not tried
KEPT = 256  # kinds of calls whose answers are remembered
_FOUND: OrderedDict[Hashable, Tried] = OrderedDict()


def tried(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
    known: Known,
) -> Tried:
    """The numbers of the rows of the results of a call, and sizes whose rows were taken together.

    Args:
        func: The function; one that changes an argument in place is applied to copies.
        args: Its arguments.
        kwargs: Its arguments by name.
        results: What the call returned.
        known: The tensors among the arguments that came from outside, and the numbers of their
            rows.
    """
    all_sizes = {size for _, numbers in known for size in numbers if size > 1}
    # What reads a single row makes rows of that sample, whatever it does.
    single_rows: dict[int, Tensor] = {}
    for size in all_sizes:
        number = _only_row(size, known)
        if number is not None:
            single_rows[size] = number
    untried: Tried = []
    for result in results:
        ones = [1] * result.ndim
        of_result = {size: number.reshape(ones) for size, number in single_rows.items()}
        untried.append((of_result, frozenset()))
    sizes = all_sizes - {*single_rows}
    if not sizes or not _of_torch(func) or transforming():
        return untried
    entries = sum(map(Tensor.numel, tensors_in([*args, *kwargs.values()])))
    if entries > LARGEST:
        return untried
    # By shapes and options: what a call does with the rows of one batch it does with those of all.
    key = _key(func, args, kwargs, known)
    if key is not None and key in _FOUND:
        return _FOUND[key]
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            found = _tried(func, args, kwargs, results, known, sizes)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return untried  # what the function accepts depends on the values
    if found is None:
        return untried
    for i, (numbers, together) in enumerate(found):
        by_single_rows, _ = untried[i]
        found[i] = ({**by_single_rows, **numbers}, together)
    if key is not None:
        _FOUND[key] = found
        if len(_FOUND) > KEPT:
            _FOUND.popitem(last=False)
    return found


def _of_torch(func: Callable[..., Any]) -> bool:
    """Whether a function is torch's own, so that to call it once more does nothing else."""
    # Custom ops may have side effects: they are not called once more.
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    return not isinstance(func, FunctionType) or func.__module__.startswith("torch.")


def _tried(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
    known: Known,
    sizes: set[int],
) -> Tried | None:
    """`None`: the function makes something else every time."""
    # The generators that a function may draw from are put back after every call.
    devices = list({tensor.device for tensor, _ in known if tensor.is_cuda})

    def call(others: Mapping[int, Tensor]) -> list[Tensor]:
        replaced = [_replaced(value, others) for value in args]
        named = {name: _replaced(value, others) for name, value in kwargs.items()}
        with torch.random.fork_rng(devices):  # the same random numbers every time
            return tensors_in([func(*replaced, **named)])

    plain = call({})
    if not _same(plain, call({})):
        return None
    found: Tried = [({}, frozenset()) for _ in results]
    for size in sizes:
        # Per bit: which entries change with the rows that have it, and with those that do not.
        halves = []
        for bit in range((size - 1).bit_length()):
            pair = []
            for side in (True, False):
                others = {}
                for tensor, numbers in known:
                    if size in numbers:
                        has_bit = (numbers[size].long() >> bit & 1) == int(side)
                        others[id(tensor)] = _others(tensor, has_bit)
                changed = zip(plain, call(others), strict=True)
                pair.append([_changed(before, after) for before, after in changed])
            halves.append(pair)
        for i, (numbers, together) in enumerate(found):
            bits = []
            for ones, zeros in halves:
                one = ones[i]
                zero = zeros[i]
                # Another shape, or an entry that changes with both halves: it is of several rows.
                if one is None or zero is None or bool((one & zero).any()):
                    break
                bits.append((one, zero))
            if len(bits) < len(halves):
                found[i] = numbers, together | {size}
                continue
            rows = _spelled(bits, size)
            if rows is not None:
                found[i] = {**numbers, size: rows}, together
    return found


def _only_row(size: int, known: Known) -> Tensor | None:
    """The number of the row that is read, if it is one."""
    numbers = [of_tensor[size].flatten() for _, of_tensor in known if size in of_tensor]
    first = numbers[0][:1]
    if all(len(one) == 1 and torch.equal(one, first) for one in numbers):
        return first
    return None


def _spelled(bits: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor | None:
    """The number of every entry, bit by bit.

    `None`: it cannot be told. Entries that nothing changes belong to the rows that they lie in.

    Args:
        bits: Whether it changes with the rows that have a bit, and with those that do not.
        size: The number of rows.
    """
    told = torch.stack([one | zero for one, zero in bits]).all(0)
    powers = [one.int() << bit for bit, (one, _) in enumerate(bits)]
    number = torch.stack(powers).sum(0, dtype=torch.int32)
    if not bool(told.any()):
        return None
    if number.ndim and len(number) == size:
        in_order = torch.arange(size, dtype=torch.int32, device=number.device)
        rows = in_order.reshape(-1, *[1] * (number.ndim - 1))
        agrees = (number == rows) | ~told
        if bool(agrees.all()):
            return rows
    if bool(told.all()):
        return narrowed(number)
    return None


def narrowed(numbers: Tensor) -> Tensor:
    """Numbers without the axes along which they do not change: these are of size 1."""
    for axis in range(numbers.ndim):
        if numbers.shape[axis] > 1:
            first = numbers.narrow(axis, 0, 1)
            if not numbers.stride(axis) or bool((numbers == first).all()):
                numbers = first
    return numbers.contiguous()


def _others(tensor: Tensor, rows: Tensor) -> Tensor:
    """A tensor with other numbers in some rows; for integers those of a neighbour."""
    if tensor.is_floating_point() or tensor.is_complex():
        # Positive numbers in the opposite order: logarithms stay finite, and a sort, or a maximum,
        # comes out differently.
        size = tensor.abs().nan_to_num(0, 0, 0).amax()
        other = 1.37 * size - 0.91 * tensor
    else:
        # Integers may be indices: only those that are there are known to be in range.
        axes_of_rows = [axis for axis, count in enumerate(rows.shape) if count > 1]
        axis_of_rows = axes_of_rows[0] if axes_of_rows else 0
        other = tensor.roll(1, axis_of_rows + tensor.ndim - rows.ndim)
    return torch.where(rows, other, tensor)


def _changed(plain: Tensor, other: Tensor) -> Tensor | None:
    """Which entries differ by more than the last digits; `None`: the shapes do."""
    if plain.shape != other.shape:
        return None
    # Integers have no last digits.
    if not plain.dtype.is_floating_point and not plain.dtype.is_complex:
        return plain != other
    return ~torch.isclose(
        plain,
        other,
        rtol=8 * torch.finfo(plain.dtype).eps,
        atol=0,
        equal_nan=True,
    )


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    for first, second in zip(one, other, strict=True):
        changed = _changed(first, second)
        if changed is None or bool(changed.any()):
            return False
    return True


def _replaced(value: Any, others: Mapping[int, Tensor]) -> Any:
    """An argument with some tensors replaced, and copies of all the others."""
    if isinstance(value, Tensor):
        if id(value) in others:
            return others[id(value)].clone()
        return value.clone()
    if isinstance(value, (list, tuple)) and tensors_in(value):
        return type(value)(_replaced(part, others) for part in value)
    return value


def _key(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Known,
) -> tuple[Hashable, ...] | None:
    """What calls must have in common to treat rows alike.

    `None`: it depends on values, as on numbers of rows.
    """
    if any(not tensor.is_floating_point() for tensor in tensors_in([*args, *kwargs.values()])):
        return None
    from lightning_curv.recording.row_numbers import fingerprint

    rows = tuple(fingerprint(numbers) for _, numbers in known)
    try:
        key = (func, rows, *_kinds(args), *kwargs, *_kinds(list(kwargs.values())))
        hash(key)
    except TypeError:
        return None
    return key


def _kinds(values: Sequence[Any]) -> Iterator[Hashable]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.shape, value.dtype, value.device
        elif isinstance(value, (list, tuple)):
            yield (len(value), *_kinds(value))
        else:
            yield value

"""Notes: what tensors without gradient were computed from, and which rows they have, call by call.

Most calls are the same in every step. What the rows of a result are depends, where the rows of the
only tensor that is read are in their order, on shapes and options alone: it is decided once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from lightning_curv.recording.provenance import CONSTANT as CONSTANT_ROOTS
from lightning_curv.recording.provenance import (
    Numbers,
    Root,
    Roots,
    mapped,
    note,
    physical,
    roots_of,
    shapes,
    tensors_in,
    united,
)
from lightning_curv.recording.records import Mapped, all_roots, edge_of, like, mark_at
from lightning_curv.recording.row_numbers import (
    ELEMENTWISE,
    FILLING,
    LIKE,
    PRODUCTS,
    REDUCING,
    ROUTING,
    SCANNING,
    LastingNumbers,
    Rows,
    counted,
    fingerprint,
    follow,
    in_order,
    mapped_rows,
    name_of,
    numbers_of,
    ordered,
    plainly_in_order,
)

# Functions whose results are no function of their arguments.
_RANDOM = """
    bernoulli exponential multinomial normal poisson rand rand_like randint randint_like randn
    randn_like randperm uniform
"""
RANDOM = frozenset(_RANDOM.split())
# Functions that make tensors of something else.
MAKING = frozenset(("as_tensor", "asarray", "from_numpy", "frombuffer", "tensor"))
# Functions that fill up what is nested.
PADDING = frozenset(("nested_to_padded_tensor", "to_padded_tensor"))
# Functions that cut a tensor into several.
PIECES = frozenset(("chunk", "split", "split_with_sizes", "tensor_split"))
# Functions of which `follow` knows what they do with rows, without a look at values.
_BY_SHAPE = ELEMENTWISE | ROUTING | REDUCING | SCANNING | PRODUCTS


def note_roots(
    func: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    results: list[Tensor],
    tensors: list[Tensor],
) -> None:
    """Note what tensors without gradient were computed from; random numbers come from outside.

    Args:
        func: The function that was called.
        args: Its arguments.
        kwargs: Its arguments by name.
        results: What it returned.
        tensors: The tensors among its arguments.
    """
    name = name_of(func)
    # Without a note a tensor counts as one from outside, which is what random numbers are.
    if name in RANDOM:
        return
    # Made of numbers alone, such as `zeros`: the same whatever the batch is.
    if not tensors and name not in MAKING:
        for out in results:
            note(out, CONSTANT_ROOTS)
        return
    # With one tensor there is one order of rows: what becomes of them can be remembered.
    kind = None
    if name in _BY_SHAPE and len(tensors) == 1 and not tensors[0].requires_grad:
        only = roots_of(tensors[0])
        kind = _kind(func, args, kwargs, tensors[0], only, results)
        if kind is not None and (remembered := _TOLD.get(kind)) is not None:
            of_kind, draws = remembered
            return _note_told(results, only, of_kind, only.tensors[0] if draws else None)
    first = results[0]
    if functorch.is_functorch_wrapped_tensor(first) and physical(first).requires_grad:
        return _mark_mapped(func, args, results, tensors)
    # What is looked at for its type only, or not used at all, is not what a result comes from.
    if name in LIKE:
        args = args[:1]
        tensors = tensors_in([*args, *kwargs.values()])
    elif name == "where":
        args = _without_unused(args)
        tensors = tensors_in([*args, *kwargs.values()])
    inplace = any(tensor is first for tensor in tensors)
    if inplace and not _changes(func, kwargs):
        return  # an argument as it is
    # Of Python's numbers nobody knows whether they are of the batch.
    if name in MAKING and not tensors:
        made = replace(Root.of(first), made=True)
        note(first, Roots((made,)))
        return
    known = [all_roots(tensor) for tensor in tensors]
    roots = _roots_of_call(name, args, known)
    if any(tensor.is_nested for tensor in (*tensors, *results)):
        for out in results:
            keeps_order = out.is_nested or name in PADDING
            note(out, roots if keeps_order else replace(roots.moved, numbers={}))
        return
    # Where nobody has moved rows yet, and this function does not either, nothing has to be
    # followed.
    explicit = any(one.numbers is not None for one in known)
    if not roots.tensors or (not explicit and plainly_in_order(func, tensors, results)):
        for out in results:
            note(out, roots)
        _remember(kind, (), draws=False)
        return
    told: Sequence[_Told] = _followed(
        func, args, kwargs, results, tensors, roots, first if inplace else None
    )
    # Rows that ended where they would be counted anyway need no numbers of their own.
    drawn = _drawn_from(func, args, kwargs)
    plain = drawn is None and not explicit
    if plain and all(map(partial(_counted_anyway, roots=roots), told, results)):
        told = ()
    _remember(kind, told, drawn is not None)
    decided = any(tensor.requires_grad for tensor in tensors)
    _note_told(results, roots, told, drawn, decided)


def _roots_of_call(name: str, args: Any, known: list[Roots]) -> Roots:
    """What the results of a call come from, given what its arguments do."""
    if name in FILLING:
        return CONSTANT_ROOTS
    roots = united(known)
    # Indices that come from statistics say where something is: they are no part of what is there.
    if roots.pooled and name in ROUTING:
        of_first = united(map(all_roots, tensors_in(args[:1])))
        return replace(roots, pooled=of_first.pooled)
    return roots


def _followed(
    func: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    results: list[Tensor],
    tensors: list[Tensor],
    roots: Roots,
    written: Tensor | None,
) -> list[_Told]:
    """Which rows the results have, found by following them through the call.

    Args:
        func: The function that was called.
        args: Its arguments.
        kwargs: Its arguments by name.
        results: What it returned.
        tensors: The tensors among its arguments.
        roots: What the results were computed from.
        written: The argument that was written into in place, if one was.
    """
    # Sums of integers are lengths and positions, no statistics of what is in the rows.
    counts = not any(tensor.is_floating_point() for tensor in tensors)
    # What is written into a view is in the whole tensor too.
    view = None if written is None else written._base
    before = None if view is None or written is None else numbers_of(written)
    told = []
    for out, rows in zip(results, follow(func, args, kwargs, results), strict=True):
        pooled = frozenset() if counts else rows.pooled
        numbers = LastingNumbers({k: physical(found) for k, found in rows.numbers.items()})
        if view is not None and before is not None:
            _note_whole(view, before, rows, replace(roots, pooled=roots.pooled | pooled))
        told.append(_Told(numbers, pooled, ordered(numbers, physical(out), roots)))
    return told


class _Told(NamedTuple):
    """What a call makes of rows: which ones they are, of which sizes some were taken together."""

    numbers: Numbers
    pooled: frozenset[int]
    in_order: bool


def _counted_anyway(told: _Told, result: Tensor, roots: Roots) -> bool:
    """Whether a result has its rows where they would be counted if nothing had moved them."""
    if not told.in_order or told.pooled:
        return False
    plain = in_order(physical(result), roots)
    return told.numbers.keys() == plain.keys() and all(
        torch.equal(told.numbers[size], numbers) for size, numbers in plain.items()
    )


# By the kind of a call, and whether it draws (see `_drawn_from`); nothing told: rows are where they
# were.
_TOLD: dict[Hashable, tuple[Sequence[_Told], bool]] = {}
_MOST = 256  # kinds that are kept
_SMALL = 2**16  # numbers up to which they are kept


def _remember(kind: Hashable, told: Sequence[_Told], draws: bool) -> None:
    """Remember what calls of a kind make of rows; `None`: it depends on more than that."""
    if kind is None:
        return
    numbers = [of_size for of_result in told for of_size in of_result.numbers.values()]
    # Under some modes they are tensors of other kinds, which serve only there.
    lasting = all(type(of_size) is Tensor for of_size in numbers)
    if not lasting or sum(map(Tensor.numel, numbers)) > _SMALL:
        return
    if len(_TOLD) >= _MOST:
        _TOLD.clear()
    _TOLD[kind] = told, draws


def _note_told(
    results: Sequence[Tensor],
    roots: Roots,
    told: Sequence[_Told],
    drawn: Root | None,
    decided: bool = False,
) -> None:
    """Note what was told of the rows of results.

    Args:
        results: The results.
        roots: What they were computed from.
        told: What was told of each; nothing: rows are where they were.
        drawn: The tensor that their rows were drawn from, see `_drawn_from`.
        decided: Whether the network's own values decide which rows they are.
    """
    if not told:
        for out in results:
            note(out, roots)
        return
    for out, (numbers, pooled, keeps_order) in zip(results, told, strict=True):
        tensors = roots.tensors
        routed = roots.routed or not keeps_order
        if drawn is not None:
            # They may be the batch, whose rows are counted anew.
            others = [root for root in tensors if root != drawn]
            tensors = (Root.of(out, drawn), *others)
            routed = False
            if out.ndim:
                numbers = {len(out): counted(len(out), out), **numbers}
        # What the network's own values decide, the entry of a codebook, is nothing that was moved:
        # weights tell whose rows read it.
        found = None if decided and not numbers else numbers
        note(out, Roots(tensors, roots.data, routed, found, roots.pooled | pooled))


# What options may be for calls to be told apart by them.
_OPTIONS = frozenset(
    (type(None), bool, int, float, str, torch.device, torch.dtype, torch.memory_format)
)


def _kind(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
    roots: Roots,
    results: Sequence[Tensor],
) -> Hashable:
    """What decides which rows the results of a call have that reads rows in their order.

    `None`: it depends on more.
    """
    if not args or args[0] is not tensor or results[0] is tensor:
        return None
    if roots.numbers is not None or not roots.tensors:
        return None
    if tensor.is_nested or tensor.layout is not torch.strided:
        return None
    if functorch.is_functorch_wrapped_tensor(tensor):
        return None
    options = _options((*args[1:], *kwargs, *kwargs.values()) if kwargs else args[1:])
    if options is None:
        return None
    return (
        func,
        options,
        type(tensor),
        tensor.shape,
        tensor.dtype,
        tensor.device,
        torch.is_inference_mode_enabled(),
        roots.data,
        roots.routed,
        shapes(roots),
        results[0].shape,
        len(results),
    )


def _options(values: Iterable[Any]) -> Hashable:
    """Options with their types, for 1 == True, which is another index; `None`: others may be."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _OPTIONS:
            found += (kind, value)
            continue
        if kind is slice:
            inner = _options((value.start, value.stop, value.step))
        elif isinstance(value, (tuple, list)):
            inner = _options(value)
        else:
            return None
        if inner is None:
            return None
        found += (kind, inner)
    return tuple(found)


def _without_unused(args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of `torch.where` less an alternative with pooled rows that is never taken.

    So a statistic of the batch that stands in for missing values is none of the others' business
    where none is missing.
    """
    alternatives = [value for value in args[1:] if isinstance(value, Tensor)]
    if len(args) != 3 or not any(all_roots(value).pooled for value in alternatives):
        return args
    shapes = [value.shape for value in (args[0], *alternatives)]
    first_taken = args[0].expand(torch.broadcast_shapes(*shapes))
    if bool(first_taken.all()):
        return args[:2]
    if bool(first_taken.any()):
        return args
    return (args[0], args[2])


def _mark_mapped(
    func: Callable[..., Any],
    args: Sequence[Any],
    results: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> None:
    """Leave at a node that `vmap` hides what the op reads of the batch."""
    whole = physical(results[0])
    read = [tensor for tensor in tensors if not physical(tensor).requires_grad]
    roots = united(map(roots_of, read))
    if whole.grad_fn is None or not roots.tensors or not mapped(results[0]):
        return
    name = name_of(func)
    rows = mapped_rows(name, args, read, results[0])
    with_rows = replace(roots, numbers=rows.numbers, pooled=roots.pooled | rows.pooled)
    mark_at(whole.grad_fn).mapped = Mapped(name, with_rows, edge_of(whole), like(whole))


def _changes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function that returns one of its arguments has changed it."""
    name = getattr(func, "__name__", "")
    return (
        "out" in kwargs
        or name.startswith(("__i", "__set"))
        or (name.endswith("_") and not name.endswith("__"))
    )


def _note_whole(whole: Tensor, before: Numbers, rows: Rows, roots: Roots) -> None:
    """Note what the tensor behind a view was computed from, after the view was changed in place."""
    known = all_roots(whole)
    both = replace(known | roots, numbers=known.numbers)
    # Rows have moved inside of the view: those of the whole are not known any more.
    if fingerprint(before) != fingerprint(rows.numbers):
        both = replace(both.moved, numbers={})
    note(whole, both)


def _drawn_from(
    func: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
) -> Root | None:
    """The tensor that a call takes some rows of: a batch out of a data set, a piece of a batch."""
    if not _draws(func, args, kwargs):
        return None
    roots = all_roots(args[0])
    single = len(roots.tensors) == 1 and not roots.data and not roots.routed
    if single and roots.tensors[0].ndim:
        return roots.tensors[0]
    return None


def _draws(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call takes some rows of a tensor: a slice, a list of numbers, or a piece."""
    if func is not Tensor.__getitem__:
        by_position = args[2] if len(args) > 2 else 0
        return name_of(func) in PIECES and bool(kwargs.get("dim", by_position) == 0)
    if isinstance(args[1], tuple):
        return False
    index = args[1]
    if isinstance(index, Tensor):
        return index.ndim == 1 and not index.requires_grad
    if isinstance(index, slice):
        return index != slice(None)
    return isinstance(index, list)

"""Numbers of rows: which row of the batch every entry of a tensor without gradient came from.

A batch is often masked, permuted, cut or stacked before it meets the first parameter, and the graph
begins only there. So whenever recorded code moves the rows of such a tensor, the same call is
applied to their numbers. Numbers belong to a size: that of the tensor which the rows were counted
in. A piece `x[4:8]` of a batch of 16 rows has two meanings, rows 0 to 3 of a batch of 4 and rows
4 to 7 of one of 16, and the number of samples says which one is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import starmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_curv.recording.provenance import (
    Numbers,
    Roots,
    is_parameter,
    mapped,
    physical,
    roots_of,
    tensors_in,
)
from lightning_curv.recording.row_trials import narrowed, tried

# Functions whose result has at every place what they make of the entries there.
_ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul alpha_dropout and angle asin asinh atan atan2 atanh
    bernoulli bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool bucketize byte ceil celu
    char clamp clamp_max clamp_min clip clone complex conj copysign cos cosh cpu cuda deg2rad
    digamma div divide double dropout elu eq erf erfc erfinv exp exp2 expm1 feature_dropout float
    floor floor_divide floordiv fmax fmin fmod frac ge gelu greater greater_equal gt half
    hardsigmoid hardswish hardtanh heaviside hypot iadd imag imul int invert isfinite isinf isnan
    isub ixor le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logical_and
    logical_not logical_or logical_xor logit logsigmoid long lshift lt masked_fill maximum minimum
    mish mod mul multiply nan_to_num ne neg negative nextafter or positive pow quantize_per_tensor
    rad2deg radd rdiv real reciprocal relu relu6 remainder ror round rpow rrelu rshift rsqrt rsub
    rtruediv rxor selu sgn short sigmoid sign signbit silu sin sinc sinh softplus softshrink
    softsign sqrt square sub subtract tan tanh tanhshrink threshold to to_dense to_mkldnn to_sparse
    to_sparse_csc to_sparse_csr true_divide truediv trunc type type_as where xlogy xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
# Functions whose result has in every row of the leading axis what they make of that row.
_BY_ROW = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear bmm conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding embedding_bag group_norm
    instance_norm interpolate layer_norm linear local_response_norm matmul max_pool1d max_pool2d
    max_pool3d mm one_hot pad pixel_shuffle pixel_unshuffle rms_norm scaled_dot_product_attention
    tril triu upsample
"""
BY_ROW = frozenset(_BY_ROW.split())
LIKE = frozenset(("to", "type", "type_as"))  # functions that look at the type of other arguments
FILLING = frozenset(
    (
        "empty_like",
        "full_like",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "zeros_like",
    )
)
# Functions that only move, repeat or leave out entries of their first argument, or of the tensors
# in it.
_ROUTING = """
    broadcast_to cat chunk column_stack concat concatenate contiguous detach diagonal dsplit expand
    expand_as flatten flip fliplr flipud gather get getitem hsplit hstack index_select masked_select
    moveaxis movedim mT narrow pack_padded_sequence permute ravel repeat repeat_interleave reshape
    reshape_as roll rot90 select split split_with_sizes squeeze stack swapaxes swapdims T t take
    take_along_dim tensor_split tile transpose unbind unflatten unsqueeze view view_as vsplit vstack
"""
ROUTING = frozenset(_ROUTING.split())
# Functions that take the entries along some axes together …
_REDUCING = """
    all amax amin aminmax any argmax argmin count_nonzero logsumexp max mean median min mode nanmean
    nanmedian nansum norm prod quantile std std_mean sum var var_mean
"""
REDUCING = frozenset(_REDUCING.split())
# … and functions that do so and keep the axes.
_SCANNING = """
    argsort cummax cummin cumprod cumsum log_softmax logcumsumexp softmax softmin sort
"""
SCANNING = frozenset(_SCANNING.split())
PRODUCTS = frozenset(("bmm", "matmul", "mm", "mv", "smm", "sparse_mm", "spmm"))
MEETING = PRODUCTS | {"batch_norm"}  # by row only where no rows meet
# These look at strides; the numbers of rows that are broadcast have others than the rows.
VIEWS = frozenset(("unflatten", "view", "view_as"))


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a result.

    Attributes:
        numbers: Which rows they are.
        pooled: The sizes whose rows were taken together, as by a mean over the batch.
    """

    numbers: Numbers = field(default_factory=dict)
    pooled: frozenset[int] = frozenset()


def follow(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
) -> list[Rows]:
    """What is known of the rows of the results of a call, one per tensor."""
    name = name_of(func)
    inplace = "out" in kwargs or any(result is value for result in results for value in args)
    tensors = tensors_in([*args, *kwargs.values()])
    if any(map(mapped, results)):
        return [mapped_rows(name, args, tensors, result) for result in results]
    if name == "setitem" or (name in ROUTING and args and not inplace):
        routed = _written if name == "setitem" else _routed
        try:
            numbers_of_results = routed(func, args, kwargs, results)
            return list(map(Rows, numbers_of_results))
        except (RuntimeError, TypeError, ValueError):  # of numbers only: the call itself went well
            return [Rows() for _ in results]
    # Constants are the same for all samples: their rows are none of the batch.
    known = [(tensor, numbers_of(tensor)) for tensor in tensors if not roots_of(tensor).constant]
    if not tensors or any(tensor.requires_grad for tensor, _ in known):
        return [Rows() for _ in results]
    only_first = all(tensor is args[0] for tensor in tensors)
    if name in REDUCING | SCANNING and only_first:
        return [_along(name, args, kwargs, result) for result in results]
    pooled = frozenset(_met(name, args, kwargs, known))
    elementwise = name in ELEMENTWISE
    if elementwise or name in MEETING or (name in BY_ROW and _leads(known, results)):
        return [_kept(known, result, pooled, elementwise) for result in results]
    # Nothing is known of the function: it is asked.
    return list(starmap(Rows, tried(func, args, kwargs, results, known)))


def mapped_rows(
    name: str,
    args: Sequence[Any],
    tensors: Sequence[Tensor],
    result: Tensor,
) -> Rows:
    """The rows of what a function makes under `vmap`: those that are mapped over are apart."""
    known = []
    for tensor in tensors:
        if not roots_of(tensor).constant:
            known.append((tensor, numbers_of(physical(tensor))))
    beside = _beside_mapped(name, args, known, result)
    picks = name == "getitem" and len(tensors) == 2
    if picks and not mapped(tensors[0]) and not tensors[1].ndim:
        return Rows(_picked(numbers_of(tensors[0]), physical(tensors[1]), result))
    numbers_of_result = {}
    together = set[int]()
    # Axes that are mapped over, of which only the leading one is understood.
    axes = [axis for tensor in (*tensors, result) for axis in mapped(tensor)]
    for size in {size for _, numbers in known for size in numbers if size > 1}:
        read = []
        for tensor, numbers in known:
            if size in numbers:
                read.append((bool(mapped(tensor)), numbers[size]))
        along = [n.flatten() for over, n in read if over and n.ndim and n.numel() == len(n)]
        if size in beside:
            numbers_of_result[size] = beside[size]
            continue
        # Every mapped call reads all rows of a tensor that is not mapped over.
        if any(not over and n.numel() > 1 for over, n in read):
            if name not in ROUTING:
                together.add(size)
            continue
        if any(axes) or len(along) < len(read):
            continue
        if all(torch.equal(n, along[0]) for n in along):
            trailing_ones = [1] * (physical(result).ndim - 1)
            numbers_of_result[size] = along[0].reshape(-1, *trailing_ones)
    return Rows(numbers_of_result, frozenset(together))


def _beside_mapped(
    name: str,
    args: Sequence[Any],
    known: Sequence[tuple[Tensor, Numbers]],
    result: Tensor,
) -> Numbers:
    """The numbers of what is mapped over parameters alone, as an ensemble of models is.

    Every call then has the rows of what it reads, if it is a function of each of them.
    """
    axes = mapped(result)
    if len(axes) != 1 or len(known) != 1 or mapped(known[0][0]):
        return {}
    read = known[0][0]
    first = bool(args) and args[0] is read
    by_row = name in BY_ROW and name != "batch_norm" and read.ndim > 1 and first
    if not by_row and name not in ELEMENTWISE:
        return {}
    kept = _kept(known, result, frozenset(), elementwise=not by_row).numbers
    return {size: numbers.unsqueeze(axes[0]) for size, numbers in kept.items()}


def _picked(numbers: Numbers, index: Tensor, result: Tensor) -> Numbers:
    """The numbers of rows that `vmap` picks out of a tensor, `x[i]`."""
    shape = (-1, *[1] * (physical(result).ndim - 1))
    # Only rows along the first axis are picked by a number.
    leading = {size: n.flatten() for size, n in numbers.items() if n.ndim and n.numel() == len(n)}
    if index.ndim == 1:
        return {size: n[index].reshape(shape) for size, n in leading.items()}
    return {}


def plainly_in_order(
    func: Callable[..., Any],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
) -> bool:
    """Whether the name alone tells that results have the rows of what they were computed from."""
    name = name_of(func)
    if any(map(mapped, results)):
        return False
    if name not in ELEMENTWISE and (name not in BY_ROW or name in MEETING):
        return False
    ranks = {tensor.ndim for tensor in tensors if tensor.ndim}
    same = name in BY_ROW or ranks <= {results[0].ndim}
    # Numbers and parameters have no rows of the batch.
    read = [tensor for tensor in tensors if tensor.ndim and not is_parameter(tensor)]
    lengths = {len(tensor) for tensor in read if len(tensor) > 1}
    return same and all(result.ndim > 0 and lengths <= {len(result)} for result in results)


def _along(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Tensor,
) -> Rows:
    """The rows of what is reduced or accumulated along some axes."""
    like = args[0]
    numbers = numbers_of(args[0])
    # Of these two the argument in front of `dim` is the order of the norm, or the quantile.
    place = 2 if name in ("norm", "quantile") else 1
    by_position = args[place] if len(args) > place else None
    dim = kwargs.get("dim", kwargs.get("axis", by_position))
    every = range(like.ndim)
    if dim is None:
        dims = list(every)
    else:
        given = [dim] if isinstance(dim, int) else dim
        dims = [axis % max(1, like.ndim) for axis in given]
    # Where the numbers do not change along these axes, no rows of several samples are combined.
    apart = {size: n for size, n in numbers.items() if all(n.shape[axis] == 1 for axis in dims)}
    if name in REDUCING and result.ndim < like.ndim:
        rest = [axis for axis in every if axis not in dims]
        kept = {size: n.reshape([n.shape[axis] for axis in rest]) for size, n in apart.items()}
    else:
        kept = apart
    # Statistics over the batch: what comes out belongs to no single sample.
    together = frozenset(size for size in numbers if size not in apart and size > 1)
    fits = all(n.ndim == result.ndim for n in kept.values())
    return Rows(kept if fits else {}, together)


def _met(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known: Sequence[tuple[Tensor, Numbers]],
) -> Iterator[int]:
    """The sizes whose rows meet: in products of matrices, in pairs, or in statistics of a batch."""
    sizes = {size for _, numbers in known for size, n in numbers.items() if n.numel() > 1}
    if name == "batch_norm" and True in (kwargs.get("training"), *args[5:6]):
        yield from sizes
    elif name in PRODUCTS and len(args) > 1:
        numbers_by_tensor = {id(tensor): numbers for tensor, numbers in known}
        for size in sizes:
            left, right = (numbers_by_tensor.get(id(value), {}).get(size) for value in args[:2])
            # A product sums over the last axis of the left and the last but one of the right; of a
            # vector, over its only one.
            summed_of_right = -2 if right is not None and right.ndim > 1 else -1
            summed = _vary(left, -1) or _vary(right, summed_of_right)
            in_pairs = _vary(left, -2) and _vary(right, -1)
            if summed or in_pairs:
                yield size


def _vary(numbers: Tensor | None, axis: int) -> bool:
    """Whether rows of several samples lie along an axis."""
    return numbers is not None and numbers.ndim >= -axis and numbers.shape[axis] > 1


@lru_cache(maxsize=1024)
def name_of(func: Callable[..., Any]) -> str:
    """The name of a torch function, without underscores around it; of a property its own."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def _routed(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
) -> list[Numbers]:
    """The same call, applied to numbers."""
    first, *rest = args
    several = isinstance(first, (list, tuple))
    if several:
        sources = [value for value in first if isinstance(value, Tensor)]
    else:
        sources = [first]
    if not sources or (several and len(sources) < len(first)):
        return [{} for _ in results]
    name = name_of(func)
    known = [None if roots_of(value).constant else numbers_of(value) for value in sources]
    told = [numbers for numbers in known if numbers is not None]
    numbers_of_results: list[dict[int, Tensor]] = [{} for _ in results]
    for size in set(told[0]).intersection(*told[1:]) if told else ():
        # What is joined to rows of the batch, and is the same for all, belongs to them.
        beside = told[0][size]
        numbers = []
        try:
            for own, value in zip(known, sources, strict=True):
                own_of_size = beside if own is None else own[size]
                numbers.append(own_of_size.expand(value.shape))
        except RuntimeError:  # rows of this size lie along the axis that is joined: others need not
            continue
        if name in VIEWS:
            numbers = [one.contiguous() for one in numbers]
        with torch._C.DisableTorchFunction():
            out = func(numbers if several else numbers[0], *rest, **kwargs)
        moved = [out] if isinstance(out, Tensor) else out
        if name == "pack_padded_sequence":  # its other results are no rows
            moved = moved[:1]
        for of_result, tensor in zip(numbers_of_results, moved, strict=False):
            of_result[size] = narrowed(tensor)
    return list(numbers_of_results)


def _written(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
) -> list[Numbers]:
    """The numbers of a tensor that some entries were written to.

    Constants belong to what they are written to, and so does the rest of a constant that rows of
    the batch are written to.
    """
    tensor, index, value = args
    if not isinstance(value, Tensor) or roots_of(value).constant:
        return [numbers_of(tensor)]
    written = numbers_of(value)
    numbers: Numbers | None = None
    if not roots_of(tensor).constant:
        numbers = numbers_of(tensor)
    found = {}
    for size in {*written} if numbers is None else {*numbers}.intersection(written):
        if numbers is None:
            whole = torch.full(tensor.shape, _UNWRITTEN, device=tensor.device)
        else:
            whole = numbers[size].expand(tensor.shape).clone()
        with torch._C.DisableTorchFunction():
            whole[index] = written[size].expand(value.shape).to(whole.dtype)
        complete = whole if numbers is not None else _completed(whole)
        if complete is not None:
            found[size] = narrowed(complete.to(written[size].dtype))
    return [found]


_UNWRITTEN = -1


def _completed(numbers: Tensor) -> Tensor | None:
    """The numbers of a constant tensor that rows of the batch were written to.

    What was not written belongs to the row that it is in, such as the step in front of a sequence
    that was shifted. `None`: the rows do not lie along one axis, or some were not written to.

    Args:
        numbers: Of all entries; `_UNWRITTEN` where nothing was written.
    """
    written = numbers != _UNWRITTEN
    if bool(written.all()):
        return numbers
    # One row does not tell along which axis the others would be.
    several = bool((numbers[written] != numbers.amax()).any())
    for axis in range(numbers.ndim) if several else ():
        rows = numbers.movedim(axis, 0).flatten(1)
        of_row = rows.amax(1, keepdim=True)
        if bool(((rows == of_row) | (rows == _UNWRITTEN)).all()) and _UNWRITTEN not in of_row:
            following = [1] * (numbers.ndim - axis - 1)
            return of_row.reshape(-1, *following).expand_as(numbers)
    return None


def _kept(
    known: Sequence[tuple[Tensor, Numbers]],
    result: Tensor,
    pooled: frozenset[int],
    elementwise: bool,
) -> Rows:
    """The rows of a result that has those of the tensors it was computed from.

    Either its leading axis has, or all of its entries.
    """
    align = _broadcast if elementwise else _leading
    kept = {}
    together = set(pooled)
    for size in {size for _, numbers in known for size in numbers} - pooled:
        aligned = []
        for tensor, numbers in known:
            if size in numbers:
                aligned.append(align(numbers[size], tensor, result))
        # The most detailed ones: others are broadcast, and have to be the same where they meet.
        told = [one for one in aligned if one is not None]
        finest = max(told, key=Tensor.numel, default=None)
        if finest is not None and all(one is not None and _equal(one, finest) for one in aligned):
            kept[size] = finest
        elif elementwise:
            together.add(size)  # rows of several samples meet
    return Rows(kept, frozenset(together))


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same wherever they meet."""
    if torch.equal(one, other):
        return True
    broadcast = one.numel() != other.numel()
    return broadcast and bool((one == other).all())


def _leads(known: Sequence[tuple[Tensor, Numbers]], results: Sequence[Tensor]) -> bool:
    """Whether only the leading axis tells the rows of tensors."""
    for tensor, numbers in known:
        for of_size in numbers.values():
            if any(_leading(of_size, tensor, result) is None for result in results):
                return False
    return True


def _broadcast(numbers: Tensor, tensor: Tensor, result: Tensor) -> Tensor | None:
    """Numbers of a tensor as those of a result that it was broadcast to; `None`: it was not."""
    if result.ndim < tensor.ndim:
        return None
    leading_ones = [1] * (result.ndim - tensor.ndim)
    return numbers.reshape(leading_ones + list(numbers.shape))


def _leading(numbers: Tensor, tensor: Tensor, result: Tensor) -> Tensor | None:
    """Numbers of the leading axis of a tensor as those of a result.

    `None`: other axes have them too.
    """
    along = numbers.ndim > 0 and numbers.numel() == len(numbers)
    if along and result.ndim and len(tensor) == len(result):
        return numbers.reshape(-1, *[1] * (result.ndim - 1))
    return None


def numbers_of(tensor: Tensor) -> Numbers:
    """The numbers of the rows of a tensor without gradient; empty ones where they are not known."""
    roots = roots_of(tensor)
    if roots.numbers is not None:
        return roots.numbers
    return in_order(tensor, roots)


def in_order(tensor: Tensor, roots: Roots) -> Numbers:
    """The numbers where nothing moved rows; the batch may be second."""
    return {size: counted(size, tensor, axis) for size, axis in _sizes_in_order(tensor, roots)}


def _sizes_in_order(tensor: Tensor, roots: Roots) -> list[tuple[int, int]]:
    """The sizes whose rows are counted where nothing moved rows, and along which axis."""
    shape = tensor.shape
    lengths = {root.shape[0] for root in roots.tensors if root.ndim}
    # A single row is broadcast to any batch: it counts only where nothing else is there.
    sizes = {length for length in lengths if length > 1} or lengths
    if not tensor.ndim or shape[0] not in sizes or roots.data or roots.routed:
        return []
    first = (shape[0], 0)
    for root in roots.tensors:
        if root.shape[:2] == shape[:2] and _may_be_second(root.shape):
            return [(shape[1], 1), first]
    return [first]


def _may_be_second(shape: Sequence[int]) -> bool:
    """Whether the second axis may be that of the samples: one of time or of batches is first."""
    return len(shape) > 1 and shape[1] > 1 and (shape[0] == 1 or len(shape) > 2)


def counted(size: int, tensor: Tensor, axis: int = 0) -> Tensor:
    """0, 1, ... along an axis of a tensor; broadcasts against it."""
    # A view of numbers that are made once.
    numbers = _range(size, tensor.device, torch.is_inference_mode_enabled())
    before = [1] * axis
    behind = [1] * (tensor.ndim - 1 - axis)
    return numbers.reshape(*before, -1, *behind)


def _range(size: int, device: torch.device, inference: bool) -> Tensor:
    """Made once, since nobody changes numbers; what inference mode makes serves only there."""
    key = (size, device, inference)
    if key not in _RANGES:
        # One byte per row of most batches: numbers are moved as often as the rows.
        dtype = torch.uint8 if size <= 255 else torch.int32
        made = physical(torch.arange(size, dtype=dtype, device=device))
        if type(made) is not Tensor:  # under a mode that makes tensors of its own
            return made
        if len(_RANGES) >= _MOST:
            _RANGES.clear()
        _RANGES[key] = made
    return _RANGES[key]


_RANGES: dict[Hashable, Tensor] = {}
_MOST = 256  # ranges that are kept


def ordered(numbers: Numbers, result: Tensor, roots: Roots) -> bool:
    """Whether a result has the rows of what it was computed from in their order, each once."""
    leading = {len(root) for root in roots.tensors if root.ndim}
    if not result.ndim or len(result) not in leading.intersection(numbers):
        return False
    own = numbers[len(result)]
    along = own.ndim == result.ndim and own.numel() == len(own) == len(result)
    return along and torch.equal(own.flatten(), counted(len(result), result).flatten())


Fingerprint = tuple[tuple[int, bytes], ...]


class LastingNumbers(dict[int, Tensor]):
    """Numbers of rows that are those of many tensors: their fingerprint is taken once."""

    __slots__ = ("fingerprint",)

    def __init__(self, numbers: Numbers) -> None:
        super().__init__(numbers)
        self.fingerprint: Fingerprint | None = None


def fingerprint(numbers: Numbers) -> Fingerprint:
    """Something that is the same for the same numbers only."""
    if not isinstance(numbers, LastingNumbers):
        return _fingerprint(numbers)
    if numbers.fingerprint is None:
        numbers.fingerprint = _fingerprint(numbers)
    return numbers.fingerprint


def _fingerprint(numbers: Numbers) -> Fingerprint:
    digests = []
    for size, of_size in sorted(numbers.items()):
        if _is_counted(size, of_size):
            digests.append((size, _ASCENDING))
            continue
        content = of_size.cpu().numpy().ravel()
        ascending = np.array_equal(content, np.arange(size))
        digest = _ASCENDING if ascending else blake2b(content.tobytes()).digest()
        digests.append((size, digest))
    return tuple(digests)


_ASCENDING = b"ascending"


def _is_counted(size: int, numbers: Tensor) -> bool:
    """Whether these are all numbers of `counted` in their order, without waiting for the device."""
    known = _RANGES.get((size, numbers.device, False))
    whole = numbers.numel() == size and numbers.is_contiguous()
    return known is not None and whole and (numbers is known or numbers._base is known)

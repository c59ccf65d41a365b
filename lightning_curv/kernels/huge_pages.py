"""Memory for large results, in huge pages where the system has them.

Memory that a process touches for the first time is given to it page by page. At 4 KiB a page that
takes longer than the arithmetic that fills it: per-sample gradients of a network with 0.5 million
parameters are 130,000 pages for 256 samples. Linux gives 2 MiB at a time to memory that is advised
so (`madvise(2)`, `MADV_HUGEPAGE`), unless the system is configured to do so always or never.
NumPy does the same for its arrays; torch does it for all tensors of a process that was started with
`THP_MEM_ALLOC_ENABLE=1`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_curv.kernels.switches import enabled

LARGE = 2**22  # bytes of a tensor from which huge pages are asked for
# Bytes of a tensor up to which they are asked for: the host of a virtual machine takes free blocks
# back, and giving them again takes longer than small pages would.
LARGEST = 2**29
_HUGE_PAGE = 14  # MADV_HUGEPAGE
_PAGE = 2**12  # bytes, at least


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor of the type and on the device of `like`, to be filled at once."""
    result = like.new_empty(shape)
    in_memory = result.device.type == "cpu" and type(result) is Tensor
    if in_memory and LARGE <= result.nbytes <= LARGEST and (advise := _madvise()):
        start = result.data_ptr() // _PAGE * _PAGE
        end = result.data_ptr() + result.nbytes
        # This is advice: nothing is lost if it fails.
        advise(start, end - start, _HUGE_PAGE)
    return result


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """`a * b` for tensors with as many axes each, of equal sizes or 1."""
    if a.nbytes * b.numel() < LARGE or _transformed(a, b):
        return a * b
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]
    return torch.mul(a, b, out=empty(a, *shape))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for stacks of matrices `[n, m, k]` and `[n, k, l]`."""
    rows = a.shape[1]
    columns = b.shape[2]
    if rows * b.nbytes < LARGE or _transformed(a, b):
        return torch.bmm(a, b)
    return torch.bmm(a, b, out=empty(a, len(a), rows, columns))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack` of tensors of one size."""
    if len(tensors) * tensors[0].nbytes < LARGE:
        return torch.stack([*tensors])
    return torch.stack([*tensors], out=empty(tensors[0], len(tensors), *tensors[0].shape))


def _transformed(*tensors: Tensor) -> bool:
    """Whether a transform of `torch.func` looks on: no product has an `out=` then."""
    return any(map(is_functorch_wrapped_tensor, tensors))


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function; `None` where there are no huge pages to ask for."""
    if not enabled("huge_pages"):
        return None
    try:
        if sys.platform == "linux":
            function = ctypes.CDLL(None).madvise
        else:
            function = None
    except (AttributeError, OSError):
        return None
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        function.restype = ctypes.c_int
    return function

"""Products of matrices by the faster of the two libraries that torch has on a CPU.

`torch.mm` multiplies float32 matrices with the BLAS that torch was built with, MKL as a rule,
which on processors that are not Intel's uses vectors of 256 bits. oneDNN, the library behind
torch's convolutions, uses all that the processor has: with AVX-512 the same IEEE products and sums
in another order, in half the time.
Torch offers its product of matrices to the code that the compiler generates, as
`torch.ops.mkldnn._linear_pointwise`; where that op is missing, or a product is small (oneDNN
costs more per call), everything is `torch.mm`. So it is on Intel's processors, where MKL was
faster for every product that was measured, by up to 2.6 times, and where AVX2 is all there is,
which MKL uses as well. In the context `fast_products` all of this holds for the products of
autograd too.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_curv.kernels.switches import enabled, named

# Multiplications from which a product by oneDNN is faster, measured; so are the products of a stack
# of such matrices, one by one.
LARGE = 2**20
# Rows or columns of a product that is not worth oneDNN's copy of the other matrix, in new memory.
NARROW = 16
# Entries of a matrix that is smaller than the buffer which oneDNN transposes matrices through.
SMALL = 2**15


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """The product that `(a, b, None, "none", [], "")` maps to a bᵀ.

    `None`: this build of torch does not have it, it is switched off, or MKL is as fast and the
    environment does not name it.
    """
    if not enabled("onednn") or not torch.backends.mkldnn.is_available():
        return None
    if _mkl_uses_full_width() and not named("onednn"):
        return None
    try:
        product: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        ones = torch.ones(2, 2, dtype=torch.float32, device="cpu")
        product(ones, ones, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return product


def _mkl_uses_full_width() -> bool:
    """Whether torch multiplies by MKL, on a processor by its maker or without wider vectors."""
    if not torch.backends.mkl.is_available():
        return False
    # A rule, not a measurement at the first use: rounding must not depend on what else was running.
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return True
    try:
        described = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]  # of the first core
    except OSError:  # not Linux
        described = platform.processor()
    return "GenuineIntel" in described


def is_large(like: Tensor, multiplications: int) -> bool:
    """Whether oneDNN is there, and faster for a product of this size."""
    return (
        multiplications >= LARGE
        and like.dtype == torch.float32
        and like.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and _onednn() is not None
    )


def mm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for matrices `[m, k]` and `[k, n]`."""
    # Autograd does not know a derivative of oneDNN's op.
    differentiated = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    wide = min(a.shape[0], b.shape[1]) >= NARROW and b.dtype == a.dtype
    fast = wide and is_large(a, a.shape[0] * b.numel()) and not differentiated
    product = _onednn() if fast else None
    if product is None:
        return a @ b
    # oneDNN transposes a matrix by columns through a buffer of its own. A small matrix is better
    # copied before.
    right = b.contiguous() if b.numel() <= SMALL else _dense(b)
    return product(_dense(a), right.mT, None, "none", [], "")


class _FastProducts(TorchDispatchMode):
    """A mode in which `mm` of large plain matrices is a product by oneDNN.

    Below autograd every op passes by here, which takes a few microseconds each.
    """

    supports_higher_order_operators = True  # they pass by too

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no wrapper around every call: nothing compiled runs in here

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled parts of a backward pass run as they are

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        plain = all(type(matrix) in (Tensor, Parameter) for matrix in args)
        if func is torch.ops.aten.mm.default and plain:
            a, b = args
            if is_large(a, a.shape[0] * b.numel()) and (product := _onednn()) is not None:
                return product(_dense(a), _dense(b).mT, None, "none", [], "")
        return func(*args, **(kwargs or {}))


def fast_products(worthwhile: bool) -> AbstractContextManager[object]:
    """Context in which `torch.mm` is `mm`, in passes of autograd too.

    Where oneDNN is missing, nothing changes.

    Args:
        worthwhile: Whether there are products large enough to pay for a mode.
    """
    if worthwhile and torch.backends.mkldnn.enabled and _onednn() is not None:
        return _FastProducts()
    return nullcontext()


def _dense(matrix: Tensor) -> Tensor:
    """The matrix, or each of a stack, in one block by rows or by columns.

    On anything else oneDNN is slower by far.
    """
    if matrix.is_contiguous() or matrix.mT.is_contiguous():
        return matrix
    if matrix.stride(-2) == 1:
        return matrix.mT.contiguous().mT
    return matrix.contiguous()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for stacks of matrices `[n, m, k]` and `[n, k, l]`."""
    # Such matrices have few rows, and are by columns: oneDNN is faster from twice the size on.
    if len(a) and is_large(a, a.shape[1] * b[0].numel() // 2):
        products = [*one_by_one(a, b)]
        if len(products) == 1:
            return products[0][None]
        return torch.stack(products)
    return a @ b


def one_by_one(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The products of two stacks of matrices, one after the other.

    Each has at least `LARGE` multiplications.
    """
    product = _onednn()
    assert product is not None
    for left, right in zip(_dense(a).unbind(), _dense(b).mT.unbind(), strict=True):
        yield product(left, right, None, "none", [], "")


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """`torch.einsum` of two tensors, by `mm` where it is one product of matrices."""
    plan = _plan(equation)
    if plan is None:
        return torch.einsum(equation, a, b)
    a_axes, rows, b_axes, columns, order = plan
    left = a.permute(a_axes)  # [ones, rows, summed]
    right = b.permute(b_axes)  # [ones, summed, columns]
    outer = left.shape[rows] + right.shape[columns]
    m = math.prod(left.shape[rows])
    n = math.prod(right.shape[columns])
    k = math.prod(left.shape[rows.stop :])
    if left.numel() != m * k or right.numel() != k * n:
        return torch.einsum(equation, a, b)
    product = mm(left.reshape(m, k), right.reshape(k, n))
    if len(outer) != 2:
        product = product.reshape(outer)
    return product if order is None else product.permute(order)


@cache
def _plan(equation: str) -> tuple[list[int], slice, list[int], slice, list[int] | None] | None:
    """The order of the axes, and which become rows or columns.

    Letters of one operand alone have to be of size 1.
    """
    operands, result = equation.split("->")
    left, right = operands.split(",")
    summed = [letter for letter in left if letter in right and letter not in result]
    rows = [letter for letter in left if letter in result]
    columns = [letter for letter in right if letter in result]
    if not summed or {*rows} & {*columns}:
        return None
    kept = {*result, *summed}
    a_ones = [letter for letter in left if letter not in kept]
    b_ones = [letter for letter in right if letter not in kept]
    order = [(rows + columns).index(letter) for letter in result]
    return (
        [left.index(letter) for letter in a_ones + rows + summed],
        slice(len(a_ones), len(a_ones + rows)),
        [right.index(letter) for letter in b_ones + summed + columns],
        slice(len(b_ones + summed), len(right)),
        None if order == sorted(order) else order,
    )

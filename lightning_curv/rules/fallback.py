"""Ops without a rule: exact per-sample vector-Jacobian products of the op itself, by `vmap`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_curv.rules import embedding
from lightning_curv.rules.registry import Call, Rule
from lightning_curv.terms.owners import golden
from lightning_curv.terms.term import Term


class FallbackWarning(UserWarning):
    """An op has no rule: its per-sample gradients are exact, but slow, and are materialised."""


def rule_for(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Rule, dict[str, Any]]:
    """A rule for one call of any op, and the call's arguments by the names that it gives them."""
    if _picks(func, args, kwargs):
        table, index = args
        axes = range(index.ndim)
        rule = Rule(_picked, axes=lambda call, arguments: axes)
        return rule, {"table": table, "index": index}
    # Tensors may be anywhere in the arguments, in lists too: every leaf becomes a named argument.
    leaves, structure = tree_flatten((args, kwargs))

    def op(**arguments: Any) -> Any:
        args, kwargs = tree_unflatten([arguments[str(i)] for i in range(len(leaves))], structure)
        return func(*args, **kwargs)

    op.__name__ = str(getattr(func, "__name__", func))
    return Rule(partial(_apply, op), affine=False), {str(i): leaf for i, leaf in enumerate(leaves)}


def _picks(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Whether a call is `table[index]` with a tensor of integers."""
    if func is not Tensor.__getitem__ or kwargs:
        return False
    index = args[1]
    if not isinstance(index, Tensor) or not index.ndim:
        return False
    return index.dtype in (torch.int64, torch.int32) and not index.requires_grad


def _picked(call: Call, g: Tensor, table: Tensor, index: Tensor) -> dict[str, Term]:
    return {"table": embedding.rows_of(call, g, table, index)}


def _apply(
    op: Callable[..., Any],
    call: Call,
    g: Tensor,
    **arguments: Any,
) -> dict[str, Term]:
    return per_sample(op, call, g, arguments)


def per_sample(
    op: Callable[..., Any],
    call: Call,
    g: Tensor,
    arguments: dict[str, Any],
) -> dict[str, Term]:
    """The terms of an op that treats the entries of the leading axis of its data independently.

    Args:
        op: The op as a function of named arguments.
        call: The recorded call.
        g: Cotangents, `[V, N, *]`.
        arguments: The op's arguments by name; those that are not in `call.operands` and whose
            leading axis has size N are data.

    Raises:
        NotImplementedError: The op does not batch over the leading axis, or `vmap` cannot run it.
    """
    warnings.warn(
        f"`{op.__name__}` has no rule: its per-sample gradients are exact but slow, and held in "
        "memory. `@lightning_curv.rule` registers one.",
        FallbackWarning,
        stacklevel=2,
    )
    operands = {name: arguments[name] for name in call.operands}
    # Whatever has N rows is taken apart by sample; a constant of N rows is told by the check below.
    data: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in operands:
            continue
        if isinstance(value, Tensor) and value.ndim and len(value) == g.shape[1]:
            data[name] = value
        else:
            others[name] = value
    if call.chosen is not None:
        rows = call.chosen.to(g.device)
        g = g[:, rows]
        data = {name: value[rows] for name, value in data.items()}

    def pull(cotangent: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        def output(operands: dict[str, Tensor]) -> Tensor:
            result: Tensor = op(**operands, **data, **others)
            return result

        vector_jacobian_product = torch.func.vjp(output, operands)[1]
        gradients: dict[str, Tensor] = vector_jacobian_product(cotangent)[0]
        return gradients

    def one(cotangent: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
        # The op sees a batch of one sample, so that it finds the axes that it expects.
        return pull(cotangent[None], {name: value[None] for name, value in data.items()})

    def columns_at_once() -> dict[str, Tensor]:
        return torch.func.vmap(torch.func.vmap(one), in_dims=(0, None))(g, data)

    def column_by_column() -> dict[str, Tensor]:
        gradients = [torch.func.vmap(one)(column, data) for column in g]
        return {name: torch.stack([column[name] for column in gradients]) for name in operands}

    # Pulling back is linear: one pass with a weighted sum of the columns checks all of them.
    weights = golden(len(g)).to(g.device, g.dtype)
    try:
        total = pull(torch.tensordot(weights, g, 1), data)
        result = columns_at_once()
        # Torch batches a few ops (`cdist`) wrongly where two `vmap` are nested.
        if len(g) > 1 and not _agree(result, total, weights):
            result = column_by_column()
    except Exception as error:
        raise NotImplementedError(
            f"no rule, and the per-sample fallback failed with: {error}"
        ) from error
    if not _agree(result, total, weights):
        raise NotImplementedError(
            "no rule, and it does not treat the entries of its leading axis independently"
        )
    return {k: dense(v) for k, v in result.items()}


def _agree(
    result: dict[str, Tensor],
    total: dict[str, Tensor],
    weights: Tensor,
) -> bool:
    """Whether per-sample gradients add up to those of the whole batch.

    Samples that are not finite tell nothing.
    """
    # Linear in the cotangent: weights of the columns that cancel nothing test all of them at once.
    for name, whole in total.items():
        summed = torch.tensordot(weights, result[name].sum(1), 1)
        finite = whole.isfinite() & summed.isfinite()
        summed = summed[finite]
        whole = whole[finite]
        largest = float(whole.abs().amax() if len(whole) else 0)
        if not torch.allclose(summed, whole, rtol=1e-3, atol=1e-4 * largest):
            return False
    return True


def dense(jacobian: Tensor) -> Term:
    """A term that holds its Jacobian `[V, N, *p]`."""
    return Term("d", "", "d", jacobian.flatten(2) if jacobian.ndim > 2 else jacobian[..., None])

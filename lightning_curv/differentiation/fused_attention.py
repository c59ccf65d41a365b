"""Attention as its fused kernels compute it, in ops that torch differentiates twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def attention(mask: str | None = None) -> Callable[..., Tensor | None]:
    """The formula of a node of `F.scaled_dot_product_attention`.

    Args:
        mask: The name of a saved mask that the node does not differentiate.
    """

    def formula(
        node: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        if node._saved_dropout_p > 0:
            return None  # the kernel's random numbers are not known
        bias = getattr(node, f"_saved_{mask}") if mask else bias
        return scaled_dot_product(query, key, value, bias, node._saved_is_causal, node._saved_scale)

    return formula


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) V; a query without keys gives 0.

    Args:
        query: `[N, H, T, E]`.
        key: `[N, G, S, E]`; every one of the G heads serves H / G heads of the queries.
        value: `[N, G, S, F]`.
        bias: Broadcasts to `[N, H, T, S]`; `True` marks what takes part, numbers are added.
        is_causal: Queries see no keys of later positions.
        scale: By default one over the root of E.
    """
    dtype = query.dtype
    precise = torch.promote_types(query.dtype, torch.float32)  # kernels accumulate so
    query, key, value = (x.to(precise) for x in (query, key, value))
    groups = query.shape[1] // max(1, key.shape[1])
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -torch.inf)
        else:
            scores = scores + bias.to(precise)
    if is_causal:
        scores = scores.masked_fill(
            scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1),
            -torch.inf,
        )
    lonely = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(lonely, 0).softmax(-1).masked_fill(lonely, 0)
    return (weights @ value).to(dtype)

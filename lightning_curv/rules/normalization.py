"""Normalisations: a diagonal map of the normalised input, and an offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms.term import Term


def _before_normalized(call: Call, arguments: dict[str, Any]) -> range:
    return range(len(call.shape) - len(arguments["normalized_shape"]))


def _trailing(call: Call, g: Tensor, x: Tensor, features: int) -> dict[str, Term]:
    """Terms of scale and shift, one entry each per entry of the last `features` axes."""
    # All axes between the sample and the features become one axis of shared positions.
    g = g.flatten(-features)
    g = g.reshape(*g.shape[:2], -1, g.shape[-1])
    x = call.rows(x).flatten(-features)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return {"weight": Term("sd", "sd", "d", g, x), "bias": Term("sd", "", "d", g)}


def _channels(g: Tensor, x: Tensor) -> dict[str, Term]:
    """Terms of scale and shift, one entry each per channel (axis 1)."""
    # All axes behind the channels become one axis of shared positions.
    g = g.reshape(*g.shape[:3], -1)
    x = x.reshape(*x.shape[:2], -1)
    return {"weight": Term("ds", "ds", "d", g, x), "bias": Term("ds", "", "d", g)}


@rule(
    F.layer_norm,
    parameters=("weight", "bias"),
    axes=_before_normalized,
    needs_values=lambda arguments: ("input",),
)
def layer_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """`F.layer_norm`."""
    return _trailing(call, g, F.layer_norm(input, normalized_shape, eps=eps), len(normalized_shape))


@rule(
    F.rms_norm,
    parameters=("weight",),
    axes=_before_normalized,
    needs_values=lambda arguments: ("input",),
)
def rms_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> dict[str, Term]:
    """`F.rms_norm`."""
    return _trailing(call, g, F.rms_norm(input, normalized_shape, eps=eps), len(normalized_shape))


@rule(F.group_norm, parameters=("weight", "bias"), needs_values=lambda arguments: ("input",))
def group_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """`F.group_norm`."""
    return _channels(g, F.group_norm(input, num_groups, eps=eps))


def _batch_statistics(arguments: dict[str, Any]) -> bool:
    return bool(arguments["training"])


@rule(
    F.batch_norm,
    parameters=("weight", "bias"),
    mixes_samples=_batch_statistics,
    needs_values=lambda arguments: (
        ("input",) if arguments["training"] else ("input", "running_mean", "running_var")
    ),
)
def batch_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """`F.batch_norm`; in training mode the normalised input is taken as given."""
    if training:
        # The call itself has moved the running averages: they must not be moved once more.
        running_mean = running_var = None
    return _channels(g, F.batch_norm(input, running_mean, running_var, training=training, eps=eps))


@rule(
    F.instance_norm,
    parameters=("weight", "bias"),
    needs_values=lambda arguments: (
        ("input",) if arguments["use_input_stats"] else ("input", "running_mean", "running_var")
    ),
)
def instance_norm(
    call: Call,
    g: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Term]:
    """`F.instance_norm`; never couples samples."""
    if use_input_stats:
        return _channels(g, F.instance_norm(input, eps=eps))
    return _channels(g, F.batch_norm(input, running_mean, running_var, training=False, eps=eps))

"""Checks of optimizer settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_curv.distributed.failures import processes
from lightning_curv.distributed.shards import is_sharded, shard_of
from lightning_curv.errors import UnsupportedError


def require_positive(name: str, value: float) -> None:
    """Refuse 0, negative numbers and NaN."""
    if isinstance(value, str) or not value > 0:
        raise ValueError(f"`{name}` must be positive, found {value!r}.")


def require_non_negative(name: str, value: float) -> None:
    """Refuse negative numbers and NaN."""
    if not value >= 0:
        raise ValueError(f"`{name}` must not be negative, found {value}.")


def require_fraction(name: str, value: float) -> None:
    """Refuse numbers outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must lie in [0, 1), found {value}.")


def require_count(name: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, found {value!r}.")


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is not among the choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, found {value!r}."
        )


def require_gatherable(param: Tensor, need: str = "Curvature needs") -> None:
    """Refuse a parameter of which this process has a part, unless FSDP2 gathers it for a pass.

    Args:
        param: The parameter.
        need: Who needs it, the beginning of the message.

    Raises:
        UnsupportedError: It is in parts that nobody gathers, or only some processes have parts.
    """
    shard = shard_of(param) if is_sharded(param) else None
    if hasattr(param, "_is_flat_param") or (is_sharded(param) and shard is None):
        raise UnsupportedError(
            f"{need} parameters that are whole in the forward pass, found one of shape "
            f"{tuple(param.shape)} that is not (tensor parallelism, `FullyShardedDataParallel`); "
            "shard the model with `fully_shard`."
        )
    if shard is not None and shard.processes != processes():
        raise UnsupportedError(
            f"{need} all {processes()} processes to share the batch, found a mesh of "
            f"{shard.processes} of them under `fully_shard`. Use a mesh of all processes."
        )

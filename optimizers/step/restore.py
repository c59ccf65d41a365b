"""Optimizer state as it was saved."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_curv.optimizers.curvature.base import ParamGroup, State


def restored_state(state_dict: dict[str, Any], groups: Sequence[ParamGroup]) -> dict[Tensor, State]:
    """Copies of the saved state on each parameter's device, in the dtype they were saved in.

    `Optimizer.load_state_dict` casts state to the dtype of the parameter: float32 factors of a
    bfloat16 parameter would lose their digits. It also keeps the caller's tensors, which later
    steps would change in place.

    Args:
        state_dict: what `Optimizer.state_dict` returned.
        groups: parameter groups of the optimizer that loads it.

    Returns:
        The state of each parameter that has any.
    """
    # Parameters have numbers in a checkpoint, and the same order in both lists of groups.
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    saved = state_dict["state"]
    return {
        param: copied(saved[number], param.device)
        for number, param in zip(numbers, params, strict=True)
        if number in saved
    }


def copied(value: Any, device: torch.device) -> Any:
    """A copy on a device: tensors, and dicts and lists of them."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item, device) for item in value]
    return value

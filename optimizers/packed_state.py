"""State of sharded parameters in a form that `torch.distributed.checkpoint` takes.

That loads only what the state of a fresh optimizer has, too, tensors in the sizes that they have
there, and only under "state" and "param_groups". A fresh optimizer has no factors, and does not
know their sizes. So what it would lack is one value per parameter, of bytes: it is there from the
beginning, is the same in all processes, and may have any length.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_curv.distributed.shards import is_sharded
from lightning_curv.optimizers.step.restore import copied

Key = int | str  # the number of a parameter, or its name in a model

VALUE = "packed"
# The number of steps that the value is of: a tensor with an axis, since torch takes the device to
# exchange a state on from one.
STEPS = "packed_steps"
LOST = (
    "expects all of its state, found a part: `torch.distributed.checkpoint` loads only what a "
    "fresh optimizer has, too. Save and load by `get_optimizer_state_dict` and "
    "`set_optimizer_state_dict`, or `state_dict()` as one value (docs/distributed.md shows how)."
)


def packed(
    state_dict: dict[str, Any], params: Sequence[Tensor], values: Sequence[Any], steps: int
) -> dict[str, Any]:
    """Add a value to the state of every parameter.

    Args:
        state_dict: of an optimizer; of its entries state and groups remain.
        params: all of its parameters, in their order.
        values: for each parameter: tensors and plain types, the same in all processes.
        steps: that the optimizer has made.

    Cost: a copy of the values in the memory of the host.
    """
    states = {}
    for number, (param, value) in enumerate(zip(params, values, strict=True)):
        others = state_dict["state"].get(number, {})
        states[number] = {
            **others,
            VALUE: _as_bytes({"value": value, "steps": steps, "others": list(others)}),
            STEPS: torch.full((1,), steps, device=param.device),
        }
    return {"state": states, "param_groups": state_dict["param_groups"]}


def unpacked(state_dict: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[Key, Any]]:
    """Take the values out of what `packed` returned.

    Args:
        state_dict: parameters have numbers or names in it; one without values stays as it is.
        name: of the class of the optimizer, for messages.

    Returns:
        The rest; the values by parameter.

    Raises:
        RuntimeError: A part of the state was not loaded.
    """
    states = _with_what_was_loaded(state_dict.get("state", {}))
    if not any(VALUE in state for state in states.values()):
        return state_dict, {}
    rest: dict[Key, dict[str, Any]] = {}
    values: dict[Key, Any] = {}
    for key, state in states.items():
        if VALUE not in state:
            raise RuntimeError(f"{name} {LOST}")
        others = {entry: value for entry, value in state.items() if entry not in (VALUE, STEPS)}
        saved = torch.load(io.BytesIO(state[VALUE]), map_location="cpu")
        if others.keys() != set(saved["others"]) or int(state[STEPS]) != saved["steps"]:
            raise RuntimeError(f"{name} {LOST}")
        values[key] = saved["value"]
        if others:
            rest[key] = others
    return {**state_dict, "state": rest}, values


def is_trial_step(optimizer: Optimizer) -> bool:
    """Whether torch makes a step to see what state there will be.

    It does so with an optimizer that has none yet, and before it sets all learning rates to zero
    and all gradients to zeros. Where parameters are not sharded this is not asked: their state has
    another form.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return (
        not optimizer.state
        and not any(float(group.get("lr", 0.0)) for group in optimizer.param_groups)
        and all(param.grad is not None for param in params if param.requires_grad)
        and any(map(is_sharded, params))
    )


def _as_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    # Copied: of a view all that it is a view of would be saved.
    torch.save(copied(value, torch.device("cpu")), buffer)
    return buffer.getvalue()


def _with_what_was_loaded(states: dict[Key, Any]) -> dict[Key, dict[str, Any]]:
    """States by parameter, each of them once.

    Into a state with numbers `torch.distributed.checkpoint` loads tensors in place, but what is no
    tensor under another key: the number as a string.
    """
    numbers = [key for key in states if isinstance(key, int)]
    loaded = {str(number): number for number in numbers}
    merged = {key: dict(state) for key, state in states.items() if key not in loaded}
    for text, number in loaded.items():
        merged[number].update(states.get(text, {}))
    return merged

"""Errors that name the parameter, the op and the way out."""

from __future__ import annotations

import gc

from torch import Tensor, nn


class UnsupportedError(NotImplementedError):
    """A quantity is not defined, or not implemented, for this graph; it is never computed approximately instead."""


def describe(parameter: Tensor) -> str:
    """The parameter's name in the largest module that is alive and holds it, or its shape. Slow: for messages only."""
    names = [
        name
        for module in gc.get_objects()
        if issubclass(type(module), nn.Module) and "_parameters" in module.__dict__
        for name, found in module.named_parameters(remove_duplicate=False)
        if found is parameter
    ]
    if names:
        return f"`{max(names, key=lambda name: name.count('.'))}`"
    return f"of shape {tuple(parameter.shape)}"

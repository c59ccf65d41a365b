"""Errors that name the parameter, the op and the way out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class UnsupportedError(NotImplementedError):
    """A quantity is not defined, or not implemented, for this graph; it is never computed approximately instead."""


@contextmanager
def differentiating_twice() -> Iterator[None]:
    """Says what to do where an op has no second derivative in torch."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UnsupportedError) or "not implemented" not in str(error):
            raise
        raise UnsupportedError(
            f"Expected ops that can be differentiated twice, found one without a second derivative in torch: {error} "
            "Attention: run the forward pass under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`."
        ) from error


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

"""Errors that name the parameter, the op and the way out."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

_ONCE = r"not implemented|differentiate twice|double backward"


class UnsupportedError(NotImplementedError):
    """A quantity is not defined, or not implemented, for this graph.

    It is never computed approximately instead.
    """


class SampleCountError(UnsupportedError):
    """The graph contradicts the number of samples that was given."""


class NoSecondDerivativeError(UnsupportedError):
    """A loss that torch has no function for, and that cannot be differentiated twice."""


@contextmanager
def differentiating_twice(name: str | None = None) -> Iterator[None]:
    """Names the op where one has no second derivative in torch: `name`, or what torch says."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UnsupportedError) or not re.search(_ONCE, str(error)):
            raise
        op = re.search(r"(\w+)_backward\b|derivative for '(\w+)'", str(error))
        raise once_differentiable(name or (op[1] or op[2] if op else "an op"), error) from error


@contextmanager
def differentiating_loss() -> Iterator[None]:
    """Says what the second derivative of a loss is needed for, where there is none."""
    try:
        yield
    except RuntimeError as error:
        raise NoSecondDerivativeError(
            "The curvature of a loss that torch has no function for is its second derivative at "
            f"the outputs of the network, and this loss has none. {error} First-order quantities "
            "work with any loss."
        ) from error


def once_differentiable(op: str, error: Exception) -> UnsupportedError:
    """The error for an op that torch does not differentiate twice."""
    advice = (
        "Write it in ops that have one, or compute quantities that need no second derivative of "
        "the network."
    )
    if re.search("attention", op, re.IGNORECASE):
        advice = (
            "Known are those of `F.scaled_dot_product_attention` without dropout in the kernel: "
            "run the forward pass without, or under "
            "`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`."
        )
    return UnsupportedError(
        f"Expected ops that can be differentiated twice, found `{op.lstrip('_')}` without a second "
        f"derivative in torch: {error} {advice}"
    )


def describe(parameter: Tensor) -> str:
    """The parameter's name in the largest module that is alive and holds it, or its shape.

    It is slow: for messages only.
    """
    return names_of([parameter])[0]


def names_of(parameters: Sequence[Tensor]) -> list[str]:
    """What `describe` says of several parameters, by one look at all modules."""
    names: dict[int, list[str]] = {id(parameter): [] for parameter in parameters}
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module) and "_parameters" in module.__dict__:
            for name, held in module.named_parameters(remove_duplicate=False):
                if id(held) in names:
                    names[id(held)].append(name)
    return [
        _longest(names[id(parameter)]) or f"of shape {tuple(parameter.shape)}"
        for parameter in parameters
    ]


def _longest(names: Sequence[str]) -> str:
    if names:
        return f"`{max(names, key=lambda name: name.count('.'))}`"
    return ""

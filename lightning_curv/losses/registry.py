"""The table of loss functions and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curv.losses.likelihoods import Likelihood

LOSSES: dict[Callable[..., Any], Callable[..., Likelihood]] = {}


def loss(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the description of the loss ``functions``.

    The decorated function takes ``scale``, the derivative of the final loss by this call's output (a tensor of the
    output's shape), and the loss function's arguments by name; it returns the `Likelihood` whose negative logarithm the
    call is, weighted by ``scale``.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LOSSES.update(dict.fromkeys(functions, function))
        return function

    return register

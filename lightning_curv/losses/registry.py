"""The table of loss functions and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curv.losses.likelihoods import Likelihood

LOSSES: dict[Callable[..., Any], Callable[..., Likelihood]] = {}
PARTS: dict[
    tuple[Callable[..., Any], str], Callable[..., Any]
] = {}  # the key in `LOSSES`, by differentiable argument


def loss(
    *functions: Callable[..., Any], argument: str = "input"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the description of the loss ``functions``.

    The decorated function takes ``scale``, the derivative of the final loss by this call's output
    (a tensor of the output's shape), and the loss function's arguments by name; it returns the
    `Likelihood` whose negative logarithm the call is, weighted by ``scale``.

    Args:
        functions: The loss functions.
        argument: The argument whose curvature is described; the decorated function finds it under
            the name ``input`` and the loss function's ``input`` under this name. H must have no
            block between two such arguments.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in functions:
            part = key if argument == "input" else function
            LOSSES[part] = function
            PARTS[key, argument] = part
        return function

    return register

"""The table of loss functions and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_curv.losses.likelihoods import Likelihood

LOSSES: dict[Callable[..., Any], Callable[..., Likelihood]] = {}
# The key in `LOSSES` by loss function and differentiable argument.
PARTS: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}


def loss(
    *functions: Callable[..., Any],
    argument: str = "input",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the description of the loss `functions`.

    The decorated function takes `scale`, the derivative of the final loss by this call's output
    (a tensor of the output's shape), and the loss function's arguments by name; it returns the
    `Likelihood` whose negative logarithm the call is, weighted by `scale`.

    Args:
        functions: The loss functions.
        argument: The argument whose curvature is described; the decorated function finds it under
            the name `input` and the loss function's `input` under this name. H must have no
            block between two such arguments.

    Returns:
        The decorator, which returns the function that it is given.

    Example:
        A logistic loss of one's own:

        >>> import torch
        >>> from torch.overrides import handle_torch_function, has_torch_function
        >>> from lightning_curv import DiagGGNExact, curvature
        >>> from lightning_curv.losses import Bernoulli
        >>> def logistic(input, target):
        ...     if has_torch_function((input, target)):
        ...         return handle_torch_function(logistic, (input, target), input, target)
        ...     return (torch.nn.functional.softplus(input) - target * input).sum()
        >>> @loss(logistic)
        ... def _(scale, input, target):
        ...     return Bernoulli(probabilities=input.sigmoid(), weight=scale.expand(input.shape))
        >>> w, x = torch.nn.Parameter(torch.zeros(1, 1)), torch.ones(3, 1)
        >>> with curvature(DiagGGNExact()):
        ...     logistic(torch.nn.functional.linear(x, w), torch.ones(3, 1)).backward()
        >>> w.diag_ggn_exact  # 3 p (1 - p) with p = 1/2
        tensor([[0.7500]])
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in functions:
            part = key if argument == "input" else function
            LOSSES[part] = function
            PARTS[key, argument] = part
        return function

    return register

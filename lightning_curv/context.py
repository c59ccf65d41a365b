"""``curvature(...)``: the context in which ``loss.backward()`` gives more than the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_curv.backprop import Backprop
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.recording import disabled, record


class curvature(record):
    """Context manager in which ``loss.backward()`` also computes ``extensions``.

    The results are attributes of the parameters, named by each extension's ``savefield``; every backward pass
    overwrites them. The forward pass runs inside the context, or before it inside `record` or with modules given to
    `extend`.

    Args:
        extensions: What to compute, for example ``Variance(), KFAC()``.
        generator: Draws the targets of Monte-Carlo quantities; default: one of our own that follows
            ``torch.manual_seed`` and never touches the global random state.
        batch_size: Number of samples, where the shapes of a network do not tell.
        check: Compare the sum of the per-sample gradients with the gradient of every parameter, and verify that samples
            do not influence each other; costs one more backward pass.

    Raises:
        UnsupportedError: In ``backward``: a parameter, an op or the loss is not covered; the message says what to do.
        RuntimeError: In ``backward``: a recorded input was modified in place, or the check failed.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchL2Grad, DiagGGNExact, curvature
        >>> layer = torch.nn.Linear(2, 3)
        >>> with curvature(BatchL2Grad(), DiagGGNExact()):
        ...     loss = torch.nn.functional.cross_entropy(layer(torch.ones(5, 2)), torch.tensor([0, 1, 2, 0, 1]))
        ...     loss.backward()
        >>> layer.weight.batch_l2.shape, layer.weight.diag_ggn_exact.shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        *extensions: Extension | GraphExtension,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        for extension in extensions:
            if not isinstance(extension, (Extension, GraphExtension)):
                raise TypeError(
                    f"`curvature` expects extensions, found {extension!r}; pass instances, for example `Variance()`."
                )
        self.extensions = extensions
        self._options: dict[str, Any] = {"generator": generator, "batch_size": batch_size, "check": check}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record ``func``; compute the extensions around ``Tensor.backward``."""
        if func is not Tensor.backward or not self.extensions or disabled():
            return super().__torch_function__(func, types, args, kwargs)
        loss, *rest = args
        kwargs = {
            **dict(zip(("gradient", "retain_graph", "create_graph", "inputs"), rest, strict=False)),
            **(kwargs or {}),
        }
        backprop = Backprop(loss, self.extensions, gradient=kwargs.get("gradient"), **self._options)
        if any(isinstance(e, GraphExtension) and e.keeps_graph for e in self.extensions):
            kwargs["retain_graph"] = True
        try:
            backprop.before()
            func(loss, **kwargs)
            backprop.after()
        finally:
            backprop.abort()
        return None

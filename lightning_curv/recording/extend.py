"""`extend`: recording every forward pass of a module."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, TypeVar, cast
from weakref import WeakSet

from torch import nn

from lightning_curv.recording.record import mark_output, record

Module = TypeVar("Module", bound=nn.Module)
_local = threading.local()
_CALLED: WeakSet[nn.Module] = WeakSet()  # extended modules, copies included, that ran


def extend(module: Module) -> Module:
    """Record every forward pass of a module.

    With an extended model and an extended loss module the forward pass may run outside of
    `curvature`. Nothing is wrapped or replaced: two forward hooks enter and leave `record`.

    Args:
        module: A model or a loss module.

    Returns:
        The module itself.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchGrad, curvature, extend
        >>> model, lossfunc = extend(torch.nn.Linear(3, 2)), extend(torch.nn.MSELoss())
        >>> loss = lossfunc(model(torch.ones(4, 3)), torch.zeros(4, 2))
        >>> with curvature(BatchGrad()):
        ...     loss.backward()
        >>> model.weight.grad_batch.shape
        torch.Size([4, 2, 3])
    """
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    return module


def extended() -> Iterator[nn.Module]:
    """The modules given to `extend` that have run since, and all modules inside them, each once."""
    return iter(dict.fromkeys(module for root in [*_CALLED] for module in root.modules()))


def _stack() -> list[record]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    return cast("list[record]", _local.stack)


def _enter(module: nn.Module, args: Any) -> None:
    if module not in _CALLED:
        _CALLED.add(module)
    mode = record()
    mode.__enter__()
    _stack().append(mode)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _stack():
        _stack().pop().__exit__(None, None, None)
    mark_output(module, args, output)

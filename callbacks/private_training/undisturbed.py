"""Calls of a training step that leave nothing behind, and what they would have left."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

_OF_EVERY_MODULE = {*vars(nn.Module())} - {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, dict, set, deque)


class Kept:
    """What a training step may change in a module: parameters, buffers, attributes and metrics."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        named = [*module.named_parameters(), *module.named_buffers()]
        self._tensors = {
            name: (tensor, tensor.detach().clone()) for name, tensor in named if not is_lazy(tensor)
        }
        self._grads = [(parameter, parameter.grad) for parameter in module.parameters()]
        self._metrics = {
            # metrics of torchmetrics, whose states are attributes
            m: copy.deepcopy(vars(m))
            for m in self._modules
            if hasattr(m, "_defaults")
        }
        self._attributes = {m: _attributes(m) for m in self._modules}
        self._contents = [
            (value, copy.copy(value))
            for attributes in self._attributes.values()
            for value in attributes.values()
            # the very types: how to fill a subclass again is not known
            if type(value) in _CONTAINERS
        ]
        self._root = module

    def changes(self) -> dict[str, Tensor]:
        """The parameters and buffers that are new or not what they were, as they are now."""
        now = {**dict(self._root.named_parameters()), **dict(self._root.named_buffers())}
        return {
            name: tensor.detach().clone()
            for name, tensor in now.items()
            if not is_lazy(tensor) and not self._was(name, tensor)
        }

    def _was(self, name: str, tensor: Tensor) -> bool:
        return name in self._tensors and equal(tensor, self._tensors[name][1])

    @torch.no_grad()
    def put_back(self) -> None:
        """Make everything what it was."""
        for module, attributes in self._attributes.items():
            for name in _attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for value, content in self._contents:
            # In place: others may refer to this very object.
            value.clear()
            value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
        for metric, values in self._metrics.items():
            vars(metric).update(copy.deepcopy(values))
        for tensor, before in self._tensors.values():
            # Writing what is there already would count as a change of version.
            if not equal(tensor, before):
                tensor.detach().copy_(before)
        for parameter, grad in self._grads:
            parameter.grad = grad


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same entries; NaN is equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a = a.detach()
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def undisturbed(pl_module: LightningModule) -> Iterator[Kept]:
    """Put everything back that training steps change; they log nothing, and dropout is off."""
    silent = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    before = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    vars(pl_module).update(silent)
    kept = Kept(pl_module)
    dropping = [m for m in pl_module.modules() if m.training and _drops(m)]
    for module in dropping:
        # The flag alone: `eval()` would reach the layers inside.
        module.training = False
    try:
        yield kept
    finally:
        kept.put_back()
        for module in dropping:
            module.training = True
        for name in silent:
            del vars(pl_module)[name]
        vars(pl_module).update(before)


def _drops(module: nn.Module) -> bool:
    dropout = getattr(module, "dropout", 0.0)  # attention and recurrent layers keep a probability
    return isinstance(module, nn.modules.dropout._DropoutNd) or (
        isinstance(dropout, float) and dropout > 0
    )

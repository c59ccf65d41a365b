"""Handing quantities over during the backward pass: `curvature(..., extension_hook=)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.recording.extend import extended

ExtensionHook = Callable[[Any], object]


class Handover:
    """Leaves a parameter's quantities once the pass has added to its `.grad`, and calls the hook.

    A parameter of a module that was extended is handed over with the module, when all that the loss
    reaches of the module's own parameters have their quantities; every other parameter by itself.
    Of several modules that hold it the first one owns a parameter; modules that own none are not
    called.

    Args:
        hook: The user's function of a module or of a parameter.
        parameters: Those that the loss depends on.
        leave: Sets the quantities of a parameter; false if it has none, or some are still to come.
    """

    def __init__(
        self,
        hook: ExtensionHook,
        parameters: Iterable[Tensor],
        leave: Callable[[Tensor], bool],
    ) -> None:
        self._hook = hook
        self._leave = leave
        self._own_passes = internal_pass()  # of the thread that begins the backward pass
        self._left = dict.fromkeys(parameters)
        self._holders: dict[Tensor, list[nn.Module]] = {}
        self._waiting: dict[nn.Module, set[Tensor]] = {}
        self._begun: set[nn.Module] = set()
        for module in extended():
            held: set[Tensor] = {
                p for p in module._parameters.values() if p is not None and p in self._left
            }
            if any(p not in self._holders for p in held):
                self._waiting[module] = held
                for parameter in held:
                    self._holders.setdefault(parameter, []).append(module)
        edges = ((p, torch.autograd.graph.get_gradient_edge(p)) for p in self._left)
        self._handles = [
            edge.node.register_hook(partial(self._accumulated, p)) for p, edge in edges
        ]

    def stop(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Hand over what the pass did not: parameters whose own gradient was not asked for."""
        self.stop()
        for parameter in [*self._left]:
            self._hand_over(parameter, last=True)

    def _accumulated(self, parameter: Tensor, *_: Any) -> None:
        if parameter in self._left and not self._own_passes.running:
            self._hand_over(parameter)

    def _hand_over(self, parameter: Tensor, last: bool = False) -> None:
        left = self._leave(parameter)
        if not (left or last):
            return
        del self._left[parameter]
        holders = self._holders.get(parameter, [])
        if left and not holders:
            self._hook(parameter)
        for module in holders:
            self._waiting[module].discard(parameter)
            if left:
                self._begun.add(module)
        for module in holders:
            if module in self._begun and not self._waiting[module]:
                self._hook(module)

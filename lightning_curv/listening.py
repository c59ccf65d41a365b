"""Listening to the user's backward pass: first-order quantities without a pass of our own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.jacobian import Jacobian
from lightning_curv.own_passes import own_pass, unheard
from lightning_curv.passes import Passes, parameters
from lightning_curv.records import Use
from lightning_curv.terms import Term


class Listener:
    """Takes the gradients of the coming backward pass where they reach the parameters' ops.

    A parameter's Jacobian is complete when the last of its ops is reached; its gradient is known a little later. It is
    evaluated and dropped at once, so that no more than the cotangents of the pass are held.

    Args:
        passes: The graph.
        evaluate: Receives the Jacobian of every parameter.
        totals: Whether to wait for the gradient, the sum over the samples.
        failed: Receives an error instead of the backward pass, after which nothing more is listened to.
    """

    def __init__(
        self,
        passes: Passes,
        evaluate: Callable[[Jacobian], None],
        totals: bool = True,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._passes, self._evaluate, self._failed = passes, evaluate, failed
        self._terms: dict[Tensor, list[Term]] = defaultdict(list)
        self._deaf = False
        uses = [(node, use, parameters(use)) for node, use in passes.tape.uses.items() if use.operands]
        self._handles = [use[0].register_prehook(self._hook(self._arrive, *use)) for use in uses]
        self._waiting = Counter(parameter for *_, found in uses for parameter in found)
        for parameter in self._waiting if totals else ():
            self._waiting[parameter] += 1
            accumulate = torch.autograd.graph.get_gradient_edge(parameter).node
            self._handles.append(accumulate.register_prehook(self._hook(self._complete, parameter)))

    def stop(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Evaluate parameters whose own gradient was not asked for."""
        self.stop()
        for parameter in list(self._terms):
            self._hook(self._complete, parameter)((None,))

    def _arrive(self, gradients: tuple[Tensor | None, ...], node: Node, use: Use, found: list[Tensor]) -> None:
        g = gradients[use.output_nr]
        if g is not None:
            for parameter, term in self._passes.terms(node, use, g[None]):
                self._terms[parameter].append(term)
            for parameter in found:
                self._waiting[parameter] -= 1
                if not self._waiting[parameter]:
                    self._complete((None,), parameter)

    def _complete(self, gradients: tuple[Tensor | None, ...], parameter: Tensor) -> None:
        # the user's tensor hooks may have changed the gradient on its way
        gradient = None if parameter._backward_hooks else gradients[0]
        if terms := self._terms.pop(parameter, None):
            self._evaluate(Jacobian(parameter, terms, gradient=gradient))

    def _hook(self, function: Callable[..., None], *arguments: Any) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if own_pass() or self._deaf:
                return
            try:
                with unheard(), torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                    function(gradients, *arguments)
            except Exception as error:
                if self._failed is None:
                    raise
                self._deaf = True
                self._terms.clear()
                self._failed(error)

        return hook

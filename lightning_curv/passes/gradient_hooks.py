"""Listening to the user's backward pass: first-order quantities without a pass of our own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import Use
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


class Listener:
    """Takes the gradients of the coming backward pass where they reach the parameters' ops.

    A parameter's Jacobian is complete when the last of its ops is reached; its gradient is known a
    little later, when the op has freed what it saved. It is evaluated and dropped at once, so that
    no more than the cotangents of the pass are held.

    Args:
        passes: The graph.
        evaluate: Receives the Jacobian of every parameter.
        scope: Entered around all that is done during the pass. Where it keeps an error from the
            backward pass, nothing more is listened to.
        totals: Whether to wait for the gradient, the sum over the samples.
        section: Entered around the same, for profilers.
        wanted: Whether the Jacobian of a parameter is: ops without one that is are left alone.
    """

    def __init__(
        self,
        passes: Passes,
        evaluate: Callable[[Jacobian], None],
        scope: AbstractContextManager[None, bool],
        totals: bool = True,
        section: Callable[[], AbstractContextManager[Any]] = nullcontext,
        wanted: Callable[[Tensor], bool] = lambda _: True,
    ) -> None:
        self._passes = passes
        self._evaluate = evaluate
        self._scope = scope
        self._section = section
        self._terms: dict[Tensor, list[Term]] = defaultdict(list)
        self._bulky: dict[
            Node | Join, tuple[Use, Tensor]
        ] = {}  # uses that were reached and whose terms are not made yet
        self._stopped = False
        self._own_passes = internal_pass()  # of the thread that begins the backward pass
        self._waiting: dict[Tensor, int] = {}  # how often it is still to be reached
        self._handles = []
        late: dict[Tensor, None] = {}
        parameters_of_uses = passes.tape.parameters
        for node, use in passes.tape.uses.items():
            parameters = parameters_of_uses[node] if use.operands else []
            if any(map(wanted, parameters)):
                self._handles.append(
                    node_of(node).register_prehook(self._hook(self._arrive, node, use, parameters))
                )
                for parameter in parameters:
                    self._waiting[parameter] = self._waiting.get(parameter, 0) + 1
                if totals or _late(use):
                    late.update(dict.fromkeys(parameters))
        for parameter in late:
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
        bulky = [
            parameter for node in self._bulky for parameter in self._passes.tape.parameters[node]
        ]
        for parameter in dict.fromkeys([*self._terms, *bulky]) if self._terms or bulky else ():
            self._hook(self._complete, parameter)((None,))

    def _arrive(
        self,
        gradients: tuple[Tensor | None, ...],
        node: Node | Join,
        use: Use,
        parameters: list[Tensor],
    ) -> None:
        g = gradients[use.output_nr]
        if g is not None:
            if _late(use):
                self._bulky[node] = replace(use), g  # a copy, whose arguments are not released
            else:
                self._add(node, use, g)
            for parameter in parameters:
                self._waiting[parameter] -= 1
                if not self._waiting[parameter]:
                    self._complete((None,), parameter)

    def _add(self, node: Node | Join, use: Use, g: Tensor) -> None:
        for parameter, term in self._passes.terms(node, use, g.unsqueeze(0)):
            self._terms[parameter].append(term)

    def _complete(self, gradients: tuple[Tensor | None, ...], parameter: Tensor) -> None:
        if self._bulky:
            for node in [*self._bulky]:
                if any(other is parameter for other in self._passes.tape.parameters[node]):
                    self._add(node, *self._bulky.pop(node))
        # the user's tensor hooks may have changed the gradient on its way, and that of some samples
        # is another
        whole = not (parameter._backward_hooks or self._passes.samples.partial)
        gradient = gradients[0] if whole else None
        if terms := self._terms.pop(parameter, None):
            self._evaluate(Jacobian(parameter, terms, gradient=gradient))

    def _hook(
        self,
        function: Callable[..., None],
        *arguments: Any,
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        own_passes = self._own_passes
        watched = self._section is not nullcontext

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if own_passes.running or self._stopped:
                return
            with self._scope, own_passes:
                # As a rule nobody watches, and the pass is not differentiated again.
                if watched or torch.is_grad_enabled():
                    with self._section(), torch.no_grad():
                        function(gradients, *arguments)
                else:
                    function(gradients, *arguments)
                return
            # Reached only where the scope has kept an error.
            self._stopped = True
            self._terms.clear()
            self._bulky.clear()

        return hook


def _late(use: Use) -> bool:
    """Whether the terms can wait until the op has freed what it saved.

    Terms of parameters behind a transform need its graph.
    """
    return use.rule.defers and not any(operand.derived for operand in use.operands.values())

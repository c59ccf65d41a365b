"""Listening to the user's backward pass: first-order quantities without a pass of our own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.graph.joins import Join, node_of
from lightning_curv.graph.tape import accumulator
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import Use
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


class _Awaited:
    """A parameter whose Jacobian is awaited.

    Attributes:
        parameter: The parameter.
        node: That of an op which consumes it.
        terms: Those of the uses that were reached.
        missing: How often it is still to be reached.
        late: Whether its gradient is waited for too.
    """

    __slots__ = ("late", "missing", "node", "parameter", "terms")

    def __init__(self, parameter: Tensor, node: Node) -> None:
        self.parameter = parameter
        self.node = node
        self.terms: list[Term] = []
        self.missing = 0
        self.late = False


class Listener:
    """Takes the gradients of the coming backward pass where they reach the parameters' ops.

    A parameter's Jacobian is complete when the last of its ops is reached; its gradient is known a
    little later, when the op has freed what it saved. It is evaluated and dropped at once, so that
    no more than the cotangents of the pass are held.

    Args:
        passes: The graph.
        evaluate: Receives the Jacobian of every parameter.
        takes: Gets every error of what is done during the pass, and says whether it ends there;
            then nothing more is listened to.
        totals: Whether to wait for the gradient, the sum over the samples.
        section: Entered around the same, for profilers.
        wanted: Whether the Jacobian of a parameter is: ops without one that is are left alone.
    """

    def __init__(
        self,
        passes: Passes,
        evaluate: Callable[[Jacobian], None],
        takes: Callable[[Exception], bool],
        totals: bool = True,
        section: Callable[[], AbstractContextManager[Any]] = nullcontext,
        wanted: Callable[[Tensor], bool] = lambda _: True,
    ) -> None:
        self._passes = passes
        self._evaluate = evaluate
        self._takes = takes
        self._section = section
        # Uses that were reached and whose terms are not made yet.
        self._bulky: dict[Node | Join, tuple[Use, Tensor]] = {}
        self._stopped = False
        self._own_passes = internal_pass()  # of the thread that begins the backward pass
        # By `id`: the hash of a tensor is a function of Python's.
        self._awaited: dict[int, _Awaited] = {}
        self._handles = []
        parameters_of_uses = passes.tape.parameters
        for node, use in passes.tape.uses.items():
            parameters = parameters_of_uses[node] if use.operands else []
            if any(map(wanted, parameters)):
                place = node_of(node)
                late = totals or (use.rule.defers and _late(use))
                of_use = []
                for parameter in parameters:
                    awaited = self._awaited.get(id(parameter)) or self._new(parameter, place)
                    awaited.missing += 1
                    awaited.late = awaited.late or late
                    of_use.append(awaited)
                self._handles.append(
                    place.register_prehook(self._hook(self._arrive, node, use, of_use))
                )
        for awaited in self._awaited.values():
            if awaited.late:
                awaited.missing += 1
                leaf = accumulator(awaited.parameter, awaited.node)
                self._handles.append(leaf.register_prehook(self._hook(self._complete, awaited)))

    def stop(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Evaluate parameters whose own gradient was not asked for."""
        self.stop()
        # As a rule all was evaluated during the pass.
        for awaited in [*self._awaited.values()]:
            if awaited.terms or self._bulky:
                self._hook(self._complete, awaited)((None,))

    def _new(self, parameter: Tensor, node: Node) -> _Awaited:
        """A parameter that nothing is known of yet, of an op with this node."""
        awaited = self._awaited[id(parameter)] = _Awaited(parameter, node)
        return awaited

    def _arrive(
        self,
        gradients: tuple[Tensor | None, ...],
        node: Node | Join,
        use: Use,
        of_use: list[_Awaited],
    ) -> None:
        g = gradients[use.output_nr]
        if g is not None:
            if use.rule.defers and _late(use):
                self._bulky[node] = replace(use), g  # a copy, whose arguments are not released
            else:
                self._add(node, use, g)
            for awaited in of_use:
                awaited.missing -= 1
                if not awaited.missing:
                    self._complete((None,), awaited)

    def _add(self, node: Node | Join, use: Use, g: Tensor) -> None:
        for parameter, term in self._passes.terms(node, use, g.unsqueeze(0)):
            awaited = self._awaited.get(id(parameter)) or self._new(parameter, node_of(node))
            awaited.terms.append(term)

    def _complete(self, gradients: tuple[Tensor | None, ...], awaited: _Awaited) -> None:
        parameter = awaited.parameter
        if self._bulky:
            for node in [*self._bulky]:
                if any(other is parameter for other in self._passes.tape.parameters[node]):
                    self._add(node, *self._bulky.pop(node))
        # the user's tensor hooks may have changed the gradient on its way, and that of some samples
        # is another
        whole = not (parameter._backward_hooks or self._passes.samples.partial)
        gradient = gradients[0] if whole else None
        if awaited.terms:
            terms = awaited.terms
            awaited.terms = []
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
            try:
                with own_passes:
                    # As a rule nobody watches, and the pass is not differentiated again.
                    if watched or torch.is_grad_enabled():
                        with self._section(), torch.no_grad():
                            function(gradients, *arguments)
                    else:
                        function(gradients, *arguments)
            except Exception as error:
                if not self._takes(error):
                    raise
                self._stopped = True
                self._bulky.clear()
                for awaited in self._awaited.values():
                    awaited.terms = []

        return hook


def _late(use: Use) -> bool:
    """Whether the terms can wait until the op has freed what it saved.

    Terms of parameters behind a transform need its graph.
    """
    return use.rule.defers and not any(operand.derived for operand in use.operands.values())

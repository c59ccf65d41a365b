"""One backward pass: from a loss and a list of extensions to attributes of the parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_curv import receiving
from lightning_curv.check import SumCheck
from lightning_curv.coverage import refuse_uncovered
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.extensions.clipping import GradientReceiver
from lightning_curv.graph import find_output, walk
from lightning_curv.jacobian import Jacobian
from lightning_curv.listening import Listener
from lightning_curv.passes import Column, Passes
from lightning_curv.records import Output
from lightning_curv.samples import Samples, find_samples
from lightning_curv.sampling import default_generator
from lightning_curv.sources import Gradient, Source

_PENDING: WeakSet[Backprop] = WeakSet()  # begun and not finished


class Backprop:
    """The quantities of one backward pass.

    Call `before`, then `run` or a backward pass of the user's, then `after`. `curvature` does so around
    ``loss.backward()``.

    Args:
        loss: The root of the backward pass.
        extensions: What to compute.
        generator: Draws the targets of Monte-Carlo quantities; by default one that leaves the global state alone.
        batch_size: N, where the shapes do not tell.
        check: Compare the per-sample gradients with the gradient, and verify that samples do not mix.
        gradient: The gradient that the backward pass starts with (non-scalar roots).
        defer: Let the backward pass finish when a first-order quantity fails in it; `after` raises the error.
        output: Where the curvature of the loss enters instead of at known loss functions.

    Raises:
        UnsupportedError: A parameter, a loss or a quantity is not covered.
        RuntimeError: A recorded input was modified in place, or the check failed.
    """

    def __init__(
        self,
        loss: Tensor,
        extensions: Sequence[Extension | GraphExtension],
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        check: bool = False,
        gradient: Tensor | None = None,
        defer: bool = False,
        output: nn.Module | Output | None = None,
    ) -> None:
        if loss.grad_fn is None:
            raise RuntimeError("Expected a loss that was computed from parameters, found a tensor without a graph.")
        seed = torch.ones_like(loss) if gradient is None else gradient
        self._output = find_output(loss, output)
        tape = walk(loss.grad_fn, self._output)
        self._passes = Passes(loss, seed, tape, Samples(0, {}, {}), generator or default_generator(loss.device))
        self._extensions = [*extensions, SumCheck()] if check else list(extensions)
        self._check, self._defer = check, defer
        self._batch_size = batch_size
        self._results: dict[tuple[Extension | GraphExtension, Tensor], Any] = {}
        self._listener: Listener | None = None

    @torch.no_grad()
    def before(self) -> None:
        """Check the graph, backpropagate the columns, and listen to the coming backward pass."""
        passes = self._passes
        refuse_uncovered(passes.tape, self._extensions)
        for use in passes.tape.uses.values():
            use.check_versions()
        independent = any(extension.independent for extension in self._extensions)
        passes.samples = find_samples(passes.tape, self._probe, self._batch_size, independent, self._check)
        for node, call in passes.tape.losses.items():
            if call is self._output:
                call.arguments |= {"samples": passes.samples.count, "minor": passes.samples.losses[node].minor}
        by_source: dict[Source, list[Extension]] = defaultdict(list)
        for extension in self._extensions:
            if isinstance(extension, GraphExtension):
                self._results.update({(extension, p): result for p, result in extension.compute(passes).items()})
            else:
                by_source[extension.source].append(extension)
        gradient = by_source.pop(Gradient(), None)
        for source, extensions in by_source.items():
            for jacobians in source.jacobians(passes):
                for jacobian in jacobians.values():
                    self._evaluate(jacobian, extensions)
        if gradient:
            self._listener = Listener(passes, partial(self._evaluate, extensions=gradient), self._defer)
        _PENDING.add(self)

    def run(self, **options: Any) -> None:
        """The user's backward pass; where the gradients go to receivers, only as far as the recorded ops.

        Args:
            options: Arguments of ``Tensor.backward``.
        """
        receivers = [e for e in self._extensions if isinstance(e, GradientReceiver)]
        if receivers:
            shared = len(receivers) < len(self._extensions) or any(other is not self for other in _PENDING)
            receiving.run(self._passes, receivers, shared, **options)
        else:
            Tensor.backward(self._passes.loss, **options)

    def after(self) -> None:
        """Set the results on the parameters."""
        _PENDING.discard(self)
        listener, self._listener = self._listener, None
        try:
            if listener is not None:
                listener.finish()
        finally:
            for (extension, parameter), result in self._results.items():
                if not isinstance(extension, SumCheck):
                    setattr(parameter, extension.savefield, result)

    def abort(self) -> None:
        """Stop listening."""
        _PENDING.discard(self)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def _probe(self, loss: Node, column: Tensor) -> tuple[Tensor | None, ...]:
        return self._passes.pull(Column([self._passes.tape.losses[loss].input], [column]))

    @torch.no_grad()
    def _evaluate(self, jacobian: Jacobian, extensions: Sequence[Extension]) -> None:
        for extension in extensions:
            result = extension.evaluate(jacobian)
            key = extension, jacobian.parameter
            self._results[key] = (
                extension.merge(self._results[key], result, jacobian) if key in self._results else result
            )

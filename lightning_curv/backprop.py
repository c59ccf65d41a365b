"""One backward pass: from a loss and a list of extensions to attributes of the parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_curv.check import SumCheck
from lightning_curv.coverage import refuse_uncovered
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.graph import walk
from lightning_curv.jacobian import Jacobian
from lightning_curv.passes import Column, Passes, own_pass, parameters, unheard
from lightning_curv.recording import Use
from lightning_curv.samples import Samples, find_samples
from lightning_curv.sampling import default_generator
from lightning_curv.sources import Gradient, Source
from lightning_curv.terms import Term


class Backprop:
    """The quantities of one backward pass.

    Call `before`, then run the backward pass, then call `after`. `curvature` does so around ``loss.backward()``.

    Args:
        loss: The root of the backward pass.
        extensions: What to compute.
        generator: Draws the targets of Monte-Carlo quantities; by default one that leaves the global state alone.
        batch_size: N, where the shapes do not tell.
        check: Compare the per-sample gradients with the gradient, and verify that samples do not mix.
        gradient: The gradient that the backward pass starts with (non-scalar roots).

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
    ) -> None:
        if loss.grad_fn is None:
            raise RuntimeError("Expected a loss that was computed from parameters, found a tensor without a graph.")
        seed = torch.ones_like(loss) if gradient is None else gradient
        self._passes = Passes(
            loss, seed, walk(loss.grad_fn), Samples(0, {}, {}), generator or default_generator(loss.device)
        )
        self._check = SumCheck() if check else None
        self._extensions = [*extensions, self._check] if self._check else list(extensions)
        self._batch_size = batch_size
        self._results: dict[tuple[Extension | GraphExtension, Tensor], Any] = {}
        self._handles: list[Any] = []

    @torch.no_grad()
    def before(self) -> None:
        """Check the graph, backpropagate the columns, and listen to the coming backward pass."""
        passes = self._passes
        refuse_uncovered(passes.tape, self._extensions)
        for use in passes.tape.uses.values():
            use.check_versions()
        passes.samples = find_samples(passes.tape, self._probe, self._batch_size, self._check is not None)
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
            self._listen(gradient)

    def after(self) -> None:
        """Set the results on the parameters."""
        self.abort()
        for (extension, parameter), result in self._results.items():
            if extension is self._check:
                self._check.compare(parameter, result)
            else:
                setattr(parameter, extension.savefield, result)

    def abort(self) -> None:
        """Stop listening."""
        while self._handles:
            self._handles.pop().remove()

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

    def _listen(self, extensions: Sequence[Extension]) -> None:
        """First-order quantities: take the gradients of the coming backward pass where they reach the uses."""
        uses = {node: use for node, use in self._passes.tape.uses.items() if use.operands}
        owners = {node: parameters(use) for node, use in uses.items()}
        missing: dict[Tensor, int] = defaultdict(int)
        for group in owners.values():
            for parameter in group:
                missing[parameter] += 1
        terms: dict[Tensor, list[Term]] = defaultdict(list)

        def arrive(node: Node, g: Tensor | None) -> None:
            if g is not None:
                with unheard():
                    for parameter, term in self._passes.terms(node, uses[node], g[None]):
                        terms[parameter].append(term)
            for parameter in owners[node]:
                missing[parameter] -= 1
                if not missing[parameter] and terms[parameter]:
                    self._evaluate(Jacobian(parameter, terms.pop(parameter)), extensions)

        self._handles += [node.register_prehook(_prehook(arrive, node, use)) for node, use in uses.items()]
        if self._check:
            self._handles += self._check.listen(missing)


def _prehook(
    arrive: Callable[[Node, Tensor | None], None], node: Node, use: Use
) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        if not own_pass():
            arrive(node, gradients[use.output_nr])

    return hook

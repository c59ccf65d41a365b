"""One backward pass: from a loss and a list of extensions to attributes of the parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.check import SumCheck
from lightning_curv.coverage import refuse_uncovered
from lightning_curv.derived import pulled_back
from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.extensions.base import Extension, Gradient, Sampled, Source
from lightning_curv.graph import leaves, walk
from lightning_curv.jacobian import Jacobian
from lightning_curv.losses import LOSSES, Likelihood
from lightning_curv.recording import Use
from lightning_curv.rules import Call
from lightning_curv.samples import Place, find_samples
from lightning_curv.sampling import default_generator
from lightning_curv.terms import Term

COLUMN_BYTES = 2**28  # of cotangents that are held at once


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
        extensions: Sequence[Extension],
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        check: bool = False,
        gradient: Tensor | None = None,
    ) -> None:
        if loss.grad_fn is None:
            raise RuntimeError("Expected a loss that was computed from parameters, found a tensor without a graph.")
        self._root = GradientEdge(loss.grad_fn, loss.output_nr)
        self._seed = torch.ones_like(loss) if gradient is None else gradient
        self._check = SumCheck() if check else None
        self._extensions = [*extensions, self._check] if self._check else list(extensions)
        self._generator = generator or default_generator(loss.device)
        self._tape = walk(loss.grad_fn)
        self._batch_size = batch_size
        self._results: dict[tuple[Extension, Tensor], Any] = {}
        self._handles: list[Any] = []

    @torch.no_grad()
    def before(self) -> None:
        """Check the graph, backpropagate the columns, and listen to the coming backward pass."""
        refuse_uncovered(self._tape, self._extensions)
        for use in self._tape.uses.values():
            use.check_versions()
        by_source: dict[Source, list[Extension]] = defaultdict(list)
        for extension in self._extensions:
            by_source[extension.source].append(extension)
        gradient = by_source.pop(Gradient(), None)
        with _PASSES.unheard():
            self._samples = find_samples(self._tape, self._pull, self._batch_size, self._check is not None)
            for source, extensions in by_source.items():
                self._columns(source, extensions)
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

    # --- cotangents --------------------------------------------------------------------------------------------------

    def _edges(self) -> list[GradientEdge]:
        return [GradientEdge(node, use.output_nr) for node, use in self._tape.uses.items()]

    def _pull(self, loss: Node, column: Tensor) -> tuple[Tensor | None, ...]:
        """Backpropagate a column from the input of a loss call to the outputs of all uses."""
        return torch.autograd.grad(
            self._tape.losses[loss].input, self._edges(), column, retain_graph=True, allow_unused=True
        )

    def _likelihood(self, node: Node) -> Likelihood:
        call = self._tape.losses[node]
        (scale,) = torch.autograd.grad(self._root, GradientEdge(node, call.output_nr), self._seed, retain_graph=True)
        return LOSSES[call.function](scale, **call.arguments)

    def _columns(self, source: Source, extensions: Sequence[Extension]) -> None:
        for node in self._tape.losses:
            likelihood = self._likelihood(node)
            if isinstance(source, Sampled):
                root = source.samples**-0.5
                columns: Iterable[Tensor] = (root * likelihood.sample(self._generator) for _ in range(source.samples))
            else:
                columns = likelihood.columns(self._samples.count)
            pulled = (self._pull(node, column) for column in columns)
            bytes_ = sum(use.shape.numel() for use in self._tape.uses.values()) * self._seed.element_size()
            for chunk in _chunks(pulled, max(1, COLUMN_BYTES // max(1, bytes_))):
                self._reduce(chunk, extensions)

    def _reduce(self, columns: list[tuple[Tensor | None, ...]], extensions: Sequence[Extension]) -> None:
        terms: dict[Tensor, list[Term]] = defaultdict(list)
        for (node, use), gs in zip(self._tape.uses.items(), zip(*columns, strict=True), strict=True):
            if all(g is not None for g in gs):
                for parameter, term in self._terms(use, self._samples.uses.get(node), torch.stack(gs)):
                    terms[parameter].append(term)
        for parameter, found in terms.items():
            self._evaluate(parameter, found, extensions)

    @torch.no_grad()
    def _evaluate(self, parameter: Tensor, terms: list[Term], extensions: Sequence[Extension]) -> None:
        jacobian = Jacobian(parameter, terms)
        for extension in extensions:
            result = extension.evaluate(jacobian)
            if (extension, parameter) in self._results:
                result = extension.merge(self._results[extension, parameter], result, jacobian)
            self._results[extension, parameter] = result

    def _listen(self, extensions: Sequence[Extension]) -> None:
        """First-order quantities: take the gradients of the coming backward pass where they reach the uses."""
        owners = {node: self._parameters(use) for node, use in self._tape.uses.items()}
        missing: dict[Tensor, int] = defaultdict(int)
        for parameters in owners.values():
            for parameter in parameters:
                missing[parameter] += 1
        terms: dict[Tensor, list[Term]] = defaultdict(list)

        def arrive(node: Node, use: Use, g: Tensor | None) -> None:
            if g is not None:
                for parameter, term in self._terms(use, self._samples.uses[node], g[None]):
                    terms[parameter].append(term)
            for parameter in owners[node]:
                missing[parameter] -= 1
                if not missing[parameter] and terms[parameter]:
                    self._evaluate(parameter, terms.pop(parameter), extensions)

        for node, use in self._tape.uses.items():
            if use.operands:
                self._handles.append(node.register_prehook(_prehook(arrive, node, use)))
        if self._check:
            self._handles += self._check.listen(missing)

    # --- terms -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _parameters(use: Use) -> list[Tensor]:
        found = [leaves(o.edge) if o.derived else [o.tensor] for o in use.operands.values()]
        return list(dict.fromkeys(p for parameters in found for p in parameters))

    def _terms(self, use: Use, place: Place | None, g: Tensor) -> Iterator[tuple[Tensor, Term]]:
        """The terms of one use, for cotangents ``[V, *output]``."""
        if not use.operands or place is None:
            return
        call = Call(use.shape, tuple(use.operands), place.axis)
        g = g.reshape(len(g), *use.shape).movedim(place.axis + 1, 1)
        with torch.no_grad():
            try:
                terms = use.rule.function(
                    call, g, **{**use.arguments, **{k: o.tensor.detach() for k, o in use.operands.items()}}
                )
            except NotImplementedError as error:
                name = describe(self._parameters(use)[0])
                raise UnsupportedError(
                    f"No rule for `{use.name}` using parameter {name}: {error}. Register one with "
                    "`@lightning_curv.rule`."
                ) from error
        for name, operand in use.operands.items():
            term = terms[name].grouped(self._samples.count, place.minor)
            if operand.derived:
                yield from pulled_back(operand.edge, operand.tensor, term)
            else:
                yield operand.tensor, term


def _prehook(
    arrive: Callable[[Node, Use, Tensor | None], None], node: Node, use: Use
) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        if not _PASSES.running:
            arrive(node, use, gradients[use.output_nr])

    return hook


class _Passes:
    """Counts our own passes through graphs, which hooks must not take for the user's backward pass.

    Shared by all threads: autograd may run hooks in threads of its own.
    """

    def __init__(self) -> None:
        self.running = 0

    @contextmanager
    def unheard(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


_PASSES = _Passes()


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

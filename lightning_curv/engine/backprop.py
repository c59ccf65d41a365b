"""One backward pass: from a loss and a list of extensions to attributes of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial
from traceback import clear_frames
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_curv.differentiation.internal_pass import kept_gradients
from lightning_curv.distributed.failures import distributed
from lightning_curv.distributed.replicas import unnoticed
from lightning_curv.distributed.shards import Shard, find_shards, gathered
from lightning_curv.engine import truncated_backward
from lightning_curv.engine.extension_hook import ExtensionHook, Handover
from lightning_curv.engine.refusals import refusal, sharded_refusal
from lightning_curv.engine.sum_check import SumCheck
from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.extensions.base import Differentiable, Extension, GraphExtension
from lightning_curv.extensions.columns import Chosen, ExactGGN, LossGradient, MonteCarloGGN, Source
from lightning_curv.extensions.receiver import GradientReceiver
from lightning_curv.extensions.unevaluated import KeptJacobian
from lightning_curv.graph.tape import Tape, find_output, walk
from lightning_curv.passes.gradient_hooks import Listener
from lightning_curv.passes.owned import Samples
from lightning_curv.passes.passes import Passes
from lightning_curv.passes.randomness import Cap
from lightning_curv.passes.summands import find_summands
from lightning_curv.recording.records import Output
from lightning_curv.samples.batch import Batch
from lightning_curv.samples.finder import find_samples, whole_batch
from lightning_curv.second_derivatives.per_sample import gradients_per_sample
from lightning_curv.terms.jacobian import Jacobian

AnyExtension = Extension | GraphExtension
_PENDING: WeakSet[Backprop] = WeakSet()  # begun and not finished
_NOBODY = Samples(0, {}, {})
_GRADIENT = LossGradient()


class Backprop:
    """The quantities of one backward pass.

    Call `before`, then `run` or a backward pass of the user's, then `after`. `curvature` does so
    around `loss.backward()`.

    Args:
        loss: The root of the backward pass.
        extensions: What to compute.
        generator: Draws the targets of Monte-Carlo quantities; by default one that leaves the
            global state alone.
        batch_size: N, or all that is known of the batch.
        check: Compare the per-sample gradients with the gradient, and verify that samples do not
            mix.
        gradient: The gradient that the backward pass starts with (non-scalar roots).
        defer: Go on without an extension that fails, in `before` or during the backward pass, and
            list it in `failures` instead of raising.
        output: Where the curvature of the loss enters instead of at known loss functions.
        hook: Gets every parameter, or its module, when its results are set: those of the backward
            pass during it.
        create_graph: Whether first-order quantities are to be differentiable.
        cap: How many samples are enough for some extensions, those of the sources `LossGradient`,
            `ExactGGN` and `MonteCarloGGN`. Where all that share a source are content, their results
            are those of a random subset, sums not scaled up; where one is not, all get the whole
            batch, whose passes are made anyway.

    Attributes:
        failures: What was gone on without, and why.
        count: N, once it is known.
        counts: The number of samples behind the results of every extension that got some of the N.
        clock: Gives seconds, where prices are wanted.
        seconds: The price of every extension by this clock; a pass that several share is in that of
            each.
        spent: The price of all of them.
        section: Entered around what is done during the user's backward pass, for profilers.

    Raises:
        UnsupportedError: A parameter, a loss or a quantity is not covered.
        RuntimeError: A recorded input was modified in place, or the check failed.
    """

    def __init__(
        self,
        loss: Tensor,
        extensions: Sequence[AnyExtension],
        generator: torch.Generator | None = None,
        batch_size: int | Batch | None = None,
        check: bool = False,
        gradient: Tensor | None = None,
        defer: bool = False,
        output: nn.Module | Output | None = None,
        hook: ExtensionHook | None = None,
        create_graph: bool = False,
        cap: Cap | None = None,
    ) -> None:
        self._loss = loss
        self._where = output
        self._generator = generator
        self._gradient = gradient
        self._extensions = list(extensions)
        self._sum_check = SumCheck() if check else None
        self.defers = defer
        if isinstance(batch_size, Batch):
            self._batch = batch_size
        else:
            self._batch = Batch(batch_size)
        self._results: dict[AnyExtension, dict[Tensor, Any]] = {}
        self._listener: Listener | None = None
        self._hook = hook
        self._create_graph = create_graph
        self._cap = cap
        self._handover: Handover | None = None
        self._heard: list[Extension] = []  # evaluated during the backward pass
        self._failed: set[AnyExtension] = set()
        self._shards: dict[Tensor, Shard] = {}
        # In private steps nothing that was verified before is believed.
        self._private = True in [isinstance(e, GradientReceiver) for e in extensions]
        self._undisturbed: ExitStack | None = None
        self.failures: list[tuple[tuple[AnyExtension, ...], Exception]] = []
        self.count = 0
        self.counts: dict[AnyExtension, int] = {}
        self.clock: Callable[[], float] | None = None
        self.seconds: dict[AnyExtension, float] = {}
        self.spent = 0.0
        self.section: Callable[[], AbstractContextManager[Any]] = nullcontext

    def before(self) -> None:
        """Check the graph, backpropagate the columns, and listen to the coming backward pass."""
        with torch.set_grad_enabled(False):  # what `no_grad` does by three more calls
            try:
                self._prepare()
            finally:
                if self._undisturbed is not None:
                    self._undisturbed.close()

    def _prepare(self) -> None:
        if self._hook is None and self._sum_check is None and reads_root_alone(self._extensions):
            # The walk would cost more than all that is read.
            passes = Passes(self._loss, self._gradient, Tape(), _NOBODY)
            for extension in self._extensions:
                self._results[extension] = extension.compute(passes)  # type: ignore[union-attr]
            return
        try:
            passes = self._looked()
            self._choose(passes)
        except Exception as error:
            if not self.takes(error, self._extensions):
                raise
        if self._failed and not self._extensions:
            return
        units = _units(self._extensions, passes)
        # The gradient comes from the user's own pass; all other columns take passes of ours, now.
        gradient = units.pop(_GRADIENT, None)
        for unit, extensions in units.items():
            start = self._now()
            try:
                if isinstance(unit, GraphExtension):
                    self._results[unit] = unit.compute(passes)
                else:
                    for jacobians in unit.jacobians(self._passes_of(extensions)):
                        for jacobian in jacobians.values():
                            working = self._working(extensions)
                            # Several quantities of one J: it is kept once it has been formed.
                            jacobian.shared = len(working) > 1
                            for extension in working:
                                self._evaluate(extension, jacobian)
            except Exception as error:
                if not self.takes(error, extensions):
                    raise
            self._spend(extensions, start)
        if gradient is not None:
            # Under `create_graph` first-order quantities must have a graph themselves: no hook
            # gives that.
            if self._create_graph:
                gradient = self._differentiate(passes, gradient)
            if gradient or self._sum_check is not None:
                self._listen(gradient)
        if self._hook is not None:
            parameters = (p for used in passes.tape.parameters.values() for p in used)
            # Told of every parameter as soon as its results are there.
            self._handover = Handover(self._hook, parameters, self._leave)
        # Other contexts must know of this one: a pass that ends early would take gradients from it.
        _PENDING.add(self)

    @torch.no_grad()
    def look(self) -> None:
        """Find the samples and what is refused, without computing anything; see `failures`."""
        curved: list[AnyExtension] = self._extensions
        try:
            passes = self._looked()
            curved = [e for e in self._extensions if e.needs_likelihood]
            # To look at the curvature of a loss that is not known differentiates it.
            for part in passes.parts if curved else ():
                _ = part.flat
        except Exception as error:
            if not self.takes(error, curved):
                raise
        finally:
            if self._undisturbed is not None:
                self._undisturbed.close()

    def _looked(self) -> Passes:
        self._passes = passes = self._walked()
        shared = distributed()
        # As a rule there is nothing that our passes could disturb.
        if passes.tape.watched or shared:
            self._undisturbed = undisturbed = ExitStack()
            if passes.tape.watched:
                undisturbed.enter_context(kept_gradients(passes.tape.watched))
            if shared:
                undisturbed.enter_context(unnoticed(passes.tape.nodes))
                self._shards = find_shards(passes.tape.all_parameters)
            if self._shards:
                # Before anything can fail: all processes take part.
                undisturbed.enter_context(gathered(self._shards.values()))
        self._refuse_uncovered(passes.tape, shared)
        self._find_samples(passes)
        return passes

    def _listen(self, extensions: list[Extension]) -> None:
        """Hear the gradients of the user's pass."""
        passes = self._passes_of(extensions)
        if passes.samples.partial:
            # The gradients of some samples do not add up to that of the batch.
            self._sum_check = None
            totals = False
        else:
            totals = self._sum_check is not None
            for extension in extensions:
                totals = totals or extension.totals
        self._heard = extensions
        self._listener = Listener(
            passes,
            self._evaluate_heard,
            partial(self.takes, extensions=extensions),
            totals,
            self.section,
            self._wants,
        )

    def _wants(self, parameter: Tensor) -> bool:
        """Whether something that listens wants the gradients of a parameter."""
        if self._sum_check is not None:
            return True
        known = self._registered(parameter) if self._shards else parameter
        for extension in self._heard:  # noqa: SIM110 - a generator takes twice as long
            if extension.wants(known):
                return True
        return False

    def _registered(self, parameter: Tensor) -> Tensor:
        """The parameter that the user knows, of one in the graph."""
        shard = self._shards.get(parameter)
        return parameter if shard is None else shard.registered

    def run(self, **options: Any) -> None:
        """The user's backward pass; as far as the recorded ops where gradients go to receivers.

        Args:
            options: Arguments of `Tensor.backward`.
        """
        # Private steps take no gradients from the pass, only what the recorded ops are told.
        if self._private:
            receivers = [e for e in self._extensions if isinstance(e, GradientReceiver)]
        else:
            receivers = []
        if receivers:
            others = len(receivers) < len(self._extensions) or self._sum_check is not None
            shared = others or any(other is not self for other in _PENDING)
            truncated_backward.run(self._passes, receivers, shared, self._shards, **options)
        else:
            Tensor.backward(self._loss, **options)

    def after(self) -> None:
        """Set the results on the parameters."""
        # Nothing is set before all is computed: an error leaves no parameter half done.
        finished = self.finish()
        if self._handover is not None:
            self._handover.finish()
        for extension, results in finished.items():
            for parameter, result in results.items():
                setattr(parameter, extension.savefield, result)

    def finish(self) -> dict[AnyExtension, dict[Tensor, Any]]:
        """The results by extension and parameter, once the backward pass is through."""
        _PENDING.discard(self)
        listener = self._listener
        self._listener = None
        if listener is not None:
            listener.finish()
        if not self._shards:
            return self._results
        return {
            extension: {self._registered(p): result for p, result in results.items()}
            for extension, results in self._results.items()
        }

    def abort(self) -> None:
        """Stop listening."""
        if self._handover is not None:
            self._handover.stop()
        _PENDING.discard(self)
        listener = self._listener
        self._listener = None
        if listener is not None:
            listener.stop()

    def _leave(self, parameter: Tensor) -> bool:
        """Set a parameter's results, which are then no longer ours.

        False if none are there, or some are to come.
        """
        if self._listener is not None and any(
            parameter not in self._results.get(extension, {})
            for extension in self._working(self._heard)
            if extension.wants(parameter)
        ):
            return False
        ready = [e for e, results in self._results.items() if parameter in results]
        for extension in ready:
            setattr(parameter, extension.savefield, self._results[extension].pop(parameter))
        return bool(ready)

    def _walked(self) -> Passes:
        loss = self._loss
        if loss.grad_fn is None:
            raise RuntimeError(
                "Expected a loss that was computed from parameters, found a tensor without a graph."
            )
        self._output = find_output(loss, self._where)
        tape = walk(loss.grad_fn, self._output)
        # A change in place since the forward pass is found before anything is computed from it.
        for use in tape.uses.values():
            use.check()
        for call in tape.losses.values():
            call.check()
        # The samples are found with the help of passes: until then there are none.
        return Passes(loss, self._gradient, tape, _NOBODY, self._output, self._generator)

    def _refuse_uncovered(self, tape: Tape, shared: bool) -> None:
        stays = self._hook is None and not self._create_graph
        reasons: dict[AnyExtension, str] = {}
        for extension in self._extensions:
            reason = None
            if shared:
                reason = sharded_refusal(tape, extension, self._shards, stays)
            reason = reason or refusal(tape, extension, self._output is not None)
            if reason:
                reasons[extension] = reason
        if reasons:
            # One error for all that are refused, in the words of the first.
            error = UnsupportedError(next(iter(reasons.values())))
            if not self.takes(error, [*reasons]):
                raise error

    def _find_samples(self, passes: Passes) -> None:
        """Where they are; if samples influence each other, once more for what allows that."""
        # A failure takes some extensions away: what is left may be content with less.
        while wanting := [e for e in self._extensions if self._needs_samples(e)]:
            independent = [e for e in wanting if e.independent]
            try:
                if self._cap is not None and self._content(wanting):
                    most = self._cap.size
                else:
                    most = None
                passes.separate = bool(independent)
                passes.samples = find_samples(
                    passes,
                    self._batch,
                    bool(independent),
                    self._sum_check is not None,
                    most,
                    self._private,
                )
                break
            except Exception as error:
                batchwise = all(extension.batchwise for extension in wanting)
                if batchwise and isinstance(error, UnsupportedError):
                    passes.samples = whole_batch(passes.tape)
                    break
                if not self.takes(error, independent or wanting):
                    raise
        else:
            passes.samples = whole_batch(passes.tape)
        # Cached properties that depend on the samples.
        passes.forget()

    def _choose(self, passes: Passes) -> None:
        """The passes of the samples that are enough for some extensions."""
        self.count = passes.samples.count
        chosen = None if self._cap is None else self._cap.choose(self.count)
        self._some = passes if chosen is None else passes.only(chosen)

    def _passes_of(self, extensions: Sequence[AnyExtension]) -> Passes:
        """Those of what shares a source: of all samples, or of some if that is enough for all."""
        if not self._some.samples.partial or not self._content(extensions):
            return self._passes
        self.counts.update(dict.fromkeys(extensions, self._some.samples.count))
        return self._some

    def _content(self, extensions: Sequence[AnyExtension]) -> bool:
        """Whether a subset of the samples is enough for all of them."""
        return self._cap is not None and all(
            extension in self._cap.extensions
            and isinstance(extension, Extension)
            and isinstance(extension.source, (LossGradient, ExactGGN, MonteCarloGGN))
            for extension in extensions
        )

    def _needs_samples(self, extension: AnyExtension) -> bool:
        """Whether a quantity, or the curvature of an unknown loss, needs the samples."""
        return extension.needs_samples or (extension.needs_likelihood and self._differentiates_loss)

    @cached_property
    def _differentiates_loss(self) -> bool:
        """Whether there is more to the loss than known loss functions."""
        return self._output is not None or bool(find_summands(self._passes.tape, self._loss).others)

    def _differentiate(self, passes: Passes, extensions: list[Extension]) -> list[Extension]:
        """Give those that can have one a graph, and return the others."""
        differentiable = [e for e in extensions if isinstance(e, Differentiable)]
        if differentiable:
            gradients = gradients_per_sample(passes)
            with torch.enable_grad():
                for extension in differentiable:
                    self._results[extension] = {
                        parameter: extension.of_gradients(rows)
                        for parameter, rows in gradients.items()
                    }
        return [e for e in extensions if not isinstance(e, Differentiable)]

    def _evaluate_heard(self, jacobian: Jacobian) -> None:
        """Evaluate what listens to the user's pass, and check the sum of the gradients."""
        working = self._working(self._heard) if self._failed else self._heard
        checked = self._sum_check is not None
        jacobian.shared = len(working) + checked > 1
        known = jacobian.parameter
        if self._shards:
            known = self._registered(known)
        for extension in working:
            if extension.wants(known):
                if self.clock is None:
                    self._evaluate(extension, jacobian)
                else:
                    start = self._now()
                    self._evaluate(extension, jacobian)
                    self._spend([extension], start)
        if self._sum_check is not None:
            start = self._now()
            # Its error is for the scope of the listener: what is wrong is so in all quantities.
            self._sum_check.compare(jacobian)
            self._spend([], start)

    def _working(self, extensions: list[Extension]) -> list[Extension]:
        """Those that have not failed."""
        if not self._failed:
            return extensions
        return [extension for extension in extensions if extension not in self._failed]

    def _evaluate(self, extension: Extension, jacobian: Jacobian) -> None:
        """Evaluate one quantity on one parameter's Jacobian."""
        parameter = jacobian.parameter
        if self._shards and isinstance(extension, KeptJacobian):
            jacobian = _apart(jacobian, self._shards)
        try:
            results = self._results.setdefault(extension, {})
            # A parameter whose columns come in several portions.
            previous = results.get(parameter)
            if previous is None:
                results[parameter] = extension.evaluate(jacobian)
            else:
                results[parameter] = extension.accumulate(previous, jacobian)
        except Exception as error:
            if not self.takes(error, [extension], parameter):
                raise

    def _now(self) -> float:
        return 0.0 if self.clock is None else self.clock()

    def _spend(self, extensions: Sequence[AnyExtension], start: float) -> None:
        """Note the time since the start for every one of some extensions, which shared it."""
        if self.clock is not None:
            seconds = self.clock() - start
            self.spent += seconds
            self.seconds.update((e, self.seconds.get(e, 0.0) + seconds) for e in extensions)

    def takes(
        self,
        error: Exception,
        extensions: Sequence[AnyExtension],
        parameter: Tensor | None = None,
    ) -> bool:
        """Whether an error of ours ends here, and only takes some extensions down: the only place.

        So it does where the backward pass goes on after failures. Elsewhere it is to be raised, and
        gets a note on the quantity and the parameter.

        Args:
            error: The error.
            extensions: What cannot be computed because of it.
            parameter: What they are computed of, where that is one parameter.
        """
        if self.defers:
            self.fail(extensions, error)
            return True
        # From Python 3.11 on, an error takes notes.
        if parameter is not None and hasattr(error, "add_note"):
            names = ", ".join(map(repr, extensions))
            error.add_note(f"This concerns {names} of parameter {describe(parameter)}.")
        return False

    def fail(self, extensions: Sequence[AnyExtension], error: Exception) -> None:
        """Go on without some extensions, and free what they had in memory."""
        # Frames of an exception hold their local variables, J of the parameter among them.
        link: BaseException | None = error
        while link is not None:
            clear_frames(link.__traceback__)
            link = link.__context__
        failing = tuple(extension for extension in extensions if extension not in self._failed)
        self.failures.append((failing, error))
        self._failed.update(failing)
        self._extensions = [e for e in self._extensions if e not in self._failed]
        self._results = {
            extension: results
            for extension, results in self._results.items()
            if extension not in self._failed
        }


def reads_root_alone(extensions: Sequence[AnyExtension]) -> bool:
    """Whether the loss is all that is read of the graph by all of some extensions, at least one."""
    # Only quantities that make passes of their own say so.
    for extension in extensions:
        if not getattr(extension, "reads_root", False):
            return False
    return bool(extensions)


def _apart(jacobian: Jacobian, parameters: Iterable[Tensor]) -> Jacobian:
    """A Jacobian that outlives gathered parameters: FSDP frees their memory, whoever has views."""
    freed = {parameter.untyped_storage()._cdata for parameter in parameters}

    def kept(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage()._cdata in freed else tensor

    terms = [
        term.of(kept(term.g), None if term.x is None else kept(term.x)) for term in jacobian.terms
    ]
    return Jacobian(jacobian.parameter, terms, jacobian.signs)


def _units(
    extensions: Sequence[AnyExtension],
    passes: Passes,
) -> dict[GraphExtension | Source, list[Any]]:
    """Group what shares passes, in the order of the list.

    What comes first draws the same numbers whatever follows.
    """
    units: dict[GraphExtension | Source, list[Any]] = {}
    for extension in extensions:
        unit = extension if isinstance(extension, GraphExtension) else extension.source
        if isinstance(unit, Chosen):
            unit = unit.on(passes)
        units.setdefault(unit, []).append(extension)
    if len(extensions) == 1:
        return units
    kinds_of_exact = [unit for unit in units if isinstance(unit, ExactGGN)]
    if len(kinds_of_exact) > 1:  # the complete root serves all that need any
        units[ExactGGN(complete=True)] += units.pop(ExactGGN())
    for unit, group in units.items():
        if len(group) > 1 and not isinstance(unit, GraphExtension):
            group.sort(key=lambda extension: not extension.forms)
    return units

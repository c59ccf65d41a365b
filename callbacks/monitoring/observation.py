"""Extensions around the user's backward passes of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.callbacks.monitoring.support import for_trainers
from lightning_curv.callbacks.user_batch import BatchSize, describe_batch
from lightning_curv.engine.backprop import Backprop, reads_root_alone
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions.base import Extension, GraphExtension, LossGradient
from lightning_curv.passes.randomness import Cap
from lightning_curv.samples.batch import Batch

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

AnyExtension = Extension | GraphExtension
Fields = dict[str, dict[Parameter, Any]]  # results by savefield and parameter


class Observation:
    """What is computed in one batch; nothing by default.

    Args:
        supplied: stays on the parameters until `release`.
        logged: does not get there.
        seed: of random labels, asked for where some are drawn.
        output: the network's output, if the loss is no known function.
        batch_size: the number of samples, or a function of the batch.
        max_samples: how many of them are enough for what is logged and not supplied.
        considered: what may be logged in later batches: `look` tells whether it can be.

    Attributes:
        size: the number of samples that the batch says it has, if it does.
        count: the number of samples of the last backward pass.
        counts: by savefield, of how many samples its results are, where these are a subset.
        clock: gives seconds, where prices are wanted.
        seconds: by savefield; a pass that several share is in that of each.
        spent: on all of them.
        section: entered around what is done during the user's backward pass, for profilers.
    """

    def __init__(
        self,
        supplied: Sequence[AnyExtension] = (),
        logged: Sequence[AnyExtension] = (),
        seed: Callable[[], int] = int,
        output: nn.Module | None = None,
        batch_size: BatchSize = None,
        max_samples: int | None = None,
        considered: Sequence[AnyExtension] = (),
    ) -> None:
        self.considered = list(considered)
        self.supplied, self.logged = list(supplied), list(logged)
        self._seed, self._output = seed, output
        self._batch_size, self._batch = batch_size, Batch()
        self._max_samples, self._subsets = (
            max_samples,
            None if max_samples is None else _subsets(seed()),
        )
        self._generator: torch.Generator | None = None
        self._backprop: Backprop | None = None
        self._failures: list[tuple[tuple[AnyExtension, ...], Exception]] = []
        self._unrecorded: Exception | None = None
        self._left: list[tuple[Tensor, str]] = []  # fields of parameters
        self.count = 0
        self.counts: dict[str, int] = {}
        self.clock: Callable[[], float] | None = None
        self.seconds: dict[str, float] = {}
        self.spent = 0.0
        self.section: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __bool__(self) -> bool:
        return bool(self.supplied or self.logged or self.considered)

    @property
    def records(self) -> bool:
        """Whether more of the graph is read than the loss."""
        measured = bool(self.logged or self.considered)
        return measured or (bool(self.supplied) and not reads_root_alone(self.supplied))

    def read(self, batch: Any) -> None:
        """Before `training_step`: what its batch says of the samples."""
        self._batch = describe_batch(batch, self._batch_size)

    def fail(self, error: Exception) -> None:
        """After `training_step`: it could not be recorded, and nothing of this batch is known."""
        self._unrecorded = error

    @property
    def size(self) -> int | None:
        """N, as far as the batch says it."""
        return self._batch.expected if self._batch.size is None else self._batch.size

    def look(self, loss: Tensor, seed: Tensor) -> dict[str, Exception]:
        """Before a backward pass: savefields that cannot be computed on this graph, and why.

        Of what is considered.

        Args:
            loss: as for `begin`.
            seed: as for `begin`.
        """
        considered, self.considered = self.considered, []
        if self._unrecorded is not None:
            return {extension.savefield: self._unrecorded for extension in considered}
        cap = None
        if self._max_samples is not None and self._subsets is not None:
            cap = Cap(self._max_samples, considered, self._subsets)
        backprop = Backprop(
            loss,
            considered,
            None,
            self._batch,
            False,
            seed,
            defer=True,
            output=self._output,
            cap=cap,
        )
        backprop.look()
        return {e.savefield: error for extensions, error in backprop.failures for e in extensions}

    def begin(self, loss: Tensor, seed: Tensor, check: bool) -> None:
        """Before a backward pass.

        Args:
            loss: the root of the pass, or a tensor below it.
            seed: the gradient there of the loss as the user returned it: curvature is that of this
                loss, not of what Lightning scaled. First-order quantities come from the user's own
                pass and carry its factor.
            check: do the per-sample gradients add up to the gradient?
        """
        fields = {extension.savefield for extension in self.supplied}
        logged = [e for e in self.logged if e.savefield not in fields]
        extensions = [*self.supplied, *logged]
        if self._unrecorded is not None:
            self._failures.append((tuple(extensions), self._unrecorded))
            return
        check = check and not all(map(_draws, extensions))  # of gradients, if there are any
        cap = None
        if self._max_samples is not None and self._subsets is not None:
            cap = Cap(self._max_samples, logged, self._subsets)
        # Once per batch: its backward passes draw different labels.
        if self._generator is None and any(map(_draws, extensions)):
            self._generator = torch.Generator(loss.device).manual_seed(self._seed())
        backprop = self._backprop = Backprop(
            loss,
            extensions,
            self._generator,
            self._batch,
            check,
            seed,
            defer=True,
            output=self._output,
            cap=cap,
        )
        backprop.clock, backprop.section = self.clock, self.section
        try:
            backprop.before()
        except Exception as error:
            backprop.abort()
            self._backprop = None
            self._failures.append((tuple(extensions), error))
            return
        # Told before the pass; `finish` tells of what fails during it.
        self._failures, backprop.failures = backprop.failures, []

    def finish(self) -> Fields:
        """After the pass: leave what is supplied on the parameters, return what is logged."""
        backprop, self._backprop = self._backprop, None
        if backprop is None:
            return {}
        try:
            results = backprop.finish()
        except Exception as error:
            backprop.abort()
            self._failures.append(((*self.supplied, *self.logged), error))
            return {}
        self._failures = backprop.failures
        self.seconds = {
            extension.savefield: seconds for extension, seconds in backprop.seconds.items()
        }
        self.spent = backprop.spent
        self.count = backprop.count
        self.counts = {extension.savefield: count for extension, count in backprop.counts.items()}
        by_field: dict[str, dict[Any, Any]] = {extension.savefield: {} for extension in self.logged}
        for extension, by_parameter in results.items():
            if extension in self.supplied:
                for parameter, result in by_parameter.items():
                    setattr(parameter, extension.savefield, result)
                    self._left.append((parameter, extension.savefield))
            if extension.savefield in by_field:
                by_field[extension.savefield] = by_parameter
        return by_field

    def failures(self) -> Iterator[tuple[set[str], Exception]]:
        """Savefields that could not be computed and why, each only once."""
        while self._failures:
            extensions, error = self._failures.pop()
            fields = {extension.savefield for extension in extensions}
            self.logged = [e for e in self.logged if e.savefield not in fields]
            self.supplied = [e for e in self.supplied if e.savefield not in fields]
            yield fields, error

    def release(self) -> None:
        """Leave nothing of this batch behind."""
        self._batch = Batch()
        self._unrecorded = None
        if self._backprop is not None:
            self._backprop.abort()
            self._backprop = None
        while self._left:
            parameter, field = self._left.pop()
            vars(parameter).pop(field, None)


def _draws(extension: AnyExtension) -> bool:
    return not (isinstance(extension, Extension) and extension.source == LossGradient())


def _subsets(seed: int) -> torch.Generator:
    """Draws who is measured; the random labels have the seed itself and must not depend on that."""
    return torch.Generator().manual_seed(hash((seed, 1)))


def seed_of_batch(trainer: Trainer, seed: int) -> int:
    """A hash spreads neighbouring batches and ranks.

    Nothing needs to be saved to draw the same after a restart.
    """
    # Of numbers alone: their hash is the same in every process, that of strings is not.
    return hash((seed, trainer.global_rank, trainer.fit_loop.total_batch_idx))


def required_extensions(optimizers: Iterable[Optimizer], partial: bool) -> list[AnyExtension]:
    """What optimizers ask for, of each savefield the first.

    Args:
        optimizers: all that ask.
        partial: whether it is for a micro-batch that is not the last one.
    """
    wanted = "accumulated_extensions" if partial else "required_extensions"
    by_field: dict[str, AnyExtension] = {}
    for optimizer in optimizers:
        for extension in getattr(optimizer, wanted, tuple)():
            by_field.setdefault(extension.savefield, extension)
    return list(by_field.values())


def explained(error: Exception, names: Sequence[str]) -> RuntimeError:
    """The error with the quantities that it stops, and what to do."""
    kind = type(error) if isinstance(error, RuntimeError) else RuntimeError
    drawn = "`mc_samples=0` leaves out the GGN trace and " if "ggn_trace" in names else ""
    return kind(
        f"{for_trainers(error)} (CurvatureCallback needs this for {', '.join(names)}. {drawn}"
        "`quantities` chooses what is computed; `strict=False` trains on without.)"
    )


def for_optimizers(error: Exception) -> Exception:
    """The error with advice for those who have a Trainer."""
    text = for_trainers(error)
    if text == str(error) or not isinstance(error, UnsupportedError):
        return error
    told = type(error)(text)
    told.__cause__ = error
    return told

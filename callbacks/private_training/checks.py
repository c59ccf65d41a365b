"""The checks of a private run.

Do samples influence each other, and does anything else learn from them?
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curv.callbacks.import_names import MisconfigurationException, imported
from lightning_curv.callbacks.private_training.collation import refuse_mixed_batches
from lightning_curv.callbacks.private_training.independence import refuse_coupled_samples
from lightning_curv.callbacks.private_training.state import StateWatch
from lightning_curv.distributed.shards import passes_apart
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_FIRST_ROUNDS = 3  # pairs of batches of a loader that are compared at first


class Checks:
    """When to check what, during one `fit`.

    The engine proves at every backward pass which sample owns which row. What it cannot see,
    dependence without a gradient (counts, maxima, detached statistics), is looked for on batches:
    the 1st, 2nd, 5th, 10th, 20th, ... one that has two samples, and every one that changes a
    parameter or buffer in a way that is not known yet.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        optimizer: Its private optimizer.
        mean: Whether the loss is a mean over the samples.
        public_state: Patterns of names of parameters and buffers that may change.
        gradients: Whether gradients are compared; else only parameters and buffers are watched.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: DPOptimizer,
        mean: bool,
        public_state: Sequence[str],
        gradients: bool,
    ) -> None:
        self._trainer, self._module, self._mean, self._gradients = (
            trainer,
            pl_module,
            mean,
            gradients,
        )
        self._optimizer = optimizer
        self._watch = StateWatch(pl_module, optimizer, public_state)
        self._loader: DataLoader | None = None
        self._seen, self._due = 0, 1  # batches with two samples or more; the next one to check
        self._unknown: set[str] = set()  # changed during training steps
        self._began = False

    def before(
        self, batch: Any, batch_idx: int, size: int | None, loader: DataLoader | None
    ) -> None:
        """A batch is about to be trained on."""
        self.between()
        count = samples_in(batch) if size is None else size
        several = count is not None and count >= 2
        self._seen += several
        checked = several and self._seen >= self._due
        new = loader is not None and loader is not self._loader
        compared = self._gradients and (new or checked)
        with self._apart(compared):
            if compared and loader is not None:
                rounds = _FIRST_ROUNDS if new else 1
                self._loader = loader
                refuse_mixed_batches(self._trainer, self._module, loader, self._mean, rounds)
            if checked:
                self._due = _next_of_series(self._due)
                if self._gradients:
                    self._look(batch, batch_idx, count)
        # Values of parameters are read on checked batches only; versions cost little.
        self._watch.begin(values=checked)
        self._began = True

    def before_step(self) -> None:
        """The optimizer is about to step."""
        self._unknown |= self._watch.changed()

    def after(self, batch: Any, batch_idx: int, size: int | None) -> None:
        """A batch was trained on."""
        self._unknown |= self._watch.changed()
        count = samples_in(batch) if size is None else size
        can_tell = count is None or count >= 2
        told = bool(self._unknown) and can_tell
        with self._apart(told):
            if told:
                # So that it is made again, of other samples.
                with self._watch.without(self._unknown):
                    self._look(batch, batch_idx, count)
        if not self._unknown:
            return
        if not can_tell:
            self._watch.begin(values=False)  # wait for a batch that can tell
            return
        unknown, self._unknown = self._unknown, set()
        self._watch.begin(values=False)
        self._refuse(self._watch.unexpected(unknown))

    def after_epoch(self) -> None:
        """An epoch is over: until the next batch nothing else may learn from the data either."""
        self._wait(values=False)

    def between(self) -> None:
        """Something else is about to happen: hooks that ran after the step had the batch too."""
        if self._began:
            self._began = False
            self._refuse(self._watch.changed())

    def finish(self) -> None:
        """Training is over; hooks that run at its end may still follow."""
        # Until then everything is moved to the processor: versions tell nothing, values do.
        self._wait(values=True)
        self._refuse(self._watch.unexpected(self._unknown))

    def _wait(self, values: bool) -> None:
        """Nothing has changed since the step, and nothing may until something else happens."""
        self.between()
        self._watch.begin(values=values)
        self._began = True

    def after_end(self) -> None:
        """The last hook has run."""
        if not _averages_weights(self._trainer):
            self.between()

    def close(self) -> None:
        """Let go of the optimizer."""
        self._watch.close()

    def _apart(self, wanted: bool) -> AbstractContextManager[None]:
        """Where a process may run training steps that the others do not run."""
        return passes_apart(self._module.parameters(), wanted)

    def _look(self, batch: Any, batch_idx: int, size: int | None) -> None:
        if size is not None and size >= 2:
            steady = refuse_coupled_samples(
                self._module,
                batch,
                batch_idx,
                size,
                self._mean,
                self._gradients,
                self._optimizer.clipping,
            )
            self._watch.allow(steady or set())

    @staticmethod
    def _refuse(names: set[str]) -> None:
        if names:
            some = ", ".join(f"`{name}`" for name in sorted(names)[:4])
            raise MisconfigurationException(
                "PrivacyCallback needs a model that learns by its private optimizer alone, found "
                f"that something else changed {some} around a batch, after an epoch or at the end "
                "(another optimizer, a callback or hook): no noise covers that. Leave it out; or, "
                "if no data is looked at (moving averages of weights, clamping), name it in "
                "`PrivacyCallback(public_state=[...])`."
            )


def _averages_weights(trainer: Trainer) -> bool:
    """Whether Lightning itself puts an average of the released weights in their place at the end.

    Such an average is a function of what was released, and costs no privacy.
    """
    names = ("StochasticWeightAveraging", "WeightAveraging")
    kinds = [
        getattr(copy.callbacks, name)
        for copy in imported()
        for name in names
        if hasattr(copy.callbacks, name)  # older copies lack the second one
    ]
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, tuple(kinds)) for callback in callbacks)


def _next_of_series(number: int) -> int:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** (len(str(number)) - 1)
    return {1: 2, 2: 5, 5: 10}[number // power] * power


def samples_in(batch: Any) -> int | None:
    """The number of samples: the length of the first tensor."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    entries = (
        batch.values()
        if isinstance(batch, dict)
        else batch
        if isinstance(batch, (list, tuple))
        else ()
    )
    return next((size for size in map(samples_in, entries) if size is not None), None)

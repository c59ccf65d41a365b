"""What of the chosen quantities can be computed in a run, and what is said where one cannot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_curv.callbacks.monitoring.norm_layers import (
    NORM_LAYERS,
    no_norm_layers,
    norm_parameters,
)
from lightning_curv.callbacks.monitoring.observation import AnyExtension, Observation, explained
from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.quantities import FIELDS, Quantity
from lightning_curv.callbacks.monitoring.support import announcement, for_trainers, reason
from lightning_curv.errors import SampleCountError, UnsupportedError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Availability:
    """What there is of the chosen quantities.

    Args:
        quantities: what was chosen.
        extensions: computed for other callbacks.
        named: quantities that the user asked for by name.
        strict: whether the run ends where something that was asked for cannot be computed.
        mc_samples: random labels per Monte-Carlo quantity.
        module: the model.

    Attributes:
        off: savefields, and names of quantities, that cannot be computed, and why.
        looked: whether the graph of a batch has been asked.
    """

    def __init__(
        self,
        quantities: Sequence[Quantity] = (),
        extensions: Sequence[AnyExtension] = (),
        named: Collection[str] = (),
        strict: bool = True,
        mc_samples: int = 1,
        module: nn.Module | None = None,
    ) -> None:
        self._quantities, self._extensions = quantities, extensions
        self._named, self._strict, self._mc_samples = named, strict, mc_samples
        self._module = nn.Module() if module is None else module
        self.off: dict[str, Exception] = {}
        self.looked = False

    def considered(self) -> list[AnyExtension]:
        """All that may have to be computed for logging in this run."""
        fields = dict.fromkeys(
            field
            for quantity in self._quantities
            for field in (*quantity.fields, *quantity.instead)
        )
        extensions = [
            FIELDS[name](self._mc_samples, self._module) for name in fields if name in FIELDS
        ]
        # Where no quantity needs a graph, there is nothing to look for in one.
        self.looked = not extensions
        return [*extensions, *self._extensions]

    def look(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        observation: Observation,
        loss: Tensor,
        seed: Tensor,
    ) -> Mapping[str, Exception]:
        """At the first graph: what the model has, what it has not, and one warning for all of it.

        Args:
            trainer: of the run.
            pl_module: the model.
            observation: of the batch.
            loss: root of the backward pass, see `Observation.begin`.
            seed: the gradient there.

        Returns:
            What cannot be computed on this graph, and why.
        """
        self.looked = True
        considered = {extension.savefield for extension in observation.considered}
        try:
            refused = observation.look(loss, seed)
        except Exception as error:  # of ours: training goes on
            refused = dict.fromkeys(considered, error)
        # The graph refuses parameters; of none at all it has nothing to say.
        if NORM_LAYERS in considered and not norm_parameters(self._module):
            refused = {**refused, NORM_LAYERS: no_norm_layers()}
        without_parts = _without_parts(trainer, pl_module, observation.size)
        # Raises in a strict run, for what was asked for; the rest is told in one sentence below.
        for field, refusal in refused.items():
            self._lost({field}, refusal, {**refused, **without_parts})
        self.off = {
            name: error for name, error in refused.items() if name in FIELDS
        }  # the rest is tried
        off = {**without_parts, **self.off}
        less = any(reason(quantity, off) is not None for quantity in self._quantities)
        say = rank_zero_warn if less else rank_zero_info
        say(announcement(self._quantities, off))
        return refused

    def leave_out(self, what: Collection[str], error: Exception) -> None:
        """What fails in the course of the run is not logged in the rest of it, or stops it.

        Args:
            what: savefields or names.
            error: why they cannot be computed.
        """
        failed = {q.name for q in self._quantities if {q.name, *q.fields, *q.instead} & {*what}} | {
            *what
        }
        off = {**self.off, **{name: error for name in failed if name not in self.off}}
        new = [name for name in self._lost(failed, error, off) if name not in self.off]
        if new:
            rank_zero_warn(
                f"CurvatureCallback stops logging {', '.join(new)}: {for_trainers(error)}"
            )
        self.off = off

    def _lost(self, what: Collection[str], error: Exception, off: Collection[str]) -> list[str]:
        """What is lost with savefields or quantities; it ends the run if the user asked for it.

        Args:
            what: savefields or names.
            error: why they cannot be computed.
            off: all that cannot be.
        """
        touched = [q for q in self._quantities if {q.name, *q.fields, *q.instead} & {*what}]
        lost = [quantity.name for quantity in touched if quantity.path(off) is None]
        extensions = [
            repr(extension) for extension in self._extensions if extension.savefield in what
        ]
        asked = [*(name for name in lost if name in self._named), *extensions]
        if isinstance(error, SampleCountError):  # the user gave it
            asked = [*lost, *extensions]
        if self._strict and asked:
            raise explained(error, asked) from error
        return lost + extensions


def _without_parts(
    trainer: Trainer, pl_module: LightningModule, size: int | None
) -> dict[str, Exception]:
    """Why there is no noise from the gradients of parts of a batch, if there is none.

    Args:
        trainer: of the run.
        pl_module: the model.
        size: number of samples in the batch, if it is known.
    """
    # Strategies for one device have no such attribute.
    processes = getattr(trainer.strategy, "world_size", 1)
    parts = processes * (trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1)
    if parts == 1:
        text = "with `accumulate_grad_batches=2` the noise would come from micro-batches"
    elif size is None:
        text = "with `batch_size=` the noise would come from micro-batches"
    else:
        return {}
    return {PARTS: UnsupportedError(text)}

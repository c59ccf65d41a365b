"""What `CurvatureCallback` would log for a model: by which path, or why not, and at what price."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_curv.callbacks.import_names import MisconfigurationException, from_lightning
from lightning_curv.callbacks.monitoring.measurement import EIGENVALUES
from lightning_curv.callbacks.monitoring.norm_layers import (
    NORM_LAYERS,
    no_norm_layers,
    norm_parameters,
)
from lightning_curv.callbacks.monitoring.observation import AnyExtension, Observation
from lightning_curv.callbacks.monitoring.parts import PARTS
from lightning_curv.callbacks.monitoring.prices import by_quantity, clock
from lightning_curv.callbacks.monitoring.quantities import FIELDS, SAMPLED, Quantity
from lightning_curv.callbacks.monitoring.support import how, in_short, reason
from lightning_curv.callbacks.private_training.undisturbed import undisturbed
from lightning_curv.callbacks.recorded_step import eager, loss_of
from lightning_curv.recording.record import record

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

BRIEF = 1.0  # seconds


@dataclass(frozen=True)
class Row:
    """What becomes of one quantity.

    Args:
        quantity: its name.
        path: "exact", "Monte-Carlo", "Lanczos", another way to it, or "not".
        reason: why it is not, or by that other way.
        price: in training steps, alone; `None`: it is not computed, or comes with the gradient.
    """

    quantity: str
    path: str
    reason: str = ""
    price: float | None = None


@dataclass(frozen=True)
class Preview:
    """A table of what is logged; `str` of it is to be read.

    Args:
        rows: one per quantity.
        samples: in the batch, as far as it says so.
        step: seconds of a training step without.
        logged: seconds of a logged one.
    """

    rows: Sequence[Row]
    samples: int | None
    step: float
    logged: float

    def __str__(self) -> str:
        width = max((len(row.quantity) for row in self.rows), default=0)
        reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason))
        lines = [f"{'quantity':{width}}  {'steps':>7}  how"]
        for row in self.rows:
            price = "-" if row.price is None else f"{row.price:.2f}"
            note = f" ({reasons.index(row.reason) + 1})" if row.reason else ""
            lines.append(f"{row.quantity:{width}}  {price:>7}  {row.path}{note}")
        lines += [f"({number}) {reason}" for number, reason in enumerate(reasons, start=1)]
        known = "an unknown number of" if self.samples is None else self.samples
        times = (
            f"{1e3 * self.step:.3g} ms, a logged one {self.logged / self.step:.1f} times as long"
        )
        lines.append(
            f"A step of {known} samples takes {times}; the price of what several share is in each."
        )
        return "\n".join(lines)


def preview(
    module: LightningModule,
    batch: Any,
    quantities: Sequence[Quantity],
    observe: Callable[[Sequence[AnyExtension]], Observation],
    output: nn.Module | None,
    mc_samples: int,
) -> Preview:
    """Run `training_step` on a batch, without a Trainer, and leave nothing behind.

    See `CurvatureCallback.preview`.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "`CurvatureCallback.preview` expects a `training_step` that returns a loss, found "
            "manual optimization."
        )
    fields = dict.fromkeys(
        field for q in quantities for field in (*q.fields, *q.instead) if field in FIELDS
    )
    considered = [FIELDS[name](mc_samples, module) for name in fields]
    observation = observe(considered)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(module))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(torch.enable_grad())
        # Warms up: the first pass also chooses kernels and allocates memory.
        _seconds(module, batch)
        plain = _seconds(module, batch)
        seconds, off, logged = _measured(module, batch, quantities, observation, output, mc_samples)
        if logged < BRIEF:  # what is brief is measured again, warm
            # `look` has emptied it.
            observation.considered = considered
            seconds, off, logged = _measured(
                module, batch, quantities, observation, output, mc_samples
            )
        size = observation.size
        observation.release()
    prices = by_quantity(quantities, seconds)
    rows = [Row(q.name, *_path(q, off), _price(q, off, prices, plain)) for q in quantities]
    return Preview(rows, size, plain, plain + logged)


def _measured(
    module: LightningModule,
    batch: Any,
    quantities: Sequence[Quantity],
    observation: Observation,
    output: nn.Module | None,
    mc_samples: int,
) -> tuple[Mapping[str, float], dict[str, Exception], float]:
    """Prices by savefield, what cannot be computed, and the seconds of all there is."""
    observation.read(batch)
    with record(*([] if output is None else [output])), eager():
        loss = _loss(module, batch)
    seed = torch.ones_like(loss)
    off = observation.look(loss, seed)
    if not norm_parameters(module):
        off[NORM_LAYERS] = no_norm_layers()
    paths = {q.name: q.path(off) for q in quantities}
    wanted = dict.fromkeys(
        field for path in paths.values() for field in path or () if field in FIELDS
    )
    observation.logged = [FIELDS[name](mc_samples, module) for name in wanted]
    observation.clock = clock
    observation.begin(loss, seed, check=False)
    failures = [*observation.failures()]
    loss.backward()
    observation.finish()
    for failed, error in [*failures, *observation.failures()]:
        off |= dict.fromkeys(failed, error) | {
            q.name: error for q in quantities if failed & {*q.fields}
        }
    return observation.seconds, off, observation.spent


def _price(
    quantity: Quantity, off: Mapping[str, Exception], prices: Mapping[str, float], step: float
) -> float | None:
    return (
        None
        if quantity.path(off) is None or quantity.name not in prices
        else prices[quantity.name] / step
    )


def _path(quantity: Quantity, off: Mapping[str, Exception]) -> tuple[str, str]:
    """The path, and why it is not the first one."""
    path, error = quantity.path(off), reason(quantity, off)
    if path is None or error is not None:
        several = ", if there are several" if PARTS in (path or ()) else ""
        return ("not" if path is None else f"{how(path)}{several}"), (
            "" if error is None else in_short(error)
        )
    if EIGENVALUES & {*path}:
        return "Lanczos", ""
    return "Monte-Carlo" if SAMPLED & {*path} else "exact", ""


def _seconds(module: LightningModule, batch: Any) -> float:
    """Of a forward and a backward pass."""
    start = clock()
    _loss(module, batch).backward()
    return clock() - start


def _loss(module: LightningModule, batch: Any) -> Tensor:
    step = module.training_step
    # As Lightning decides it: `training_step(batch)` without an index is allowed.
    takes = from_lightning("utilities.signature_utils", "is_param_in_hook_signature")
    loss = loss_of(step(batch, 0) if takes(step, "batch_idx", min_args=2) else step(batch))
    if loss is None:
        raise MisconfigurationException(
            "`CurvatureCallback.preview` expects a `training_step` that returns a loss, found none."
        )
    # Else the next backward pass would add to the gradient of this one.
    for parameter in module.parameters():
        parameter.grad = None
    return loss

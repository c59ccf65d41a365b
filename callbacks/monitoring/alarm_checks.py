"""When the alarms of a run are checked: before the step of an optimizer, and after its update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.callbacks.monitoring.alarm import Moment
from lightning_curv.callbacks.monitoring.layers import parameters_by_layer
from lightning_curv.callbacks.monitoring.report import Report, suffix_of
from lightning_curv.callbacks.monitoring.scaled_loss import held_factor
from lightning_curv.callbacks.monitoring.schedule import step_of
from lightning_curv.callbacks.monitoring.watch import (
    Raised,
    Values,
    Watch,
    finite_only,
    gradient_series,
    skip_step,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def check_before_step(
    watch: Watch,
    trainer: Trainer,
    pl_module: LightningModule,
    optimizer: Optimizer,
    grads: dict[Parameter, Tensor],
    divisor: float,
    report: Report | None,
) -> None:
    """Check alarms before the step of an optimizer, in all processes, and skip it if one says so.

    Args:
        watch: the alarms.
        trainer: of the run.
        pl_module: has the layers.
        optimizer: is about to step.
        grads: accumulated gradients of its parameters.
        divisor: of these gradients.
        report: what was measured of the step, if it is logged.
    """
    values = gradient_series(grads, parameters_by_layer(pl_module), watch.alarms, divisor)
    # A scaler finds its factor by steps that overflow, and skips them itself: no alarm.
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        values = finite_only(values)
    # Also without values: processes agree by a reduction, which all have to enter.
    raised = _raised(watch, trainer, optimizer, values, "gradient")
    if report is not None:
        measured = {"": report.values_of(suffix_of(trainer, optimizer))}
        raised += _raised(watch, trainer, optimizer, measured, "measured")
    # An alarm that stops the run skips the step, too: what set it off must not be learned last.
    if any(one.alarm.action != "warn" for one in raised):
        skip_step(optimizer, held_factor(trainer, optimizer) != 1)


def check_after_updates(watch: Watch, trainer: Trainer, report: Report) -> None:
    """Check the alarms of series that are known after an update: too late to skip the step.

    `Alarm` refuses to skip for these series.

    Args:
        watch: the alarms.
        trainer: of the run.
        report: what was measured of the step.
    """
    for optimizer in trainer.optimizers:
        known = {"": report.values_of(suffix_of(trainer, optimizer))}
        _raised(watch, trainer, optimizer, known, "updated")


def _raised(
    watch: Watch, trainer: Trainer, optimizer: Optimizer, values: Values, moment: Moment
) -> list[Raised]:
    """Alarms that go off; the run stops where one of them says so."""
    where = suffix_of(trainer, optimizer)
    step = step_of(trainer) - 1
    raised = watch.check(values, step, where, trainer.strategy, moment)
    if any(one.alarm.action == "stop" for one in raised):
        trainer.should_stop = True
    return raised

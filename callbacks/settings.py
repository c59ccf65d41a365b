"""Checks of the callback's arguments."""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from torch import nn

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.user_batch import BatchSize

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def check(
    every_n_steps: int | None,
    ema: float,
    mc_samples: int,
    layers: bool | str,
    max_layers: int,
    prog_bar: Sequence[str],
    series: Collection[str],
    batch_size: BatchSize = None,
    max_samples: int | None = None,
    budget: float | None = None,
) -> None:
    """Raise a `ValueError` for what is out of range."""
    if every_n_steps is not None and every_n_steps < 0:
        raise ValueError(f"`every_n_steps` must be None, 0 or positive, found {every_n_steps}.")
    if not 0 <= ema < 1:
        raise ValueError(f"`ema` must be in [0, 1), found {ema}.")
    if mc_samples < 0:
        raise ValueError(f"`mc_samples` must be 0 or positive, found {mc_samples}.")
    if not (batch_size is None or _positive(batch_size) or callable(batch_size)):
        raise ValueError(
            "`batch_size` must be None, a positive number or a function from a batch to one, found "
            f"{batch_size!r}."
        )
    if not (max_samples is None or _positive(max_samples)):
        raise ValueError(f"`max_samples` must be None or a positive number, found {max_samples!r}.")
    if not (budget is None or 0 < budget < 1):
        raise ValueError(f"`budget` must be None or a share of the time in (0, 1), found {budget}.")
    if max_layers < 1:
        raise ValueError(f"`max_layers` must be positive, found {max_layers}.")
    if isinstance(layers, str):
        try:
            # Now, not when training begins.
            re.compile(layers)
        except re.error as error:
            raise ValueError(
                f"`layers` must be a bool, 'topk' or a regular expression, found {layers!r}: "
                f"{error}."
            ) from error
    for name in prog_bar:
        if name not in series:
            raise ValueError(
                f"`prog_bar` must name logged series, found {name!r}; did you mean "
                f"{near(name, series)}?"
            )


def _positive(value: object) -> bool:
    # In Python, True is an int.
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_whole_parameters(trainer: Trainer) -> None:
    """Refuse strategies whose parameters are flat, or that make the backward pass."""
    # By name: each copy of Lightning has strategies of its own.
    strategy = type(trainer.strategy).__name__
    if any(name in strategy for name in ("FSDP", "DeepSpeed")):
        raise MisconfigurationException(
            "CurvatureCallback needs a strategy that keeps parameters apart from each other, found "
            f"{strategy}; use one device, `strategy='ddp'`, or `ModelParallelStrategy` with "
            "`fully_shard`."
        )


def key_of(name: str, settings: object) -> str:
    """A short name for the state of a callback in checkpoints and in the rows of profilers."""
    # Not `hash`, which differs for strings from process to process.
    return f"{name}-{zlib.crc32(repr(settings).encode()):08x}"


def longest_interval(trainer: Trainer) -> int:
    """The most steps between two logged ones such that a callback that watches a series finds it.

    0: any number, as no callback watches one.
    Lightning checks `EarlyStopping` and `ModelCheckpoint` at the end of every epoch and validation.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    watched = [getattr(callback, "monitor", None) for callback in callbacks]
    # A scheduler that watches a series which was not logged yet ends the run.
    watched += [config.monitor for config in trainer.lr_scheduler_configs]
    if not any(isinstance(name, str) and name.startswith("curvature") for name in watched):
        return 0
    batches = [trainer.num_training_batches, getattr(trainer, "val_check_batch", None) or math.inf]
    shortest = min(float(number) for number in batches)
    if math.isfinite(shortest):
        # Lightning counts batches, `every_n_steps` optimizer steps.
        return max(1, int(shortest) // trainer.accumulate_grad_batches)
    return 0


def near(name: str, valid: Collection[str]) -> str:
    """The valid names that are most like a wrong one."""
    names = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.4) or list(valid)
    return " or ".join(map(repr, names))


def find_output(module: nn.Module, output: nn.Module | str | None) -> nn.Module | None:
    """The module that `output=` means.

    Raises:
        ValueError: there is no submodule of this name.
    """
    if not isinstance(output, str):
        return output
    modules = dict(module.named_modules())
    if output not in modules:
        raise ValueError(
            f"`output` must be a submodule, found {output!r}; did you mean {near(output, modules)}?"
        )
    return modules[output]

"""Of which run a report is: model, data, optimizer, machine, versions."""

from __future__ import annotations

import platform
import statistics
from datetime import datetime
from typing import TYPE_CHECKING

import torch

import lightning_curv
from lightning_curv.callbacks.import_names import imported
from lightning_curv.callbacks.monitoring.layers import parameters_by_layer
from lightning_curv.callbacks.run_report.course import Course
from lightning_curv.callbacks.run_report.evidence import number

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def facts(
    trainer: Trainer, pl_module: LightningModule, course: Course, seconds: float
) -> list[tuple[str, str]]:
    """Names and values for the head of the page.

    Args:
        trainer: of the run.
        pl_module: that was trained.
        course: of the run.
        seconds: that it took.
    """
    sizes = course.series.get("samples")
    batch = f"{number(statistics.median(sizes.values))} samples" if sizes else "unknown"
    details = []
    if trainer.accumulate_grad_batches > 1:
        details.append(f"{trainer.accumulate_grad_batches} accumulated")
    if trainer.world_size > 1:
        details.append(f"{trainer.world_size} processes")
    logged = max((len(series) for series in course.series.values()), default=0)
    return [
        ("Parameters", _parameters(pl_module)),
        ("Batch", f"{batch} ({', '.join(details)})" if details else batch),
        ("Optimizer", _optimizers(trainer)),
        (
            "Steps",
            f"{trainer.fit_loop.epoch_loop._batches_that_stepped:,} in {_epochs(trainer)}",
        ),
        ("Shown", f"{logged:,} of them"),
        ("Run time", duration(seconds)),
        ("Device", _device(trainer)),
        ("Precision", str(trainer.precision)),
    ]


def _parameters(pl_module: LightningModule) -> str:
    counts = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
    trained, total = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    return short(total) if trained == total else f"{short(trained)} trained of {short(total)}"


def _optimizers(trainer: Trainer) -> str:
    texts = []
    for optimizer in trainer.optimizers:
        name, rate = type(optimizer).__name__, optimizer.param_groups[0].get("lr")
        # `lr` then is a factor of the learning rate that the optimizer finds.
        is_found = getattr(optimizer, "relative_lr", False)
        texts.append(f"{name}, lr auto" if is_found else f"{name}, lr {number(float(rate or 0))}")
    return "; ".join(texts) or "none"


def _epochs(trainer: Trainer) -> str:
    begun = max(trainer.fit_loop.epoch_progress.current.ready, 1)
    return f"{begun:,} epoch{'s' if begun > 1 else ''}"


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type.upper()


def sgd_momentum(trainer: Trainer) -> float | None:
    """Of the only optimizer, if it is plain SGD."""
    # The very class: other updates have other limits of stability.
    if len(trainer.optimizers) != 1 or type(trainer.optimizers[0]) is not torch.optim.SGD:
        return None
    [group, *others] = trainer.optimizers[0].param_groups
    return None if others or group["nesterov"] else float(group["momentum"])


def layer_sizes(pl_module: LightningModule) -> dict[str, int]:
    """Trainable parameters of every layer, in the order of the model."""
    layers = parameters_by_layer(pl_module)
    return {name: sum(p.numel() for p in params) for name, params in layers.items()}


def versions() -> str:
    """Of what made the numbers."""
    parts = (
        f"lightning_curv {lightning_curv.__version__}",
        f"Lightning {imported()[0].__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
    )
    return " · ".join(parts)


def ending(error: BaseException | None, now: datetime) -> str:
    """How and when the run ended."""
    how = "Finished" if error is None else f"Ended early by {type(error).__name__}"
    return f"{how} on {now:%d %B %Y, %H:%M}"


def short(count: int) -> str:
    """A number of parameters.

    Example:
        >>> short(985), short(12_345), short(7_240_000_000)
        ('985', '12.3 thousand', '7.24 billion')
    """
    for size, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {name}"
    return str(count)


def duration(seconds: float) -> str:
    """In the two largest units.

    Example:
        >>> duration(7.31), duration(75), duration(7384)
        ('7.3 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"

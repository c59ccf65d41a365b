"""What `LearningRateMonitor` shows of optimizers that find their learning rate: the last step's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

READERS = ("_extract_lr", "_extract_momentum")  # of a monitor, from a parameter group


def show_steps(trainer: Trainer) -> None:
    """Let monitors show the learning rate and the momentum that were used.

    The settings are not.
    """
    for monitor in trainer.callbacks:  # type: ignore[attr-defined]
        # By what it has: each copy of Lightning has its own class. Once: another
        # callback may have been here.
        if all(hasattr(monitor, name) and name not in vars(monitor) for name in READERS):
            vars(monitor).update(
                {name: _of_steps(getattr(monitor, name), trainer) for name in READERS}
            )


def restore_monitors(trainer: Trainer) -> None:
    """Undo `show_steps`."""
    for monitor in trainer.callbacks:  # type: ignore[attr-defined]
        for name in READERS:
            if getattr(vars(monitor).get(name), "of_steps", False):
                del vars(monitor)[name]


def _of_steps(read: Callable[..., Any], trainer: Trainer) -> Callable[..., Any]:
    def reading(param_group: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return read(_as_used(param_group, trainer), *args, **kwargs)

    reading.of_steps = True  # type: ignore[attr-defined]
    return reading


def _as_used(group: Mapping[str, Any], trainer: Trainer) -> Mapping[str, Any]:
    """A parameter group with what the last step used; zeros before the first one."""
    automatic: list[Any] = [o for o in trainer.optimizers if getattr(o, "relative_lr", False)]
    optimizer = next((o for o in automatic if any(group is own for own in o.param_groups)), None)
    if optimizer is None:
        return group
    used = {**group, "lr": optimizer.last_step.get("learning_rate", 0.0) * group["lr"]}
    # Those that find their momentum too have none before the first step.
    if optimizer.finds_momentum:
        used["momentum"] = optimizer.last_step.get("momentum", 0.0)
    return used

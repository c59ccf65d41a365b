"""Alarms at work: which went off at a step, in all processes alike, and what is said and done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_curv.callbacks.monitoring.alarm import Alarm, Moment
from lightning_curv.callbacks.monitoring.entries import entry_rows, pooled_entries, stored
from lightning_curv.callbacks.monitoring.reduction import reduced
from lightning_curv.devices import on_one_device
from lightning_curv.precision import wide

if TYPE_CHECKING:
    from pytorch_lightning.strategies import Strategy

DECAY = 0.9  # of running averages
ENOUGH = 10  # values until an average is one
NAMED = 3  # layers that a warning names
KEPT = 1000  # of what was raised

Values = Mapping[str, Mapping[str, float]]  # by layer, "" for all of them, and series


@dataclass(frozen=True)
class Raised:
    """An alarm that went off.

    Args:
        step: number of optimizer steps before.
        alarm: which.
        where: suffix of the series, for one of several optimizers.
        values: by layer; "" stands for all parameters. Empty: in another process.
    """

    step: int
    alarm: Alarm
    where: str
    values: Mapping[str, float]

    def __str__(self) -> str:
        shown = [
            f"{value:.3g}{f' in {layer}' if layer else ''}"
            for layer, value in [*self.values.items()][:NAMED]
        ]
        more = len(self.values) - len(shown)
        found = ", ".join(shown) + (f" and in {more} more" if more else "")
        done = {
            "warn": "",
            "skip": " This optimizer step is skipped.",
            "stop": " This optimizer step is skipped and the run stops.",
        }[self.alarm.action]
        return (
            f"Alarm at step {self.step}: curvature/{self.alarm.series}{self.where} must not be "
            f"{str(self.alarm).partition(' ')[2]}, "
            f"found {found or 'that in another process'}.{done}"
        )


class Watch:
    """The alarms of a run.

    Args:
        alarms: what to watch.

    Attributes:
        raised: the last alarms that went off.
    """

    def __init__(self, alarms: Sequence[Alarm] = ()) -> None:
        self.alarms = list(alarms)
        self.raised: list[Raised] = []
        self._averages: dict[str, tuple[float, int]] = {}
        self._warned: dict[int, int] = {}  # when, by alarm

    def __bool__(self) -> bool:
        return bool(self.alarms)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self._averages), "warned": dict(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = dict(state.get("averages", {}))
        self._warned = dict(state.get("warned", {}))

    def check(
        self, values: Values, step: int, where: str, strategy: Strategy, moment: Moment
    ) -> list[Raised]:
        """Compare, agree with the other processes, and warn.

        Args:
            values: of this process.
            step: number of optimizer steps before.
            where: suffix of series.
            strategy: where several processes have to agree.
            moment: which alarms are checked.
        """
        watching = [i for i, alarm in enumerate(self.alarms) if alarm.moment == moment]
        beyond = {index: self._beyond(index, values, where) for index in watching}
        # Flags and not values: where one process skips a step, all have to.
        flags = torch.tensor([bool(beyond[index]) for index in watching], dtype=torch.int32)
        if watching and getattr(strategy, "world_size", 1) > 1:
            flags = reduced(flags.to(strategy.root_device), strategy, "max").cpu()
        off = [index for index, flag in zip(watching, flags.tolist(), strict=True) if flag]
        found = [Raised(step, self.alarms[index], where, beyond[index]) for index in off]
        for index, raised in zip(off, found, strict=True):
            last = self._warned.get(index)
            if last is None or step - last >= raised.alarm.cooldown:
                self._warned[index] = step
                rank_zero_warn(str(raised))
        self.raised = [*self.raised, *found][-KEPT:]
        return found

    def _beyond(self, index: int, values: Values, where: str) -> dict[str, float]:
        """The values that set an alarm off, by layer; the others are averaged."""
        alarm, found = self.alarms[index], {}
        for layer, series in values.items():
            if alarm.layers != bool(layer) or alarm.series not in series:
                continue
            value, key = series[alarm.series], f"{index}/{layer}{where}"
            average, count = self._averages.get(key, (math.nan, 0))
            if alarm.relative and count < ENOUGH:
                exceeded = False
            else:
                exceeded = alarm.exceeded(value, average)
            if exceeded:
                found[layer] = value
            elif alarm.relative and math.isfinite(value):
                new = value if count == 0 else DECAY * average + (1 - DECAY) * value
                self._averages[key] = (new, count + 1)
        return found


def gradient_series(
    grads: Mapping[Parameter, Tensor],
    layers: Mapping[str, Sequence[Parameter]],
    alarms: Sequence[Alarm],
    divisor: float,
) -> dict[str, dict[str, float]]:
    """The series of gradients that alarms watch at every step; one wait for the device.

    Args:
        grads: of the parameters of an optimizer.
        layers: parameters by layer.
        alarms: that watch.
        divisor: of the gradients.
    """
    wanted = {alarm.series for alarm in alarms if alarm.moment == "gradient"}
    if not wanted or not grads:
        return {}
    values = [stored(grad) for grad in grads.values()]
    columns = [wide(torch.stack(on_one_device(torch._foreach_norm(values))))[:, None]]
    spread, largest = bool(wanted & {"grad_mean", "grad_std"}), "grad_max" in wanted
    if wanted != {"grad_norm"}:
        columns.append(entry_rows(values, spread, largest, "sparsity" in wanted).to(columns[0]))
    # The one wait for the device.
    rows = torch.cat(columns, 1).cpu().numpy()
    norms, rows = rows[:, 0], rows[:, 1:]
    counts = [tensor.numel() for tensor in values]
    sizes = [(2 if grad.is_complex() else 1) * grad.numel() for grad in grads.values()]
    position = {p: index for index, p in enumerate(grads)}
    groups = {"": list(range(len(values)))}
    if any(alarm.layers for alarm in alarms):
        groups |= {name: [position[p] for p in ps if p in position] for name, ps in layers.items()}
    found: dict[str, dict[str, float]] = {}
    for name, mine in groups.items():
        if not mine:
            continue
        found[name] = {"grad_norm": float((norms[mine] ** 2).sum() ** 0.5) / abs(divisor)}
        if rows.size:
            entries = pooled_entries(
                rows[mine], [counts[i] for i in mine], [sizes[i] for i in mine]
            )
            found[name] |= {
                "grad_mean": entries.mean / divisor,
                "grad_std": entries.std / abs(divisor),
                "grad_max": entries.largest / abs(divisor),
                "sparsity": entries.zeros,
            }
    return {
        name: {key: value for key, value in series.items() if key in wanted}
        for name, series in found.items()
    }


def finite_only(values: Values) -> dict[str, dict[str, float]]:
    """Without the layers that have inf or NaN: a gradient scaler skips such a step itself."""
    return {
        layer: dict(series)
        for layer, series in values.items()
        # a single entry has no deviation, which is NaN and no overflow
        if all(math.isfinite(value) for name, value in series.items() if name != "grad_std")
    }


def skip_step(optimizer: Optimizer, unscales: bool) -> None:
    """Make the step that follows do nothing: parameters without a gradient are left alone.

    Args:
        optimizer: whose step.
        unscales: whether its own kernel divides by a scaler's factor: the scaler then needs
            gradients, and its kernel skips steps with inf.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if unscales and param.grad is not None:
                param.grad = torch.full_like(param.grad, math.inf)
            else:
                param.grad = None

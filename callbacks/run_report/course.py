"""What is kept of a run for its report: bounded series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

MOST_POINTS = 1000  # of a series
MOST_COLUMNS = 200  # of a map of the layers
MOST_LAYERS = 60

Value = TypeVar("Value")


class Series(Generic[Value]):
    """Values by step, at most so many: where they become more, every other one is dropped.

    From then on only every second value is taken, later every fourth, and so on: the steps that are
    left are evenly spaced over the run. The last value is there, too.

    Args:
        most: points.

    Example:
        >>> series = Series(4)
        >>> for step in range(10):
        ...     series.add(step, step**2)
        >>> series.steps, series.values
        ([0, 4, 8, 9], [0, 16, 64, 81])
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most, self._stride, self._count = most, 1, 0
        self._kept: list[tuple[int, Value]] = []
        self._last: tuple[int, Value] | None = None  # if it is not among those

    def __len__(self) -> int:
        return len(self._kept) + (self._last is not None)

    def add(self, step: int, value: Value) -> None:
        """Take the value of a step that is later than all before."""
        point = (step, value)
        if self._count % self._stride:
            self._last = point
        else:
            self._kept.append(point)
            self._last = None
        self._count += 1
        while len(self) > self._most:
            # The latest point may be one of those that are dropped.
            self._last = self._kept[-1] if self._last is None else self._last
            self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._kept[-1] is self._last:
                self._last = None

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self._points()]

    @property
    def values(self) -> list[Value]:
        return [value for _, value in self._points()]

    def _points(self) -> list[tuple[int, Value]]:
        return self._kept if self._last is None else [*self._kept, self._last]

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "values": self.values,
            "stride": self._stride,
            "count": self._count,
            "kept": len(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        points = list(zip(state["steps"], state["values"], strict=True))
        self._stride, self._count = state["stride"], state["count"]
        self._kept = points[: state["kept"]]
        self._last = points[-1] if len(points) > len(self._kept) else None


class Course:
    """All that is kept of a run.

    Attributes:
        series: by name, numbers.
        layers: by quantity, its numbers by layer.
        largest: by name, the step and the value of the largest number, those that were dropped
            included.
        seconds: that earlier parts of the run took, before a checkpoint.
    """

    def __init__(self) -> None:
        self.series: dict[str, Series[float]] = {}
        self.layers: dict[str, Series[dict[str, float]]] = {}
        self.largest: dict[str, tuple[int, float]] = {}
        self.seconds = 0.0

    def add(
        self, step: int, values: Mapping[str, float], layers: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Take the numbers of a step.

        Args:
            step: of the optimizer.
            values: by name.
            layers: by layer and quantity.
        """
        for name, value in values.items():
            if math.isfinite(value):
                self.series.setdefault(name, Series()).add(step, value)
                # Before thinning: a spike of one step must not get lost.
                if value > self.largest.get(name, (0, -math.inf))[1]:
                    self.largest[name] = step, value
        by_quantity: dict[str, dict[str, float]] = {}
        for layer, by_name in layers.items():
            for quantity, value in by_name.items():
                by_quantity.setdefault(quantity, {})[layer] = value
        for quantity, row in by_quantity.items():
            self.layers.setdefault(quantity, Series(MOST_COLUMNS)).add(step, row)

    def state_dict(self) -> dict[str, Any]:
        return {
            "series": {name: series.state_dict() for name, series in self.series.items()},
            "layers": {name: series.state_dict() for name, series in self.layers.items()},
            "largest": {name: list(point) for name, point in self.largest.items()},
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, saved in state.get("series", {}).items():
            self.series[name] = Series()
            self.series[name].load_state_dict(saved)
        for name, saved in state.get("layers", {}).items():
            self.layers[name] = Series(MOST_COLUMNS)
            self.layers[name].load_state_dict(saved)
        self.largest = {name: (int(s), v) for name, (s, v) in state.get("largest", {}).items()}
        self.seconds = state.get("seconds", 0.0)


def evenly(names: list[str], most: int = MOST_LAYERS) -> list[str]:
    """At most so many of the names, evenly spaced, the first and the last among them.

    Example:
        >>> evenly(list("abcdefg"), 3)
        ['a', 'd', 'g']
    """
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]

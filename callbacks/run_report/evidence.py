"""What rules draw their conclusions from, and when there is enough of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LEAST = 8  # values of a half, or a third, of a run


class Lacking(Exception):
    """The data do not carry a conclusion."""


@dataclass(frozen=True)
class Finding:
    """Something that a reader should know.

    Args:
        kind: "warning", "advice" or "note".
        title: the finding, in one sentence.
        text: the numbers that it rests on, and what they mean.
    """

    kind: str
    title: str
    text: str


@dataclass(frozen=True)
class Evidence:
    """The series of a run, of one optimizer.

    Args:
        series: by name; numbers by step.
        layers: by quantity; by step, numbers by layer.
        largest: by name; step and value.
        sizes: by layer, its number of parameters.
        sgd: momentum, if the optimizer is plain SGD.
    """

    series: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    layers: Mapping[str, tuple[Sequence[int], Sequence[Mapping[str, float]]]] = field(
        default_factory=dict
    )
    largest: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    sgd: float | None = None

    def values(self, name: str) -> Sequence[float]:
        """All of a series.

        Raises:
            Lacking: it was not logged.
        """
        if name not in self.series:
            raise Lacking(f"needs the series {name}")
        return self.series[name][1]

    def second_half(self, name: str) -> Sequence[float]:
        """Values of the later half of a series.

        Raises:
            Lacking: they are not there, or too few.
        """
        values = self.values(name)
        return enough(values[len(values) // 2 :], f"values of {name} in the second half")

    def thirds(self, name: str) -> tuple[Sequence[float], Sequence[float]]:
        """Values of the first and of the last third of a series.

        Raises:
            Lacking: they are not there, or too few.
        """
        values = self.values(name)
        third = len(values) // 3
        enough(values[:third], f"values of {name} in a third of the run")
        return values[:third], values[len(values) - third :]


def enough(values: Sequence[float], what: str, least: int = LEAST) -> Sequence[float]:
    """The values, if they are enough.

    Raises:
        Lacking: they are not.
    """
    if len(values) < least:
        raise Lacking(f"needs {least} {what}, there are {len(values)}")
    return values


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """A quarter, half and three quarters of the values are below.

    Example:
        >>> quartiles([1, 2, 3, 4, 5])
        (2.0, 3.0, 4.0)
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


Judge = Callable[[Evidence], "Finding | None"]


@dataclass(frozen=True)
class Rule:
    """When something is said of a run.

    Args:
        statement: the condition, with its thresholds.
        judge: the finding, or `None`: the condition does not hold.
    """

    statement: str
    judge: Judge


RULES: list[Rule] = []


def rule(statement: str) -> Callable[[Judge], Judge]:
    """Add a function to the rules.

    Args:
        statement: its condition in words.
    """

    def add(judge: Judge) -> Judge:
        RULES.append(Rule(statement, judge))
        return judge

    return add


def number(value: float) -> str:
    """Three digits.

    Example:
        >>> number(1234.5), number(0.01234), number(8e-7), number(64.0)
        ('1,230', '0.0123', '8e-07', '64')
    """
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def factor(value: float) -> str:
    """Two digits: how many times as much.

    Example:
        >>> factor(3.4689), factor(12.3), factor(1234.0)
        ('3.5 ×', '12 ×', '1,200 ×')
    """
    return f"{number(float(f'{value:.2g}'))} ×"

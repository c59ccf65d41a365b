"""Means of what was logged over an epoch."""

from __future__ import annotations

from collections.abc import Mapping

SUFFIX = "_epoch"  # as Lightning names what `log(on_step=True, on_epoch=True)` logs


class EpochMeans:
    """Means of series over the logged steps of an epoch, for `CurvatureCallback(on_epoch=True)`.

    Example:
        >>> means = EpochMeans()
        >>> means.add({"grad_norm": 1.0, "alpha/optimizer_0": 0.5})
        >>> means.add({"grad_norm": 3.0})
        >>> means.take()
        {'grad_norm_epoch': 2.0, 'alpha_epoch/optimizer_0': 0.5}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take the series of one step; each has a mean over the steps that have it."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means, by names of their own; the next epoch begins."""
        sums, self._sums = self._sums, {}
        return {_of_epoch(name): total / count for name, (total, count) in sums.items()}

    def state_dict(self) -> dict[str, tuple[float, int]]:
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, tuple[float, int]]) -> None:
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.items()}


def _of_epoch(name: str) -> str:
    """The name of a mean: `noise_scale_epoch/net.0`."""
    series, slash, rest = name.partition("/")
    return f"{series}{SUFFIX}{slash}{rest}"

r"""How the parameters move: update size, distance from the start, place in the local parabola."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_curv.devices import on_one_device
from lightning_curv.distributed.shards import whole
from lightning_curv.precision import wide, widest

Values = Mapping[Parameter, Tensor]
Key = TypeVar("Key", Parameter, str)


def distance(one: Mapping[Key, Tensor], other: Mapping[Key, Tensor]) -> Tensor:
    r"""$\|\theta - \theta'\|$, []."""
    moves = [
        wide((whole(p.detach()) - whole(other[q])).norm()) for q, p in one.items() if q in other
    ]
    return torch.stack(on_one_device(moves)).norm()


def alpha(update: Values, before: Values, after: Values) -> Tensor:
    r"""Where an update ends in the parabola along it.

    -1: at its start; 0: at the minimum; 1: at the mirrored point.

    $\alpha = -f'(1) / f'(0)$ with the slopes $f'(0) = g_t \cdot d$ and $f'(1) = g_{t+1} \cdot d$ of
    the gradients before and after the update $d = \theta_{t+1} - \theta_t$: a parabola with these
    slopes has its minimum at $f'(0) / (f'(0) - f'(1))$. Schneider, Dangel & Hennig, *Cockpit*,
    NeurIPS 2021, section 2.1, fit the losses too; those of two different batches differ mostly by
    the samples that are in them.

    Args:
        update: d.
        before: $g_t$.
        after: $g_{t+1}$.

    Returns:
        [].
    """

    def slope(gradient: Values) -> Tensor:
        slopes = [(gradient[p] * d).sum(dtype=widest(d.device)) for p, d in update.items()]
        return torch.stack(on_one_device(slopes)).sum()

    return -slope(after) / slope(before)


class Trajectory:
    """Copies of parameters and gradients that outlive a step.

    Memory: one of each for the quantities that need it.
    """

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] = {}
        self._start: dict[Parameter, Tensor] = {}
        self._params: dict[Parameter, Tensor] = {}
        self._grads: dict[Parameter, Tensor] = {}

    def begin_update(self, grads: Values) -> None:
        """Remember the parameters that are about to be updated."""
        self._start.update({p: p.detach().clone() for p in grads})

    def update_size(self, params: Values) -> Tensor | None:
        """Norm of the update since `begin_update`, []."""
        mine = {p: p for p in params if p in self._start}
        return distance(mine, self._start) if mine else None

    def end_update(self) -> None:
        """Forget what `begin_update` remembered."""
        self._start = {}

    def remember(self, grads: Values, divisor: float) -> None:
        """Keep the start of an update and the gradient there, for `alpha` at the next step."""
        self._params.update({p: p.detach().clone() for p in grads})
        # The division copies: clipping and the next pass write into gradients.
        self._grads.update({p: g.detach().to_dense() / divisor for p, g in grads.items()})

    def alpha(self, grads: Values, divisor: float) -> Tensor | None:
        """Of the last update, by the gradient where it ended, []; None if no update is known."""
        known = [p for p in grads if p in self._params]
        if not known:
            return None
        update = {p: whole(p.detach() - self._params[p]) for p in known}
        after = {p: grads[p].to_dense() / divisor for p in known}
        return alpha(update, {p: self._grads[p] for p in known}, after)

    def forget(self) -> None:
        """Drop what `remember` keeps."""
        self._params, self._grads = {}, {}

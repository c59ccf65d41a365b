"""The recurrence written out in differentiable steps.

It is for calls whose outputs have changed since, and where the derivatives of the cotangents are
wanted too. The textbook recurrence runs on the recorded inputs and is differentiated at the results
of its matrix products. It is slower than `cells`, which needs the recorded outputs and cannot be
differentiated itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.rules.steps import Steps

States = tuple[Tensor, ...]  # h, or h and c
Step = Callable[[Tensor, Tensor, States], States]  # from W_i x + b_i, W_h h + b_h and the states


def lstm(x: Tensor, h: Tensor, states: States) -> States:
    """One step of a long short-term memory."""
    i, f, z, o = (x + h).chunk(4, dim=-1)
    kept = f.sigmoid() * states[1]
    c = kept + i.sigmoid() * z.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, h: Tensor, states: States) -> States:
    """One step of a gated recurrent unit."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = h.chunk(3, dim=-1)
    r = (x_r + h_r).sigmoid()
    z = (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (states[0] - n),)


def tanh(x: Tensor, h: Tensor, states: States) -> States:
    """One step of Elman's network."""
    return ((x + h).tanh(),)


def relu(x: Tensor, h: Tensor, states: States) -> States:
    """The same with rectifiers."""
    return ((x + h).relu(),)


class Replay:
    """The recurrence, with a shift added to the results `[T, N, o]` of every matrix product.

    It keeps the inputs of the products. Shifts, inputs and the numbers of the biases go by the
    number of the weight.
    """

    def __init__(
        self,
        step: Step,
        weights: list[Tensor],
        biases: dict[int, int],
        shifts: dict[int, Tensor],
        sequences: Steps,
    ) -> None:
        self.step = step
        self.weights = weights
        self.biases = biases
        self.shifts = shifts
        self.sequences = sequences
        # `unbind` is one node for all steps: the backward function of an index would fill a tensor
        # of all steps with zeros, for every step.
        self.steps = {weight: shift.unbind(0) for weight, shift in shifts.items()}
        self.inputs: dict[int, list[Tensor]] = defaultdict(list)

    def product(self, x: Tensor, weight: int, step: int | None = None) -> Tensor:
        """W x + b, at one step or at all."""
        self.inputs[weight].append(x)
        bias = self.biases.get(weight)
        y = F.linear(x, self.weights[weight], None if bias is None else self.weights[bias])
        if step is None:
            shift = self.shifts[weight]
        else:
            shift = self.steps[weight][step]
        return y + shift

    def direction(
        self,
        x: Tensor,
        states: States,
        first: int,
        last: int,
    ) -> tuple[Tensor, States]:
        """One direction of one layer with the weights `first` to `last`.

        Returns all outputs h, `[T, N, P]`, and the final states.
        """
        projected = (last - first) % 2
        states_by_step = []
        for t, x_t in enumerate(self.product(x, first)):
            states = self.step(x_t, self.product(states[0], first + 1, t), states)
            if projected:
                states = (self.product(states[0], last - 1, t), *states[1:])
            states_by_step.append(states)
        steps_by_state = [*zip(*states_by_step, strict=True)]
        final = tuple(self.sequences.last(steps) for steps in steps_by_state)
        return torch.stack(steps_by_state[0]), final

    def network(
        self,
        x: Tensor,
        initial: Sequence[Tensor],
        directions: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers: outputs `[T, N, *]` and final states `[layers·directions, N, *]`."""
        count = len(self.weights) // len(initial[0])
        final = []
        for layer in range(0, len(initial[0]), directions):
            outputs = []
            for k in range(layer, layer + directions):
                states = tuple(state[k] for state in initial)
                turned = self.sequences.backwards if k > layer else lambda tensor: tensor
                h, states = self.direction(turned(x), states, k * count, (k + 1) * count)
                outputs.append(turned(h))
                final.append(states)
            x = torch.cat(outputs, dim=-1)
        return x, [torch.stack(state) for state in zip(*final, strict=True)]

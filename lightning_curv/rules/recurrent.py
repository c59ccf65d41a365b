"""Recurrent networks and cells: the recurrence is replayed to find the cotangents of its matrix products.

One call of ``torch.lstm`` applies every weight at every step. The rule runs the textbook recurrence on the recorded
inputs and differentiates it at the results of its products: the steps then are shared positions of the weight, as the
positions of a sequence are for ``F.linear``. The forward pass and the gradients stay those of the builtin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.errors import UnsupportedError
from lightning_curv.rules import linear
from lightning_curv.rules.joined import rows
from lightning_curv.rules.registry import Call, rule
from lightning_curv.terms import Term

States = tuple[Tensor, ...]  # h, or h and c
Step = Callable[[Tensor, Tensor, States], States]  # from W_i x + b_i, W_h h + b_h and the states

LAYERS = "input hx params has_biases num_layers dropout train bidirectional batch_first"
PACKED = "input batch_sizes hx params has_biases num_layers dropout train bidirectional"
CELL = "input hx w_ih w_hh b_ih b_hh"


def _lstm(x: Tensor, h: Tensor, states: States) -> States:
    i, f, z, o = (x + h).chunk(4, dim=-1)
    c = f.sigmoid() * states[1] + i.sigmoid() * z.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, states: States) -> States:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (states[0] - n),)


def _tanh(x: Tensor, h: Tensor, states: States) -> States:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, states: States) -> States:
    return ((x + h).relu(),)


def _bind_layers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    given = {**dict(zip((PACKED if packed else LAYERS).split(), args, strict=False)), **kwargs}
    return _flat(given.pop("hx"), given.pop("params"), given)


def _bind_cell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {**dict(zip(CELL.split(), args, strict=False)), **kwargs}
    weights = [given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if given.get(name) is not None]
    return _flat(given["hx"], weights, {"input": given["input"], "has_biases": len(weights) == 4})


def _flat(states: Tensor | Sequence[Tensor], params: Sequence[Tensor], others: dict[str, Any]) -> dict[str, Any]:
    states = [states] if isinstance(states, Tensor) else states
    return {
        **others,
        **{f"states{k}": v for k, v in enumerate(states)},
        **{f"params{k}": v for k, v in enumerate(params)},
    }


def _numbered(arguments: dict[str, Any], name: str) -> list[Tensor]:
    return [arguments[f"{name}{k}"] for k in range(len(arguments)) if f"{name}{k}" in arguments]


def _sample_axes(arguments: dict[str, Any]) -> list[int | None]:
    if "batch_sizes" in arguments:
        return [None] * (1 + len(_numbered(arguments, "states")))
    first = [] if "num_layers" not in arguments else [0 if arguments["batch_first"] else 1]
    return [*first, *(0 if not first else 1 for _ in _numbered(arguments, "states"))]


def _replayable(call: Call, arguments: dict[str, Any]) -> tuple[int, ...]:
    if "batch_sizes" in arguments:
        raise UnsupportedError(
            "Expected a padded tensor as input of a recurrent network, found a PackedSequence, whose rows are sorted "
            "by time. Pass the padded sequences, and pick the last valid step of each."
        )
    if arguments.get("num_layers", 1) > 1 and arguments["train"] and arguments["dropout"] > 0:
        raise UnsupportedError(
            f"Expected a recurrent network without dropout between its layers, found dropout={arguments['dropout']}, "
            "whose masks are hidden. Use `dropout=0`, or one-layer networks with `nn.Dropout` in between."
        )
    return (0,)


class _Replay:
    """The recurrence, with a shift added to the results ``[T, N, o]`` of every matrix product; keeps their inputs.

    Shifts, inputs and the numbers of the biases go by the number of the weight.
    """

    def __init__(self, step: Step, weights: list[Tensor], biases: dict[int, int], shifts: dict[int, Tensor]) -> None:
        self.step, self.weights, self.biases, self.shifts = step, weights, biases, shifts
        # one node for all steps: the backward function of an index fills a tensor of all steps with zeros
        self.steps = {weight: shift.unbind(0) for weight, shift in shifts.items()}
        self.inputs: dict[int, list[Tensor]] = defaultdict(list)

    def product(self, x: Tensor, weight: int, step: int | None = None) -> Tensor:
        self.inputs[weight].append(x)
        bias = self.biases.get(weight)
        y = F.linear(x, self.weights[weight], None if bias is None else self.weights[bias])
        return y + (self.shifts[weight] if step is None else self.steps[weight][step])

    def direction(self, x: Tensor, states: States, first: int, last: int) -> tuple[Tensor, States]:
        """One direction of one layer with the weights ``first`` to ``last``: all h, and the final states."""
        projected = (last - first) % 2
        outputs = []
        for t, x_t in enumerate(self.product(x, first)):
            states = self.step(x_t, self.product(states[0], first + 1, t), states)
            if projected:
                states = (self.product(states[0], last - 1, t), *states[1:])
            outputs.append(states[0])
        return torch.stack(outputs), states

    def network(self, x: Tensor, initial: Sequence[Tensor], directions: int) -> tuple[Tensor, list[Tensor]]:
        """All layers: outputs ``[T, N, *]`` and final states ``[layers·directions, N, *]``."""
        count = len(self.weights) // len(initial[0])
        final = []
        for layer in range(0, len(initial[0]), directions):
            outputs = []
            for k in range(layer, layer + directions):
                states = tuple(state[k] for state in initial)
                h, states = self.direction(x.flip(0) if k > layer else x, states, k * count, (k + 1) * count)
                outputs.append(h.flip(0) if k > layer else h)
                final.append(states)
            x = torch.cat(outputs, dim=-1)
        return x, [torch.stack(state) for state in zip(*final, strict=True)]


def _recurrent(step: Step, call: Call, g: Tensor, **arguments: Any) -> dict[str, Term]:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``, ``torch.rnn_relu`` and their cells."""
    weights, cell = _numbered(arguments, "params"), "num_layers" not in arguments
    x, *initial = [t.to(weights[0].dtype) for t in (arguments["input"], *_numbered(arguments, "states"))]
    if cell:
        x, initial = x[None], [state[None] for state in initial]
    elif arguments["batch_first"]:
        x = x.transpose(0, 1)
    count = len(weights) // len(initial[0])
    biases = {k: k + 2 for k in range(len(weights)) if arguments["has_biases"] and k % count < 2}

    def outputs(shifts: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        replay = _Replay(step, weights, biases, shifts)
        h, final = replay.network(x, initial, 1 + arguments.get("bidirectional", False))
        h = h.transpose(0, 1) if arguments.get("batch_first") else h
        tensors = [state[0] for state in final] if cell else [h, *final]
        inputs = {k: v[0] if v[0].ndim == 3 else torch.stack(v) for k, v in replay.inputs.items()}
        return rows(tensors, _sample_axes(arguments)), inputs

    shifts = {k: x.new_zeros(*x.shape[:2], len(w)) for k, w in enumerate(weights) if w.ndim == 2}
    whole, pull, inputs = torch.func.vjp(outputs, shifts, has_aux=True)  # type: ignore[misc]
    g = g.to(whole.dtype)
    if len(g) == 1:
        cotangents = {k: y[None] for k, y in pull(g[0])[0].items()}
    else:
        (cotangents,) = torch.func.vmap(pull)(g)
    terms = {}
    for k, y in cotangents.items():
        weight, bias = linear.product(y.movedim(1, 2), inputs[k].movedim(0, 1), "oi")
        terms.update({f"params{k}": weight, f"params{biases.get(k)}": bias})
    return terms


_BUILTINS: dict[Any, dict[Any, Step]] = {
    _bind_layers: {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu},
    _bind_cell: {
        torch.lstm_cell: _lstm,
        torch.gru_cell: _gru,
        torch.rnn_tanh_cell: _tanh,
        torch.rnn_relu_cell: _relu,
    },
}
for _binds, _steps in _BUILTINS.items():
    for _function, _step in _steps.items():
        rule(_function, binds=_binds, slots=("params",), axes=_replayable, outputs=_sample_axes, affine=False)(
            partial(_recurrent, _step)
        )

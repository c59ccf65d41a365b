"""Recurrent networks and cells: one call applies every weight at every step.

The steps are shared positions of the weights, as the positions of a sequence are for ``F.linear``;
the forward pass and the gradients stay those of the builtin. The cotangents of the products with
the weights are found in closed form from the recorded outputs (`cells`), from the last layer to the
first. Where these are not what the call returned (changed in place, or inputs replaced by others)
the recurrence is written out and differentiated instead (`replay`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_curv.errors import UnsupportedError
from lightning_curv.rules import cells, linear, replay
from lightning_curv.rules.joined import rows
from lightning_curv.rules.registry import Call, rule
from lightning_curv.rules.steps import PackedSteps, Steps
from lightning_curv.terms.term import Term

LAYERS = "input hx params has_biases num_layers dropout train bidirectional batch_first"
PACKED = "input batch_sizes hx params has_biases num_layers dropout train bidirectional"
CELL = "input hx w_ih w_hh b_ih b_hh"
Numbered = Iterator[
    tuple[int, Tensor, Tensor]
]  # a weight's number, cotangents [V, N, T, o], inputs [N, T, i]


@dataclass(frozen=True)
class _Kind:
    """A kind of recurrence.

    Attributes:
        step: One step, differentiable.
        cell: The backward pass of all steps, in closed form.
        builtin: Torch's function of networks of this kind.
    """

    step: replay.Step
    cell: Callable[[cells.Run, Tensor, Sequence[Tensor]], cells.Products]
    builtin: Callable[..., tuple[Tensor, ...]]


def _bind_layers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    given = {**dict(zip((PACKED if packed else LAYERS).split(), args, strict=False)), **kwargs}
    return _flat(given.pop("hx"), given.pop("params"), given)


def _bind_cell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = {**dict(zip(CELL.split(), args, strict=False)), **kwargs}
    weights = [
        given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if given.get(name) is not None
    ]
    return _flat(given["hx"], weights, {"input": given["input"], "has_biases": len(weights) == 4})


def _flat(
    states: Tensor | Sequence[Tensor], params: Sequence[Tensor], others: dict[str, Any]
) -> dict[str, Any]:
    states = [states] if isinstance(states, Tensor) else states
    return {
        **others,
        **{f"states{k}": v for k, v in enumerate(states)},
        **{f"params{k}": v for k, v in enumerate(params)},
    }


def _numbered(arguments: dict[str, Any], name: str) -> list[Tensor]:
    return [arguments[f"{name}{k}"] for k in range(len(arguments)) if f"{name}{k}" in arguments]


def _sample_axes(arguments: dict[str, Any]) -> list[int | None] | None:
    if "batch_sizes" in arguments:
        return None
    first = [] if "num_layers" not in arguments else [0 if arguments["batch_first"] else 1]
    return [*first, *(0 if not first else 1 for _ in _numbered(arguments, "states"))]


def _owners(arguments: dict[str, Any]) -> Tensor | None:
    """The sequence that every row of a packed output and of the final states behind it belongs to."""
    if "batch_sizes" not in arguments:
        return None
    steps, states = _steps(arguments), _numbered(arguments, "states")
    return torch.cat(
        [
            steps.sample,
            torch.arange(steps.sizes[0], device=steps.sample.device).repeat(sum(map(len, states))),
        ]
    )


def _steps(arguments: dict[str, Any]) -> PackedSteps:
    return PackedSteps(arguments["batch_sizes"], arguments["input"].device)


def _backpropagable(call: Call, arguments: dict[str, Any]) -> tuple[int, ...]:
    if arguments.get("num_layers", 1) > 1 and arguments["train"] and arguments["dropout"] > 0:
        raise UnsupportedError(
            f"Expected a recurrent network without dropout between its layers, found dropout={arguments['dropout']}, "
            "whose masks are hidden. Use `dropout=0`, or one-layer networks with `nn.Dropout` in between."
        )
    return (0,)


class _Network:
    """The arguments of a call; a cell is a network of one layer and one step.

    Attributes:
        x: Inputs, ``[T, N, D]``, padded if they are packed.
        steps: What the sequences have of the T steps.
        initial: Initial states, ``[layers·directions, N, *]`` each.
        weights: All parameters by number.
        biases: Numbers of the biases by those of their weights.
        matrices: Numbers of the weights of every direction of every layer: W_i, W_h and, where
            projected, W_r.
    """

    def __init__(self, kind: _Kind, arguments: dict[str, Any]) -> None:
        self.kind, self.arguments, self.is_cell = kind, arguments, "num_layers" not in arguments
        self.weights = _numbered(arguments, "params")
        x, *initial = [
            t.to(self.weights[0].dtype)
            for t in (arguments["input"], *_numbered(arguments, "states"))
        ]
        self.initial = [s[None] for s in initial] if self.is_cell else initial
        packed = "batch_sizes" in arguments
        self.steps = (
            _steps(arguments)
            if packed
            else Steps(1 if self.is_cell else x.shape[int(arguments["batch_first"])])
        )
        self.x = self._steps_first(x)
        self.directions = 1 + arguments.get("bidirectional", False)
        count = len(self.weights) // len(self.initial[0])
        firsts = range(0, len(self.weights), count)
        self.biases = {k + j: k + j + 2 for k in firsts for j in (0, 1) if arguments["has_biases"]}
        self.matrices = [[k, k + 1, *([k + count - 1] if count % 2 else [])] for k in firsts]

    def _steps_first(self, tensor: Tensor) -> Tensor:
        if self.is_cell:
            return tensor[None]
        return (
            tensor.transpose(0, 1)
            if self.arguments.get("batch_first")
            else self.steps.padded(tensor)
        )

    def replayed(self, g: Tensor) -> Numbered:
        """Cotangents ``g [V, N, K]`` of all outputs at the products with the weights, by differentiating every step."""

        def outputs(shifts: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
            run = replay.Replay(self.kind.step, self.weights, self.biases, shifts, self.steps)
            h, final = run.network(self.x, self.initial, self.directions)
            h = h.transpose(0, 1) if self.arguments.get("batch_first") else self.steps.rows(h)
            tensors = [state[0] for state in final] if self.is_cell else [h, *final]
            inputs = {k: v[0] if v[0].ndim == 3 else torch.stack(v) for k, v in run.inputs.items()}
            return rows(tensors, _sample_axes(self.arguments)), inputs

        shifts = {
            k: self.x.new_zeros(*self.x.shape[:2], len(w))
            for k, w in enumerate(self.weights)
            if w.ndim == 2
        }
        whole, pull, inputs = torch.func.vjp(outputs, shifts, has_aux=True)  # type: ignore[misc]
        g = g.to(whole.dtype)
        if len(g) == 1:
            cotangents = {k: y[None] for k, y in pull(g[0])[0].items()}
        else:
            (cotangents,) = torch.func.vmap(pull)(g)
        for k, y in cotangents.items():
            yield k, y.movedim(1, 2), self.steps.masked(inputs[k]).movedim(0, 1)

    @torch.no_grad()
    def backpropagated(self, g: Tensor, output: Tensor) -> Numbered:
        """The same in closed form.

        Args:
            g: Cotangents of all outputs.
            output: What the call returned first.
        """
        dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
        layers = [t.to(dtype) for t in self._layers(output)]
        arriving, final = self._split(g.to(dtype))
        for layer in reversed(range(len(layers) - 1)):
            below = []
            for direction in range(self.directions):
                number, backwards = layer * self.directions + direction, direction == 1
                h, y = (
                    t.chunk(self.directions, dim=-1)[direction]
                    for t in (layers[layer + 1], arriving)
                )
                if backwards:
                    x, h, y = (self.steps.backwards(t, t.ndim - 2) for t in (layers[layer], h, y))
                else:
                    x = layers[layer]
                run = self._run(number, x, h, dtype)
                products = self.kind.cell(run, y, [state[:, :, number] for state in final])
                if layer:
                    pulled = cells.times(products[0][0], run.weights[0]).permute(2, 0, 1, 3)
                    below.append(self.steps.backwards(pulled, 2) if backwards else pulled)
                for k, (cotangents, inputs) in zip(self.matrices[number], products, strict=True):
                    yield k, cotangents, self.steps.masked(inputs).transpose(0, 1)
            arriving = sum(below[1:], start=below[0]) if below else arriving

    def _run(self, number: int, x: Tensor, h: Tensor, dtype: torch.dtype) -> cells.Run:
        matrices, initial = (
            self.matrices[number],
            [state[number].to(dtype) for state in self.initial],
        )
        weights = [self.weights[k].to(dtype) for k in matrices]
        biases = [self.weights[self.biases[k]].to(dtype) for k in matrices if k in self.biases]
        before = torch.cat([initial[0][None], h[:-1]])
        cell = initial[1] if len(initial) > 1 else None
        return cells.Run(weights, biases, x, before, h, cell, self.steps.ends)

    def _layers(self, output: Tensor) -> list[Tensor]:
        """The input of the first layer and the outputs of all, ``[T, N, *]``, of which the last is known."""
        found, count = [self.x], len(self.initial[0]) // self.directions
        for layer in range(count - 1):
            states = [state.chunk(count)[layer].contiguous() for state in self.initial]
            size = len(self.weights) // count
            weights = self.weights[layer * size : (layer + 1) * size]
            options = self.arguments["has_biases"], 1, 0.0, False, self.directions == 2
            hx = states if len(states) > 1 else states[0]
            with warnings.catch_warnings():  # weights that are not in one block of a GPU's memory
                warnings.simplefilter("ignore")
                if (sizes := self.arguments.get("batch_sizes")) is None:
                    found.append(self.kind.builtin(found[-1], hx, weights, *options, False)[0])
                else:
                    rows = self.kind.builtin(
                        self.steps.rows(found[-1]), sizes, hx, weights, *options
                    )[0]
                    found.append(self.steps.padded(rows))
        return [*found, self._steps_first(output)]

    def _split(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Cotangents of the outputs h_t, ``[T, V, N, *]``, and of the final states, ``[V, N, k, *]``."""
        if "batch_sizes" in self.arguments:
            return self._split_rows(g)
        steps, width = len(self.x), self.directions * self.initial[0].shape[2]
        own = g.new_zeros(*g.shape[:2], steps * width) if self.is_cell else g[:, :, : steps * width]
        sizes = [len(state) * state.shape[2] for state in self.initial]
        states = g[:, :, -sum(sizes) :].split(sizes, dim=2)
        final = [
            part.unflatten(2, (len(s), -1)) for part, s in zip(states, self.initial, strict=True)
        ]
        return own.unflatten(2, (steps, width)).permute(2, 0, 1, 3), final

    def _split_rows(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same for the rows of packed outputs and of the final states behind them."""
        counts = [len(state) * state.shape[1] for state in self.initial]
        own, *states = g.split([g.shape[1] - sum(counts), *counts], dim=1)
        own = self.steps.padded(
            own[:, :, : self.directions * self.initial[0].shape[2]].transpose(0, 1)
        )
        final = [
            part[:, :, : s.shape[2]].unflatten(1, (len(s), -1)).transpose(1, 2)
            for part, s in zip(states, self.initial, strict=True)
        ]
        return own.transpose(1, 2).contiguous(), final


def _recurrent(kind: _Kind, call: Call, g: Tensor, **arguments: Any) -> dict[str, Term]:
    """``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh``, ``torch.rnn_relu`` and their cells."""
    network = _Network(kind, arguments)
    output, version = arguments["output"] or (g, -1)
    products = (
        network.backpropagated(g, output) if output._version == version else network.replayed(g)
    )
    terms = {}
    for k, y, x in products:
        terms[f"params{k}"], terms[f"params{network.biases.get(k)}"] = linear.product(y, x, "oi")
    return terms


_KINDS = {
    "lstm": _Kind(replay.lstm, cells.lstm, torch.lstm),
    "gru": _Kind(replay.gru, cells.gru, torch.gru),
    "rnn_tanh": _Kind(replay.tanh, cells.tanh, torch.rnn_tanh),
    "rnn_relu": _Kind(replay.relu, cells.relu, torch.rnn_relu),
}
for _name, _kind in _KINDS.items():
    for _function, _binds in (
        (_kind.builtin, _bind_layers),
        (getattr(torch, f"{_name}_cell"), _bind_cell),
    ):
        rule(
            _function, binds=_binds, slots=("params",), axes=_backpropagable, outputs=_sample_axes, groups=_owners,
            affine=False, bulky=True,
        )(partial(_recurrent, _kind))  # fmt: skip

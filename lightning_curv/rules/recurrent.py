"""Recurrent networks and cells: one call applies every weight at every step.

The steps are shared positions of the weights, as the positions of a sequence are for `F.linear`;
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
from lightning_curv.rules.packed_outputs import rows
from lightning_curv.rules.registry import Call, rule
from lightning_curv.rules.steps import PackedSteps, Steps
from lightning_curv.terms.term import Term

LAYERS = "input hx params has_biases num_layers dropout train bidirectional batch_first"
PACKED = "input batch_sizes hx params has_biases num_layers dropout train bidirectional"
CELL = "input hx w_ih w_hh b_ih b_hh"
# A weight's number, cotangents [V, N, T, o] of its product, and inputs [N, T, i] of that.
Numbered = Iterator[tuple[int, Tensor, Tensor]]


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
    # Torch's overloads differ in their fourth argument: the parameters are a list, a flag is none.
    params_are_fourth = len(args) > 3 and isinstance(args[3], (list, tuple))
    packed = "batch_sizes" in kwargs or params_are_fourth
    names = PACKED if packed else LAYERS
    by_position = dict(zip(names.split(), args, strict=False))
    given = {**by_position, **kwargs}
    states = given.pop("hx")
    params = given.pop("params")
    return _flat(states, params, given)


def _bind_cell(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    by_position = dict(zip(CELL.split(), args, strict=False))
    given = {**by_position, **kwargs}
    # The biases of a cell may be missing, both together.
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = [given[name] for name in names if given.get(name) is not None]
    others = {"input": given["input"], "has_biases": len(weights) == 4}
    return _flat(given["hx"], weights, others)


def _flat(
    states: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    others: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of a call with a name for every state and every parameter."""
    states = [states] if isinstance(states, Tensor) else states
    return {
        **others,
        **{f"states{number}": state for number, state in enumerate(states)},
        **{f"params{number}": parameter for number, parameter in enumerate(params)},
    }


def _numbered(arguments: dict[str, Any], name: str) -> list[Tensor]:
    """The arguments that `_flat` has numbered, in order."""
    keys = [f"{name}{k}" for k in range(len(arguments))]
    return [arguments[key] for key in keys if key in arguments]


def _sample_axes(arguments: dict[str, Any]) -> list[int | None] | None:
    """The axes of the outputs that carry the samples; `None`: rows of packed outputs do."""
    if "batch_sizes" in arguments:
        return None
    states = _numbered(arguments, "states")
    if "num_layers" not in arguments:  # a cell returns its states [N, H] alone
        return [0] * len(states)
    output_axis = 0 if arguments["batch_first"] else 1
    return [output_axis, *[1] * len(states)]


def _owners(arguments: dict[str, Any]) -> Tensor | None:
    """The sequence of every row of a packed output and of the final states behind it."""
    if "batch_sizes" not in arguments:
        return None
    steps = _steps(arguments)
    states = _numbered(arguments, "states")
    sequences = torch.arange(steps.sizes[0], device=steps.sample.device)
    number_of_states = sum(map(len, states))
    return torch.cat([steps.sample, sequences.repeat(number_of_states)])


def _steps(arguments: dict[str, Any]) -> PackedSteps:
    return PackedSteps(arguments["batch_sizes"], arguments["input"].device)


def _backpropagable(call: Call, arguments: dict[str, Any]) -> tuple[int, ...]:
    if arguments.get("num_layers", 1) > 1 and arguments["train"] and arguments["dropout"] > 0:
        raise UnsupportedError(
            "Expected a recurrent network without dropout between its layers, found "
            f"dropout={arguments['dropout']}, whose masks are hidden. Use `dropout=0`, or "
            "one-layer networks with `nn.Dropout` in between."
        )
    return (0,)


class _Network:
    """The arguments of a call; a cell is a network of one layer and one step.

    Attributes:
        x: Inputs, `[T, N, D]`, padded if they are packed.
        steps: What the sequences have of the T steps.
        initial: Initial states, `[layers·directions, N, *]` each.
        weights: All parameters by number.
        biases: Numbers of the biases by those of their weights.
        matrices: Numbers of the weights of every direction of every layer: W_i, W_h and, where
            projected, W_r.
    """

    def __init__(self, kind: _Kind, arguments: dict[str, Any]) -> None:
        self.kind = kind
        self.arguments = arguments
        self.is_cell = "num_layers" not in arguments
        self.weights = _numbered(arguments, "params")
        dtype = self.weights[0].dtype  # under autocast the inputs may have another one
        x = arguments["input"].to(dtype)
        initial = [state.to(dtype) for state in _numbered(arguments, "states")]
        if self.is_cell:
            self.initial = [state[None] for state in initial]
        else:
            self.initial = initial
        self.steps: Steps
        if "batch_sizes" in arguments:
            self.steps = _steps(arguments)
        elif self.is_cell:
            self.steps = Steps(1)
        else:
            step_axis = int(arguments["batch_first"])
            self.steps = Steps(x.shape[step_axis])
        self.x = self._steps_first(x)
        self.directions = 1 + arguments.get("bidirectional", False)
        # Torch has W_i, W_h, b_i, b_h, W_r of one direction of one layer behind each other; the
        # biases and the projection W_r may be missing.
        count = len(self.weights) // len(self.initial[0])
        self.biases: dict[int, int] = {}
        self.matrices: list[list[int]] = []
        for first in range(0, len(self.weights), count):
            if arguments["has_biases"]:
                self.biases[first] = first + 2
                self.biases[first + 1] = first + 3
            matrices = [first, first + 1]
            if count % 2:  # the projection is the last one
                matrices.append(first + count - 1)
            self.matrices.append(matrices)

    def _steps_first(self, tensor: Tensor) -> Tensor:
        """Inputs or outputs as `[T, N, *]`, padded if they are packed."""
        if self.is_cell:
            return tensor[None]
        if self.arguments.get("batch_first"):
            return tensor.transpose(0, 1)
        return self.steps.padded(tensor)

    def replayed(self, g: Tensor) -> Numbered:
        """The cotangents at the products with the weights, by differentiating every step.

        Args:
            g: Cotangents of all outputs, `[V, N, K]`.
        """
        # A shift is added to every product: the cotangent of the shift is that of the product.
        steps, samples = self.x.shape[:2]
        shifts = {}
        for number, weight in enumerate(self.weights):
            if weight.ndim == 2:
                shifts[number] = self.x.new_zeros(steps, samples, len(weight))
        with_inputs = torch.func.vjp(self._outputs, shifts, has_aux=True)
        whole, pull, inputs = with_inputs  # type: ignore[misc]
        g = g.to(whole.dtype)
        if len(g) == 1:  # `vmap` costs time, and gains none for one column
            (of_column,) = pull(g[0])
            cotangents = {number: y[None] for number, y in of_column.items()}
        else:
            (cotangents,) = torch.func.vmap(pull)(g)
        for number, y in cotangents.items():
            x = self.steps.masked(inputs[number])
            yield number, y.movedim(1, 2), x.movedim(0, 1)

    def _outputs(self, shifts: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """All outputs as rows `[N, K]`, and the inputs `[T, N, i]` of every product."""
        run = replay.Replay(
            self.kind.step,
            self.weights,
            self.biases,
            shifts,
            self.steps,
        )
        h, final = run.network(self.x, self.initial, self.directions)
        if self.arguments.get("batch_first"):
            h = h.transpose(0, 1)
        else:
            h = self.steps.rows(h)
        if self.is_cell:
            tensors = [state[0] for state in final]
        else:
            tensors = [h, *final]
        inputs = {}
        for number, parts in run.inputs.items():
            # W_i is applied to all steps at once, the other weights to one after the other.
            if parts[0].ndim == 3:
                inputs[number] = parts[0]
            else:
                inputs[number] = torch.stack(parts)
        return rows(tensors, _sample_axes(self.arguments)), inputs

    @torch.no_grad()
    def backpropagated(self, g: Tensor, output: Tensor) -> Numbered:
        """The same in closed form, from the last layer to the first.

        Args:
            g: Cotangents of all outputs.
            output: What the call returned first.
        """
        dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
        # What autocast has rounded is not rounded once more on the way back.
        layers = [values.to(dtype) for values in self._layers(output)]
        arriving, final = self._split(g.to(dtype))
        for layer in reversed(range(len(layers) - 1)):
            # Cotangents of the inputs of this layer, the outputs of the one below: one per
            # direction, which read the same inputs.
            below = []
            for direction in range(self.directions):
                number = layer * self.directions + direction
                x = layers[layer]
                h = layers[layer + 1].chunk(self.directions, dim=-1)[direction]
                y = arriving.chunk(self.directions, dim=-1)[direction]
                backwards = direction == 1
                if backwards:  # the other direction begins with the last step of every sequence
                    x, h, y = (self.steps.backwards(t, t.ndim - 2) for t in (x, h, y))
                run = self._run(number, x, h, dtype)
                final_of_direction = [state[:, :, number] for state in final]
                products = self.kind.cell(run, y, final_of_direction)
                if layer:
                    by_products, _ = products[0]
                    pulled = cells.times(by_products, run.weights[0]).permute(2, 0, 1, 3)
                    if backwards:
                        pulled = self.steps.backwards(pulled, 2)
                    below.append(pulled)
                weights = self.matrices[number]
                for weight, (cotangents, inputs) in zip(weights, products, strict=True):
                    own_steps = self.steps.masked(inputs)
                    yield weight, cotangents, own_steps.transpose(0, 1)
            if below:
                arriving = sum(below[1:], start=below[0])

    def _run(self, number: int, x: Tensor, h: Tensor, dtype: torch.dtype) -> cells.Run:
        """One direction of one layer that has run with inputs `x` and outputs `h`."""
        # Torch's order of the parameters is known to `__init__` alone.
        matrices = self.matrices[number]
        initial = [state[number].to(dtype) for state in self.initial]
        weights = [self.weights[k].to(dtype) for k in matrices]
        bias_numbers = [self.biases[k] for k in matrices if k in self.biases]
        biases = [self.weights[k].to(dtype) for k in bias_numbers]
        before = torch.cat([initial[0][None], h[:-1]])
        cell = initial[1] if len(initial) > 1 else None
        return cells.Run(
            weights,
            biases,
            x,
            before,
            h,
            cell,
            self.steps.ends,
        )

    def _layers(self, output: Tensor) -> list[Tensor]:
        """The input of the first layer and the outputs of all layers, `[T, N, *]`.

        The call has returned the output of the last layer alone: those below are run again.
        """
        values = [self.x]
        count = len(self.initial[0]) // self.directions
        size = len(self.weights) // count
        sizes = self.arguments.get("batch_sizes")
        # Torch's arguments has_biases, num_layers, dropout, train, bidirectional.
        options = self.arguments["has_biases"], 1, 0.0, False, self.directions == 2
        for layer in range(count - 1):
            states = [state.chunk(count)[layer].contiguous() for state in self.initial]
            weights = self.weights[layer * size : (layer + 1) * size]
            hx = states if len(states) > 1 else states[0]
            with warnings.catch_warnings():  # weights that are not in one block of a GPU's memory
                warnings.simplefilter("ignore")
                if sizes is None:
                    h, *_ = self.kind.builtin(values[-1], hx, weights, *options, False)
                else:
                    packed = self.steps.rows(values[-1])
                    h, *_ = self.kind.builtin(packed, sizes, hx, weights, *options)
                    h = self.steps.padded(h)
            values.append(h)
        return [*values, self._steps_first(output)]

    def _split(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Cotangents of outputs, `[T, V, N, *]`, and of final states, `[V, N, k, *]`."""
        if "batch_sizes" in self.arguments:
            return self._split_rows(g)
        steps = len(self.x)
        width = self.directions * self.initial[0].shape[2]
        if self.is_cell:  # its output is its state
            own = g.new_zeros(*g.shape[:2], steps * width)
        else:
            own = g[:, :, : steps * width]
        sizes = [len(state) * state.shape[2] for state in self.initial]
        parts = g[:, :, -sum(sizes) :].split(sizes, dim=2)
        final = []
        for part, state in zip(parts, self.initial, strict=True):
            final.append(part.unflatten(2, (len(state), -1)))
        by_step = own.unflatten(2, (steps, width))
        return by_step.permute(2, 0, 1, 3), final

    def _split_rows(self, g: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same for the rows of packed outputs and of the final states behind them."""
        counts = [len(state) * state.shape[1] for state in self.initial]
        own, *parts = g.split([g.shape[1] - sum(counts), *counts], dim=1)
        # Rows are as wide as the widest output; what is behind the end of narrower ones is zero.
        width = self.directions * self.initial[0].shape[2]
        rows_first = own[:, :, :width].transpose(0, 1)
        by_step = self.steps.padded(rows_first)
        final = []
        for part, state in zip(parts, self.initial, strict=True):
            own_width = part[:, :, : state.shape[2]]
            states = own_width.unflatten(1, (len(state), -1))
            final.append(states.transpose(1, 2))
        return by_step.transpose(1, 2).contiguous(), final


def _recurrent(kind: _Kind, call: Call, g: Tensor, **arguments: Any) -> dict[str, Term]:
    """`torch.lstm`, `torch.gru`, `torch.rnn_tanh`, `torch.rnn_relu` and their cells."""
    # A cell is a network of one layer and one step: one mechanism for both.
    network = _Network(kind, arguments)
    output, version = arguments["output"] or (g, -1)
    # The closed form is right for what the call returned, as long as nobody has changed it.
    unchanged = output._version == version
    if unchanged:
        products = network.backpropagated(g, output)
    else:
        products = network.replayed(g)
    terms = {}
    for number, y, x in products:
        # Every step is a shared position, as of a linear layer that is applied to a sequence.
        weight_term, bias_term = linear.product(y, x, "oi")
        terms[f"params{number}"] = weight_term
        terms[f"params{network.biases.get(number)}"] = bias_term
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
            _function,
            binds=_binds,
            parameters=("params",),
            axes=_backpropagable,
            outputs=_sample_axes,
            groups=_owners,
            affine=False,
            defers=True,
        )(partial(_recurrent, _kind))

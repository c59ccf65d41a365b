"""Recurrences that have run, backpropagated in closed form.

Once the outputs h_1 … h_T are known, the products of all steps with the weights are two products of
matrices, and the gates are elementwise functions of them; only the cell state of an LSTM is found
step by step, by one elementwise operation each. The backward pass of a step is linear: one product
with the recurrent weight and a few elementwise operations, for all columns together. Some steps at
a time are worked on in cache.

A cell is a function of a `Run`, the cotangents `[T, V, N, P]` of its outputs h_t and those of its
final states, `[V, N, *]`. It returns for every weight the cotangents of its product,
`[V, N, T, o]`, and the inputs of that product, `[T, N, i]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_curv.kernels import onednn

BLOCK_BYTES = 2**19  # of products with the weights that are worked on at once
# Functions of a cotangent (a factor of the derivative) and of the nonlinearity's value.
by_sigmoid = torch.ops.aten.sigmoid_backward
by_tanh = torch.ops.aten.tanh_backward
Products = list[tuple[Tensor, Tensor]]


@dataclass
class Run:
    """One direction of one layer that has run, in the order of its steps.

    Attributes:
        weights: W_i, W_h and, where the output is projected, W_r.
        biases: b_i and b_h, if there are any.
        x: Inputs, `[T, N, D]`.
        before: h_{t-1}, `[T, N, P]`.
        after: h_t, `[T, N, P]`.
        cell: c_0 of an LSTM, `[N, H]`.
        ends: The samples whose last step is a certain one, by that step. Cotangents behind it are
            zero.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    x: Tensor
    before: Tensor
    after: Tensor
    cell: Tensor | None = None
    ends: Mapping[int, slice] = field(default_factory=dict)

    def blocks(self) -> list[range]:
        """Ranges of consecutive steps whose products with the weights stay in cache."""
        # The products of one step: a row of gates per sample.
        step_bytes = self.x.shape[1] * len(self.weights[0]) * self.x.element_size()
        size = max(1, BLOCK_BYTES // max(1, step_bytes))
        steps = len(self.x)
        return [range(start, min(start + size, steps)) for start in range(0, steps, size)]

    def product(self, number: int, steps: range) -> Tensor:
        """W_i x_t + b_i (number 0) or W_h h_{t-1} + b_h (1), `[t, N, o]`."""
        inputs = (self.x, self.before)[number]
        some_inputs = inputs[steps.start : steps.stop]
        product = times(some_inputs, self.weights[number].mT)
        if self.biases:
            product.add_(self.biases[number])
        return product

    def arriving(self, g: Tensor, final: Tensor) -> list[Tensor]:
        """Cotangents `[V, N, P]` of every h_t, those of the final states added at the ends."""
        # A list, so that single steps can be replaced without a copy of all.
        arriving = [*g.unbind()]
        for t, ended in self.ends.items():
            arriving[t] = arriving[t].clone()  # `g` belongs to others
            arriving[t][:, ended] += final[:, ended]
        return arriving

    def back(self, products: Tensor, g: Tensor) -> Tensor:
        """Cotangents of h_t, `[V, N, P]`.

        Args:
            products: Cotangents of the products of the next step with W_h, `[V, N, o]`.
            g: Cotangents that arrive at h_t itself, `[V, N, P]`.
        """
        recurrent = self.weights[1]
        rows = products.view(-1, len(recurrent))
        by_state = onednn.mm(rows, recurrent)
        return by_state.view(g.shape).add_(g)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` for `x [*, k]`."""
    rows = x.reshape(-1, x.shape[-1])
    products = onednn.mm(rows, matrix)
    return products.view(*x.shape[:-1], matrix.shape[1])


def lstm(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Long short-term memory, its output projected or not.

    The loop over the steps is the bottleneck of recurrent networks: everything that needs no step
    before it is computed for a block of steps, and a step writes into memory that is there.
    """
    gates, cells = _lstm_states(run)
    # A single column's cotangents take the memory of the gates: the gates of a step are read for
    # the last time before its cotangents are written.
    columns = g.shape[1]
    if columns == 1:
        by_gates = gates[None]
    else:
        by_gates = gates.new_empty(columns, *gates.shape)
    # With a projection W_r, h_t = W_r (o ⊙ tanh c_t): its cotangents and inputs are kept too.
    projected = None
    hidden = None
    if len(run.weights) > 2:
        hidden = torch.empty_like(cells[1:])
        projected = g.new_empty(*g.shape[1:3], len(g), g.shape[3])
    # In the loop, `h` and `c` are the cotangents of h_t and of c_t, `[V, N, H]`.
    c = torch.zeros_like(final[1])
    arriving = run.arriving(g, final[0])
    steps_of_gates = by_gates.unbind(2)
    h = arriving[-1]
    row = g.new_empty(*g.shape[1:3], *gates.shape[2:])
    # Views: what is written into them is written into `row` and read from `c`.
    row_by_c = row[:, :, :3]
    row_by_h = row[:, :, 3]
    wide = c.unsqueeze(2)
    for block in reversed(run.blocks()):
        i, f, z, o = gates[:, block.start : block.stop].permute(2, 1, 0, 3)
        before = cells[block.start : block.stop]
        squashed = cells[block.start + 1 : block.stop + 1].tanh()
        if hidden is not None:
            torch.mul(o, squashed, out=hidden[block.start : block.stop])
        # c_t = f ⊙ c_{t-1} + i ⊙ z: what a cotangent of c_t is multiplied by on its way to what
        # goes into i, f and z.
        by_c = g.new_empty(len(block), len(gates), 3, gates.shape[3])
        by_sigmoid.grad_input(z, i, grad_input=by_c[:, :, 0])
        by_sigmoid.grad_input(before, f, grad_input=by_c[:, :, 1])
        by_tanh.grad_input(i, z, grad_input=by_c[:, :, 2])
        # h_t = o ⊙ tanh c_t: the same for a cotangent of h_t, on its way to o and to c_t.
        by_h = by_sigmoid(squashed, o)
        through = by_tanh(o, squashed)
        derivatives = zip(
            by_c.unbind(),
            by_h.unbind(),
            through.unbind(),
            f.unbind(),
            block,
            strict=True,
        )
        for by_c_t, by_h_t, through_t, f_t, t in reversed([*derivatives]):
            # Sequences that end here: the cotangent of their final cell state arrives.
            ended = run.ends.get(t)
            if ended is not None:
                c[:, ended] += final[1][:, ended]
            if projected is not None:
                projected[:, :, t] = h
                h = times(h, run.weights[2])
            c.addcmul_(h, through_t)
            torch.mul(by_c_t, wide, out=row_by_c)
            torch.mul(by_h_t, h, out=row_by_h)
            c.mul_(f_t)
            steps_of_gates[t].copy_(row)
            if t:
                h = run.back(row, arriving[t - 1])
    # Both products go into the same sum: their cotangents are the same.
    products = by_gates.flatten(3)
    result = [(products, run.x), (products, run.before)]
    if projected is None or hidden is None:
        return result
    return [*result, (projected, hidden)]


def _lstm_states(run: Run) -> tuple[Tensor, Tensor]:
    """The gates i, f, z, o, `[N, T, 4, H]`, and c_0 … c_T, `[T + 1, N, H]`."""
    assert run.cell is not None
    steps, samples = run.x.shape[:2]
    width = run.cell.shape[1]
    gates = run.x.new_empty(samples, steps, 4, width)
    cells = run.x.new_empty(steps + 1, samples, width)
    # One product of matrices instead of two: the inputs beside the states, W_i beside W_h.
    weight = torch.cat([run.weights[0], run.weights[1]], dim=1).mT
    if run.biases:
        bias = run.biases[0] + run.biases[1]
    else:
        bias = run.x.new_zeros(())
    last = run.cell
    cells[0] = last
    for block in run.blocks():
        x = run.x[block.start : block.stop]
        before = run.before[block.start : block.stop]
        inputs = torch.cat([x, before], dim=2)
        products = times(inputs, weight).add_(bias)
        # The gates take the memory of the products.
        some_gates = products.unflatten(2, (4, -1))
        i, f, z, o = some_gates.unbind(2)
        some_gates[:, :, :2].sigmoid_()  # i and f
        z.tanh_()
        o.sigmoid_()
        # c_t = i ⊙ z + f ⊙ c_{t-1}; only the second summand has to wait for the step before.
        c = torch.mul(i, z, out=cells[block.start + 1 : block.stop + 1])
        for f_t, c_t in zip(f, c, strict=True):
            last = c_t.addcmul_(f_t, last)
        gates[:, block.start : block.stop] = some_gates.transpose(0, 1)
    return gates, cells


def gru(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Gated recurrent unit."""
    columns, samples = g.shape[1:3]
    width = len(run.weights[0]) // 3
    by_x, by_h = g.new_empty(2, columns, samples, len(g), 3, width)
    arriving = run.arriving(g, final[0])
    h = arriving[-1]
    for block in reversed(run.blocks()):
        gates, candidate, keep = _gru_derivatives(run, block)
        for k, t in reversed([*enumerate(block)]):
            row = gates[k] * h.unsqueeze(2)
            by_h[:, :, t] = row
            # The gates r and z see the sum of both products, n sees that with W_h times r.
            by_x[:, :, t, :2] = row[:, :, :2]
            torch.mul(candidate[k], h, out=by_x[:, :, t, 2])
            if t:
                # h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}: past the weights, through z.
                directly = torch.addcmul(arriving[t - 1], h, keep[k])
                h = run.back(row, directly)
    return [
        (by_x.flatten(3), run.x),
        (by_h.flatten(3), run.before),
    ]


def _gru_derivatives(run: Run, block: range) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of h_t by the products of a gated recurrent unit.

    Those by W_h h_{t-1} through the gates r, z, n, `[t, N, 3, H]`; that by the part of W_i x_t in
    n, `[t, N, H]`; and the gate z, the derivative by h_{t-1} itself.
    """
    x = run.product(0, block).unflatten(2, (3, -1))
    h = run.product(1, block).unflatten(2, (3, -1))
    before = run.before[block.start : block.stop]
    into_gates = x[:, :, :2] + h[:, :, :2]
    r, z = into_gates.sigmoid_().unbind(2)
    x_n = x[:, :, 2]
    h_n = h[:, :, 2]
    n = torch.addcmul(x_n, r, h_n).tanh_()  # tanh(W_in x + r ⊙ W_hn h)
    by_n = by_tanh(1 - z, n)
    by_r = by_sigmoid(by_n * h_n, r)
    by_z = by_sigmoid(before - n, z)
    by_products = torch.stack([by_r, by_z, by_n * r], dim=2)
    return by_products, by_n, z


def _elman(
    derivative: Callable[[Tensor], Tensor],
    run: Run,
    g: Tensor,
    final: Sequence[Tensor],
) -> Products:
    """Elman's network, whose nonlinearity has a derivative that is a function of its value."""
    arriving = run.arriving(g, final[0])
    columns, samples = g.shape[1:3]
    products = g.new_empty(columns, samples, len(g), g.shape[3])
    # Of all steps at once: only the products with W_h have to wait for each other.
    slopes = derivative(run.after)
    h = arriving[-1]
    for t in reversed(range(len(g))):
        row = slopes[t] * h
        products[:, :, t] = row
        if t:
            h = run.back(row, arriving[t - 1])
    return [(products, run.x), (products, run.before)]


def tanh(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Elman's network with the hyperbolic tangent."""
    return _elman(lambda h: 1 - h * h, run, g, final)


def relu(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Elman's network with rectifiers."""
    return _elman(lambda h: (h > 0).to(h.dtype), run, g, final)

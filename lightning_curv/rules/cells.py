"""Recurrences that have run, backpropagated in closed form.

Once the outputs h_1 … h_T are known, the products of all steps with the weights are two products of matrices, and the
derivatives of the gates are elementwise functions of them; only the cell state of an LSTM is found step by step, by one
elementwise operation each. The backward pass of a step is linear: one product with the recurrent weight and a few
elementwise operations, for all columns together.

A cell is a function of a `Run`, the cotangents ``[T, V, N, P]`` of its outputs h_t and those of its final states,
``[V, N, *]``. It returns for every weight the cotangents of its product, ``[T, V, N, o]``, and the inputs of that
product, ``[T, N, i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv import matmul

BLOCK_BYTES = 2**19  # of products with the weights that are worked on at once, in cache
Products = list[tuple[Tensor, Tensor]]


@dataclass
class Run:
    """One direction of one layer that has run, in the order of its steps.

    Attributes:
        weights: W_i, W_h and, where the output is projected, W_r.
        biases: b_i and b_h, if there are any.
        x: Inputs, ``[T, N, D]``.
        before: h_{t-1}, ``[T, N, P]``.
        after: h_t, ``[T, N, P]``.
        cell: c_0 of an LSTM, ``[N, H]``.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    x: Tensor
    before: Tensor
    after: Tensor
    cell: Tensor | None = None

    def blocks(self) -> Iterator[slice]:
        """Some consecutive steps at a time."""
        bytes_ = self.x.shape[1] * len(self.weights[0]) * self.x.element_size()
        size = max(1, BLOCK_BYTES // max(1, bytes_))
        return (slice(start, start + size) for start in range(0, len(self.x), size))

    def product(self, number: int, steps: slice) -> Tensor:
        """W_i x_t + b_i (number 0) or W_h h_{t-1} + b_h (1)."""
        y = times((self.x, self.before)[number][steps], self.weights[number].mT)
        return y.add_(self.biases[number]) if self.biases else y

    def arriving(self, products: Tensor, g: Tensor, final: Tensor) -> Iterator[tuple[int, Tensor]]:
        """From the last step to the first, its number and the cotangents ``[V, N, P]`` of h_t.

        Args:
            products: Cotangents of the products with W_h, ``[T, V, N, o]``, filled in step by step.
            g: Those of the outputs, ``[T, V, N, P]``.
            final: Those of h_T as a final state.
        """
        rows, outputs, weight, shape = products.flatten(1, 2).unbind(), g.unbind(), self.weights[1], g.shape[1:]
        h = outputs[-1] + final
        for t in reversed(range(len(outputs))):
            yield t, h
            if t:
                h = matmul.mm(rows[t], weight).view(shape).add_(outputs[t - 1])


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` for ``x [*, *, k]``."""
    return matmul.mm(x.reshape(-1, x.shape[-1]), matrix).view(*x.shape[:-1], -1)


def lstm(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Long short-term memory, its output projected or not."""
    gates, through, forget, hidden = _lstm_derivatives(run)
    found = gates if g.shape[1] == 1 else gates.new_empty(*g.shape[:3], *gates.shape[3:])
    projected = None if hidden is None else g.new_empty(g.shape)
    products, c = found.flatten(3), final[1].clone()
    by_c, by_h = gates[..., :3, :].unbind(), gates[..., 3, :].unbind()
    to_c, to_h = found[..., :3, :].unbind(), found[..., 3, :].unbind()
    for t, h in run.arriving(products, g, final[0]):
        if projected is not None:
            projected[t] = h
            h = times(h, run.weights[2])
        c.addcmul_(h, through[t])
        torch.mul(by_c[t], c.unsqueeze(-2), out=to_c[t])
        torch.mul(by_h[t], h, out=to_h[t])
        c.mul_(forget[t])
    result = [(products, run.x), (products, run.before)]
    return result if projected is None or hidden is None else [*result, (projected, hidden)]


def _lstm_derivatives(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """∂c_t by the products of i, f, z, and ∂h_t by that of o, ``[T, 1, N, 4, H]``; ∂h_t/∂c_t; f; h_t where projected.

    h_t: without its projection.
    """
    shape = (*run.x.shape[:2], len(run.weights[0]) // 4)
    gates = run.x.new_empty(shape[0], 1, shape[1], 4, shape[2])
    through, forget = run.x.new_empty(2, *shape)
    hidden = run.x.new_empty(shape) if len(run.weights) > 2 else None
    assert run.cell is not None
    last = run.cell
    for block in run.blocks():
        pre = run.product(0, block).add_(run.product(1, block)).unflatten(2, (4, -1))
        i, f, z, o = pre.unbind(2)
        pre[:, :, :2].sigmoid_()
        z.tanh_()
        o.sigmoid_()
        c, first = i * z, last
        for f_t, c_t in zip(f, c, strict=True):
            last = c_t.addcmul_(f_t, last)
        before, squashed = torch.cat([first[None], c[:-1]]), c.tanh()
        forget[block] = f
        if hidden is not None:
            torch.mul(o, squashed, out=hidden[block])
        torch.addcmul(o, o, squashed.square(), value=-1, out=through[block])
        derivatives = gates[block, 0].unbind(2)
        torch.mul(i - i.square(), z, out=derivatives[0])
        torch.mul(f - f.square(), before, out=derivatives[1])
        torch.addcmul(i, i, z.square(), value=-1, out=derivatives[2])
        torch.mul(o - o.square(), squashed, out=derivatives[3])
    return gates, through, forget, hidden


def gru(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Gated recurrent unit."""
    gates, candidate, keep = _gru_derivatives(run)
    found, states = gates.new_empty(*g.shape[:3], *gates.shape[2:]), g.new_empty(g.shape)
    products = found.flatten(3)
    for t, h in run.arriving(products, g, final[0]):
        torch.add(h, 0 if t + 1 == len(g) else states[t + 1] * keep[t + 1], out=states[t])
        torch.mul(gates[t], states[t].unsqueeze(-2), out=found[t])
    width = 2 * candidate.shape[2]
    inputs = torch.cat([products[..., :width], states.mul_(candidate.unsqueeze(1))], dim=-1)
    return [(inputs, run.x), (products, run.before)]


def _gru_derivatives(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """∂h_t by W_h h_{t-1} through the gates r, z, n, ``[T, N, 3, H]``; ∂h_t by n's part of W_i x_t; z."""
    shape = (*run.x.shape[:2], len(run.weights[0]) // 3)
    gates = run.x.new_empty(*shape[:2], 3, shape[2])
    candidate, keep = run.x.new_empty(2, *shape)
    for block in run.blocks():
        x, h = (run.product(k, block).unflatten(2, (3, -1)) for k in (0, 1))
        r, z = (x[:, :, :2] + h[:, :, :2]).sigmoid_().unbind(2)
        n = torch.addcmul(x[:, :, 2], r, h[:, :, 2]).tanh_()
        by_n = torch.mul(1 - z, 1 - n.square(), out=candidate[block])
        by_r = by_n * h[:, :, 2]
        derivatives = gates[block].unbind(2)
        torch.mul(r - r.square(), by_r, out=derivatives[0])
        torch.mul(z - z.square(), run.before[block] - n, out=derivatives[1])
        torch.mul(by_n, r, out=derivatives[2])
        keep[block] = z
    return gates, candidate, keep


def _elman(derivative: Callable[[Tensor], Tensor], run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Elman's network, whose nonlinearity has a derivative that is a function of its value."""
    slopes, products = derivative(run.after), g.new_empty(g.shape)
    for t, h in run.arriving(products, g, final[0]):
        torch.mul(h, slopes[t], out=products[t])
    return [(products, run.x), (products, run.before)]


def tanh(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Elman's network with the hyperbolic tangent."""
    return _elman(lambda h: 1 - h.square(), run, g, final)


def relu(run: Run, g: Tensor, final: Sequence[Tensor]) -> Products:
    """Elman's network with rectifiers."""
    return _elman(lambda h: (h > 0).to(h.dtype), run, g, final)

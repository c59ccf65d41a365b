"""Networks that move rows in every way that people publish; a row of the table is tested with every loss and quantity.

A routing makes its modules, draws a batch of N samples, and runs them: `forward(net, batch)` gives
``[N, C]`` (or ``[N, ...]``), and `sample(batch, n)` is the batch that holds the n-th sample alone,
which is what brute force runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

C = 3  # outputs of a sample
D = 4  # features


@dataclass(frozen=True)
class Routing:
    """One way of moving rows."""

    modules: Callable[[], nn.Module]
    draw: Callable[[int], Any]
    forward: Callable[[nn.Module, Any], Tensor]
    sample: Callable[[Any, int], Any]


def net(**modules: Any) -> Callable[[], nn.Module]:
    """Modules and parameters by name."""

    def make() -> nn.Module:
        model = nn.Module()
        for name, value in modules.items():
            made = value()
            if isinstance(made, nn.Module):
                model.add_module(name, made)
            else:
                model.register_parameter(name, nn.Parameter(made))
        return model.double()

    return make


def linear(inputs=D, outputs=D):
    return lambda: nn.Linear(inputs, outputs)


def table(*shape):
    return lambda: torch.randn(shape)


def rows(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def first(batch, n):
    return batch[n : n + 1]


# --- rows of different number per sample -----------------------------------------------------------------------------


def draw_graphs(n):
    """Nodes of graphs of 1, 2, 3, 4, 1, ... nodes in random order, and their owners."""
    owner = torch.repeat_interleave(torch.arange(n), 1 + torch.arange(n) % 4)
    owner = owner[torch.randperm(len(owner))]
    return torch.randn(len(owner), D, dtype=torch.float64), owner, n


def one_graph(batch, n):
    x, owner, _ = batch
    return x[owner == n], torch.zeros(int((owner == n).sum()), dtype=torch.long), 1


def graph_convolution(model, batch):
    x, owner, n = batch
    near = (owner[:, None] == owner).to(x.dtype)
    h = (near / near.sum(1, keepdim=True)) @ model.a(x)
    h = model.b(h.tanh()).tanh()
    return model.head(x.new_zeros(n, D).index_add(0, owner, h))


def graph_scatter(model, batch):
    x, owner, n = batch
    h = model.a(x).tanh()
    sums = x.new_zeros(n, D).scatter_add(0, owner[:, None].expand(-1, D), h)
    h = model.b(h - sums[owner]).relu()
    return model.head(x.new_zeros(n, D).index_add_(0, owner, h))


def draw_masked(n):
    lengths = 1 + torch.arange(n) % 3
    return torch.randn(n, 3, D, dtype=torch.float64), torch.arange(3) < lengths[:, None]


def masked_rows(model, batch):
    x, mask = batch
    h = model.a(x)[mask]
    h = model.b(h.tanh()).tanh()
    padded = x.new_zeros(*mask.shape, D)
    padded[mask] = h
    return model.head(padded.sum(1))


def packed(kind):
    def forward(model, batch):
        x, mask = batch
        sequences = pack_padded_sequence(x, mask.sum(1), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(model.rnn(sequences)[0], batch_first=True)
        return model.head(out.sum(1))

    return Routing(
        net(rnn=lambda: kind(D, D, batch_first=True), head=linear(D, C)), draw_masked, forward, pair
    )


def pair(batch, n):
    return tuple(part[n : n + 1] for part in batch)


def experts(model, x):
    """Tokens go to the expert that they choose, in a loop over the experts."""
    flat = x.flatten(0, 1)
    choice = (flat[:, 0] > 0).long() + (flat[:, 1] > 0.5).long()
    out = torch.zeros_like(flat)
    for k, expert in enumerate((model.a, model.b, model.c)):
        chosen = (choice == k).nonzero().flatten()
        out = out.index_add(0, chosen, expert(flat[chosen]).tanh() * flat[chosen].sigmoid())
    return model.head(out.unflatten(0, x.shape[:2]).mean(1))


def sorted_rows(model, x):
    order = x[:, 0].argsort(descending=True)
    return model.head(model.b(model.a(x[order]).tanh())[order.argsort()].tanh())


def sorted_inside(model, x):
    h = model.a(x)
    order = x[:, 1].argsort()
    return model.head(model.b(h[order].tanh())[order.argsort()])


def gathered(model, x):
    h = model.a(x)  # [N, T, D]
    best = x.sum(-1).topk(2, dim=1).indices
    return model.head(h.gather(1, best[..., None].expand(-1, -1, D)).tanh().sum(1))


# --- views, orders of axes -------------------------------------------------------------------------------------------


def siamese(model, x):
    a, b = model.a(torch.cat([x[:, 0], x[:, 1]])).tanh().chunk(2)
    return model.head((a - b).square())


def interleaved(model, x):
    h = model.a(x.flatten(0, 1)).tanh()
    return model.head(h[0::2] * h[1::2])


def batch_second(model, x):
    h = model.a(x.transpose(0, 1)).tanh()  # [T, N, D]
    h, _ = model.mix(h, h, h, need_weights=False)
    return model.head(h.mean(0))


def heads_in_the_batch(model, x):
    h = model.a(x).unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1)  # [N·H, T, 2]
    h = torch.bmm((h @ h.mT).softmax(-1), model.b(h))
    return model.head(h.unflatten(0, (len(x), 2)).flatten(1, 2).mean(1).repeat(1, 2))


def samples_in_channels(model, x):
    """A kernel per sample, all samples as groups of one convolution."""
    weight = model.kernel[None] * model.style(x.mean(1))[:, :, None, None]
    out = F.conv1d(x.flatten(0, 1)[None], weight.flatten(0, 1).expand(-1, 3, -1), groups=len(x))
    return model.head(out.reshape(len(x), 2, -1).mean(-1).repeat(1, 2))


# --- what depends on no sample ---------------------------------------------------------------------------------------


def relative_bias(model, x):
    h = model.a(x)[:, None]
    index = torch.arange(3)[:, None] - torch.arange(3) + 2
    bias = model.table[index].permute(2, 0, 1)[None]
    return model.head(F.scaled_dot_product_attention(h, h, h, attn_mask=bias)[:, 0].mean(1))


def coordinate_network(model, x):
    grid = torch.linspace(-1, 1, 3, dtype=torch.float64)[:, None]
    bias = model.b(model.c(grid).relu_())  # [3, 1]
    h = model.a(x)
    return model.head(torch.where(x > 0, h, bias).tanh().mean(1))


def prompt(model, x):
    tokens = model.b(model.tokens).tanh()
    return model.head(torch.cat([tokens.expand(len(x), -1, -1), model.a(x)], 1).tanh().mean(1))


def queries_batch_second(model, x):
    q = model.query[:, None].repeat(1, len(x), 1) + 0.0
    scores = (q.transpose(0, 1) @ model.a(x).mT).softmax(-1)
    return model.head((scores @ x).mean(1))


def written_in_place(model, x):
    h = model.a(x)
    h[x[..., 0] > 0] = model.token
    h[:, 0] += model.token
    return model.head(h.tanh().mean(1))


def filled_matrix(model, x):
    mixing = torch.zeros(D, D, dtype=torch.float64)
    row, column = torch.triu_indices(D, D, 1)
    mixing[row, column] = model.entries
    return model.head((model.a(x) @ (mixing - mixing.T)).tanh().mean(1))


def noise_level(model, x):
    mean, sigma = torch.broadcast_tensors(model.a(x).mean(1), model.rho.exp())
    return model.head(mean / sigma)


class Twice(torch.autograd.Function):
    """An op of the user's own, with a parameter."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return 2 * x * p

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return 2 * g * p, (2 * g * x).sum(tuple(range(g.ndim - 1)))


def custom_function(model, x):
    return model.head(Twice.apply(model.a(x).tanh(), model.gain).mean(1))


def custom_function_first(model, x):
    return model.head(Twice.apply(x, model.gain).tanh().mean(1))


def derivative(model, x):
    """A derivative of the network by its inputs, as in residuals of differential equations."""
    x = x.clone().requires_grad_()
    u = model.b(model.a(x).tanh())
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return model.head((du + u).mean(1))


def transformed(model, x):
    return model.head(torch.func.vmap(torch.func.vmap(model.a))(x).tanh().mean(1))


def tangent(model, x):
    out, change = torch.func.jvp(lambda v: model.a(v).tanh(), (x,), (torch.ones_like(x),))
    return model.head((out + change).mean(1))


def recurrent_with_dropout(model, x):
    return model.head(model.rnn(x)[0].mean(1))


ALONE = {"a": linear(), "head": linear(D, C)}
TWO = {**ALONE, "b": linear()}

ROUTINGS = {
    "graph_convolution": Routing(net(**TWO), draw_graphs, graph_convolution, one_graph),
    "graph_scatter": Routing(net(**TWO), draw_graphs, graph_scatter, one_graph),
    "masked_rows": Routing(net(**TWO), draw_masked, masked_rows, pair),
    "packed_lstm": packed(nn.LSTM),
    "packed_gru": packed(nn.GRU),
    "experts": Routing(net(**TWO, c=linear()), rows(5, D), experts, first),
    "sorted_rows": Routing(net(**TWO), rows(D), sorted_rows, first),
    "sorted_inside": Routing(net(**TWO), rows(D), sorted_inside, first),
    "gathered": Routing(net(**ALONE), rows(5, D), gathered, first),
    "siamese": Routing(net(**ALONE), rows(2, D), siamese, first),
    "interleaved": Routing(net(**ALONE), rows(2, D), interleaved, first),
    "batch_second": Routing(
        net(**ALONE, mix=lambda: nn.MultiheadAttention(D, 2)), rows(5, D), batch_second, first
    ),
    "heads_in_the_batch": Routing(
        net(**ALONE, b=linear(2, 2)), rows(5, D), heads_in_the_batch, first
    ),
    "samples_in_channels": Routing(
        net(kernel=table(2, 1, 3), style=linear(D, 2), head=linear(D, C)),
        rows(3, D),
        samples_in_channels,
        first,
    ),
    "relative_bias": Routing(net(**ALONE, table=table(5, 1)), rows(3, D), relative_bias, first),
    "coordinate_network": Routing(
        net(**ALONE, c=linear(1, D), b=linear(D, 1)), rows(3, D), coordinate_network, first
    ),
    "prompt": Routing(net(**TWO, tokens=table(2, D)), rows(3, D), prompt, first),
    "queries_batch_second": Routing(
        net(**ALONE, query=table(2, D)), rows(3, D), queries_batch_second, first
    ),
    "written_in_place": Routing(net(**ALONE, token=table(D)), rows(3, D), written_in_place, first),
    "filled_matrix": Routing(
        net(**ALONE, entries=table(D * (D - 1) // 2)), rows(3, D), filled_matrix, first
    ),
    "noise_level": Routing(net(**ALONE, rho=table()), rows(3, D), noise_level, first),
    "custom_function": Routing(net(**ALONE, gain=table(D)), rows(3, D), custom_function, first),
    "custom_function_first": Routing(
        net(gain=table(D), head=linear(D, C)), rows(3, D), custom_function_first, first
    ),
    "derivative": Routing(net(**TWO), rows(3, D), derivative, first),
    "transformed": Routing(net(**ALONE), rows(3, D), transformed, first),
    "tangent": Routing(net(**ALONE), rows(3, D), tangent, first),
}


# --- losses ----------------------------------------------------------------------------------------------------------


def focal(output, y):
    """No known function: focal loss of the true class."""
    p = output.softmax(-1).gather(1, y[:, None])[:, 0]
    return -((1 - p) ** 2) * p.log()


def quantile(output, y):
    error = y[:, None] - output
    return torch.maximum(0.3 * error, -0.7 * error).mean(1)


LOSSES = {
    "cross_entropy": lambda output, y: F.cross_entropy(output, y),
    "cross_entropy_unreduced": lambda output, y: F.cross_entropy(
        output, y, reduction="none"
    ).mean(),
    "mse": lambda output, y: F.mse_loss(output, F.one_hot(y, C).to(output.dtype)),
    "focal": lambda output, y: focal(output, y).mean(),
    "quantile": lambda output, y: quantile(output, y).sum() / len(output),
    "two_terms": lambda output, y: F.cross_entropy(output, y) + 0.1 * output.square().mean(),
    "flattened": lambda output, y: F.binary_cross_entropy_with_logits(
        output.flatten(), F.one_hot(y, C).to(output.dtype).flatten()
    ),
    "loop": lambda output, y: (
        sum(F.cross_entropy(output[n : n + 1], y[n : n + 1]) for n in range(len(y))) / len(y)
    ),
    "stacked": lambda output, y: torch.stack(
        [focal(output[n : n + 1], y[n : n + 1])[0] for n in range(len(y))]
    ).mean(),
}
KNOWN = ("cross_entropy", "cross_entropy_unreduced", "mse", "flattened", "loop")

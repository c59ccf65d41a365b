"""Networks that are drawn at random, from the habits of code that people publish.

A network is a stem, two to four blocks that keep hidden values ``[N, T, D]``, a way to read them
and a loss. Sizes coincide often, for as many steps as samples are what takes one for the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.network import Batch, Network, Problem, settled

CLASSES, VOCABULARY, FEATURES = 3, 7, 4


class Attention(nn.Module):
    """Two heads, fused or written out, with padding, a causal mask or a learned bias."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.fused, self.mask = draw.random() < 0.5, draw.choice(["none", "causal", "padding"])
        self.bias = nn.Parameter(torch.zeros(2, steps, steps)) if draw.random() < 0.4 else None
        self.flat = draw.random() < 0.4  # heads in the axis of the batch

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool)
        seen = {"none": seen, "causal": seen.tril(), "padding": batch["mask"][:, None, None]}[
            self.mask
        ]
        bias = torch.zeros(()).to(h).masked_fill(~seen, -1e9)
        if self.bias is not None:
            bias = bias + self.bias
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        elif self.flat:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (-1, 2)) + bias
            mixed = torch.bmm(scores.softmax(-1).flatten(0, 1), v).unflatten(0, (-1, 2))
        else:
            mixed = (q @ k.mT + bias).softmax(-1) @ v
        return h + self.out(mixed.transpose(1, 2).flatten(2))


class Reused(nn.Module):
    """One layer, used twice; or a matrix that is used transposed too."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.layer, self.tied = nn.Linear(FEATURES, FEATURES), draw.random() < 0.5

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        z = self.layer(h).tanh()
        return z @ self.layer.weight if self.tied else self.layer(z)


class Masked(nn.Module):
    """Rows of padding are multiplied by zero, filled, or packed away and put back."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(FEATURES, FEATURES), draw.choice(["times", "fill", "pack"])

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        mask = batch["mask"]
        if self.how == "pack":
            h = h.clone()
            h[mask] = self.layer(h[mask]).tanh()
            return h
        z = self.layer(h).tanh()
        return z * mask[..., None] if self.how == "times" else z.masked_fill(~mask[..., None], 0.5)


class Written(nn.Module):
    """A learned token is written over some positions, or added there, in place."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.token, self.step = nn.Parameter(torch.zeros(FEATURES)), draw.randrange(steps)
        self.how = draw.choice(["step", "mask", "add", "copy", "scatter"])

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        h = h.clone()
        if self.how == "step":
            h[:, self.step] = self.token
        elif self.how == "mask":
            h[~batch["mask"]] = self.token
        elif self.how == "add":
            h[:, self.step :] += self.token
        elif self.how == "copy":
            h[:, 0].copy_(self.token.expand(len(h), -1))
        else:
            places = batch["order"][:, :1, None].expand(-1, -1, FEATURES)
            h = h.scatter(1, places, self.token.expand(len(h), 1, -1))
        return h


class Contracted(nn.Module):
    """Products by ``einsum``: heads, learned queries, or a mixing of steps."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.how = draw.choice(["heads", "queries", "steps"])
        shape = {"heads": (2, 2, 2), "queries": (steps, FEATURES), "steps": (steps, steps)}[
            self.how
        ]
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        if self.how == "heads":
            return torch.einsum("nthd,hde->nthe", h.unflatten(-1, (2, 2)), self.weight).flatten(2)
        if self.how == "steps":
            return torch.einsum("st,ntd->nsd", self.weight, h)
        scores = torch.einsum("qd,ntd->nqt", self.weight, h).softmax(-1)
        return torch.einsum("nqt,ntd->nqd", scores, h)


class Gathered(nn.Module):
    """Steps in another order for every sample."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.layer, self.how = (
            nn.Linear(FEATURES, FEATURES),
            draw.choice(["gather", "take", "index"]),
        )

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        order, z = batch["order"], self.layer(h)
        if self.how == "gather":
            return z.gather(1, order[..., None].expand_as(z))
        if self.how == "take":
            return torch.take_along_dim(z, order[..., None], 1).sin()
        return z[torch.arange(len(z))[:, None], order]


class Branched(nn.Module):
    """Two ways through, added, side by side, or chosen by a mask."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES, bias=False)
        self.join, self.how = (
            nn.Linear(2 * FEATURES, FEATURES),
            draw.choice(["add", "cat", "where", "gate"]),
        )

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        a, b = self.a(h), self.b(h).tanh()
        if self.how == "cat":
            return self.join(torch.cat([a, b], -1))
        if self.how == "where":
            return torch.where(batch["mask"][..., None], a, b)
        return a * b.sigmoid() if self.how == "gate" else a + b


class Convolved(nn.Module):
    """A convolution along the steps, of all features or of each, and a norm of groups."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        groups = draw.choice([1, 2, FEATURES])
        self.layer = nn.Conv1d(FEATURES, FEATURES, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(2, FEATURES)

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        return self.norm(F.silu(self.layer(h.transpose(1, 2)))).transpose(1, 2)


class Second(nn.Module):
    """The batch is second: a recurrence, or a layer."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        kind = draw.choice([nn.GRU, nn.LSTM, nn.RNN, nn.Linear])
        self.layer = kind(FEATURES, FEATURES)

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        z = self.layer(h.transpose(0, 1))
        return (z[0] if isinstance(z, tuple) else z.tanh()).transpose(0, 1)


class Flattened(nn.Module):
    """Rows of all samples together, in their order or by step."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(FEATURES, FEATURES), nn.LayerNorm(FEATURES)
        self.by_step = draw.random() < 0.4

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        h = h.transpose(0, 1) if self.by_step else h
        z = self.norm(F.gelu(self.layer(h.reshape(-1, FEATURES)))).reshape(h.shape)
        return z.transpose(0, 1) if self.by_step else z


class Placed(nn.Module):
    """Positions: a table, a small network over coordinates, or relative ones."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.how = draw.choice(["table", "coordinates", "relative", "repeated"])
        rows = 2 * steps - 1 if self.how == "relative" else steps
        self.table = nn.Embedding(rows, FEATURES)
        self.first, self.last = nn.Linear(1, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        places = torch.arange(h.shape[1])
        if self.how == "table":
            return h + self.table(places)
        if self.how == "coordinates":
            return h + self.last(self.first(places[:, None].to(h)).relu_())
        if self.how == "repeated":
            return h * self.table(places[None].repeat(len(h), 1)).cos()
        apart = self.table(places[:, None] - places + h.shape[1] - 1)
        return h + torch.einsum("std,ntd->nsd", apart, h).tanh()


class Expert(nn.Module):
    """Two layers, each for some of the rows of all samples."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES) for _ in range(2)])
        self.gate = nn.Linear(FEATURES, 2) if draw.random() < 0.5 else None

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        rows = h.reshape(-1, FEATURES)
        scores = (
            torch.ones(len(rows), 2).to(h) if self.gate is None else self.gate(rows).softmax(-1)
        )
        chosen = batch["order"].flatten() % 2
        out = torch.zeros_like(rows)
        for i, layer in enumerate(self.layers):
            own = torch.where(chosen == i)[0]
            out = out.index_add(0, own, layer(rows[own]).tanh() * scores[own, i, None])
        return out.view_as(h)


class Scaled(nn.Module):
    """Scales: root mean squares, low ranks, parametrized weights."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.how = draw.choice(["rms", "rank", "weight_norm", "scale"])
        self.a, self.b = (
            nn.Parameter(torch.zeros(FEATURES, 2)),
            nn.Parameter(torch.zeros(2, FEATURES)),
        )
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES).double())

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        if self.how == "rms":
            return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1) * self.scale
        if self.how == "rank":
            return h + h @ (self.a @ self.b)
        return (
            self.layer(h).tanh() if self.how == "weight_norm" else F.softplus(h * self.scale.exp())
        )


class Stepped(nn.Module):
    """One step after the other, in a loop."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.cell, self.start = nn.GRUCell(FEATURES, FEATURES), nn.Parameter(torch.zeros(FEATURES))

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        state, found = self.start.expand(len(h), -1), []
        for x in h.unbind(1):
            state = self.cell(x, state)
            found.append(state)
        return torch.stack(found, 1)


BLOCKS = (Attention, Reused, Masked, Written, Contracted, Gathered, Branched, Convolved, Second, Flattened,
          Placed, Expert, Scaled, Stepped)  # fmt: skip


class Generated(nn.Module):
    """Stem, blocks, and what is read of the hidden values."""

    def __init__(self, draw: random.Random, steps: int) -> None:
        super().__init__()
        self.tokens = draw.random() < 0.5
        self.stem = nn.Embedding(VOCABULARY, FEATURES) if self.tokens else nn.Linear(2, FEATURES)
        self.blocks = nn.ModuleList(
            draw.choice(BLOCKS)(draw, steps) for _ in range(draw.randint(2, 4))
        )
        self.read = draw.choice(["mean", "last", "steps", "turned", "largest"])
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, batch: Batch) -> Tensor:
        h = self.stem(batch["tokens"] if self.tokens else batch["x"])
        for block in self.blocks:
            h = block(h, batch)
        mask = batch["mask"]
        if self.read == "mean":
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        elif self.read == "last":
            h = h[torch.arange(len(h)), mask.sum(1) - 1]
        elif self.read == "largest":
            h = h.amax(1)
        z = self.head(h)
        return z.transpose(1, 2) if self.read == "turned" else z


def cross_entropy(z: Tensor, y: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Of classes, along the last axis, or the second one of three."""
    if z.ndim == 3 and z.shape[1] != CLASSES:
        z, y = z.flatten(0, 1), y.flatten()
    return F.cross_entropy(z, y, reduction=reduction)


def by_hand(z: Tensor, y: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """The same, without torch's function."""
    axis = 1 if z.ndim == 3 and z.shape[1] == CLASSES else -1
    entries = -z.log_softmax(axis).gather(axis, y.clamp(min=0).unsqueeze(axis)).squeeze(axis)
    kept = entries * (y >= 0)
    return kept.sum() if reduction == "sum" else kept.sum() / (y >= 0).sum()


def squares(z: Tensor, y: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Distances from one-hot targets."""
    axis = 1 if z.ndim == 3 and z.shape[1] == CLASSES else -1
    target = F.one_hot(y.clamp(min=0), CLASSES).to(z).movedim(-1, axis)
    return F.mse_loss(z, target, reduction=reduction)


def binary(z: Tensor, y: Tensor, mask: Tensor, reduction: str) -> Tensor:
    """Every class on its own."""
    axis = 1 if z.ndim == 3 and z.shape[1] == CLASSES else -1
    target = F.one_hot(y.clamp(min=0), CLASSES).to(z).movedim(-1, axis)
    return F.binary_cross_entropy_with_logits(z, target, reduction=reduction)


LOSSES: tuple[Callable[..., Tensor], ...] = (cross_entropy, by_hand, squares, binary)


def generated(seed: int, samples: int) -> Problem:
    """The problem of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    # Three steps would be as many as classes, so that a step could be taken for a class.
    steps = draw.choice([2, 4, 5])
    model = settled(Generated(draw, steps))
    loss, reduction = draw.choice(LOSSES), draw.choice(["mean", "sum"])
    lengths = torch.randint(1, steps + 1, (samples,))
    mask = torch.arange(steps) < lengths[:, None]
    per_step = model.read in ("steps", "turned")
    labels = torch.randint(0, CLASSES, (samples, steps) if per_step else (samples,))
    if per_step:
        labels = labels.masked_fill(~mask, -100)
    batch: Batch = {
        "tokens": torch.randint(0, VOCABULARY, (samples, steps)),
        "x": torch.randn(samples, steps, 2).double(),
        "mask": mask,
        "order": torch.rand(samples, steps).argsort(1),
        "labels": labels,
    }

    def total(network: nn.Module, given: dict[str, Any]) -> Tensor:
        return loss(network(given), given["labels"], given["mask"], reduction)

    return Problem(
        model, batch, samples, total, counts=[(labels >= 0).reshape(samples, -1).sum(1).tolist()]
    )


def network(seed: int) -> Network:
    """A row of the zoo."""
    draw = random.Random(seed + 10**6)
    return Network(
        f"seed {seed}",
        "generated",
        partial(generated, seed),
        samples=(draw.choice([1, 2, 3, 4, 5]),),
    )


def parts(seed: int) -> str:
    """What the network of a seed is made of, in words."""
    model: Any = generated(seed, 2).model
    names = [
        type(block).__name__ + (f" {block.how}" if hasattr(block, "how") else "")
        for block in model.blocks
    ]
    return ", ".join(["tokens" if model.tokens else "numbers", *names, f"read: {model.read}"])

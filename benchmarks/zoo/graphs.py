"""Graph layers in plain torch, on batches of graphs of different sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.network import Batch, Network, Problem, randn, settled

FEATURES, WIDTH, CLASSES = 4, 6, 3
RAGGED, EQUAL = (3, 5, 4, 2, 6), (4, 4, 4, 4, 4)  # nodes of the first graphs


def graphs(sizes: tuple[int, ...], only: int | None = None) -> Batch:
    """A batch of rings with a chord, all of them or one: features of the nodes, edges, and the graph of every node."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    features = randn(sum(sizes), FEATURES)
    chosen = range(len(sizes)) if only is None else [only]
    nodes, edges, owner = [], [], []
    for place, graph in enumerate(chosen):
        size, offset = sizes[graph], sum(map(len, nodes))
        ring = torch.arange(size)
        pairs = torch.cat(
            [torch.stack([ring, (ring + 1) % size]), torch.tensor([[0], [size // 2]])], 1
        )
        edges.append(torch.cat([pairs, pairs.flip(0)], 1) + offset)
        nodes.append(features[starts[graph] : starts[graph] + size])
        owner.append(torch.full((size,), place))
    y = torch.tensor([graph % CLASSES for graph in chosen])
    return {"x": torch.cat(nodes), "edges": torch.cat(edges, 1), "owner": torch.cat(owner), "y": y}


def collect(messages: Tensor, target: Tensor, count: int) -> Tensor:
    """Sum of the messages to every node."""
    return messages.new_zeros(count, *messages.shape[1:]).index_add(0, target, messages)


class GCN(nn.Module):
    """Neighbours and the node itself, weighted by degrees; self-loops are appended behind all edges."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(inp, out, bias=False), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        loops = torch.arange(len(x)).expand(2, -1)
        source, target = torch.cat([edges, loops], 1)
        degree = collect(x.new_ones(len(target)), target, len(x)).rsqrt()
        weight = (degree[source] * degree[target])[:, None]
        return collect(self.linear(x)[source] * weight, target, len(x)) + self.bias


class GAT(nn.Module):
    """Attention over the neighbours, by scatter_reduce and index_add."""

    def __init__(self, inp: int, out: int, heads: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(inp, out, bias=False)
        self.source, self.target = (
            nn.Parameter(torch.randn(1, heads, out // heads)) for _ in range(2)
        )
        self.heads = heads

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        z = self.linear(x).unflatten(-1, (self.heads, -1))
        scores = F.leaky_relu(
            ((z * self.source).sum(-1))[source] + ((z * self.target).sum(-1))[target], 0.2
        )
        index = target[:, None].expand_as(scores)
        top = scores.new_zeros(len(x), self.heads).scatter_reduce(
            0, index, scores.detach(), "amax", include_self=False
        )
        weight = (scores - top[target]).exp()
        weight = weight / collect(weight, target, len(x))[target]
        return collect(z[source] * weight[..., None], target, len(x)).flatten(1)


class GIN(nn.Module):
    """A perceptron of the node times (1 + ε) and its neighbours' sum."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.net, self.eps = (
            nn.Sequential(nn.Linear(inp, out), nn.ReLU(), nn.Linear(out, out)),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.net((1 + self.eps) * x + collect(x[edges[0]], edges[1], len(x)))


class SAGE(nn.Module):
    """The node and the mean of its neighbours, by scatter_add."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(inp, out), nn.Linear(inp, out, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        index = target[:, None].expand(-1, x.shape[1])
        total = torch.zeros_like(x).scatter_add(0, index, x[source])
        count = collect(x.new_ones(len(target), 1), target, len(x))
        return self.own(x) + self.others(total / count)


class MPNN(nn.Module):
    """Messages from both ends of an edge, and a recurrent cell for the nodes."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * inp, out), nn.GRUCell(out, out)
        self.start = nn.Linear(inp, out)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = self.message(torch.cat([x[source], x[target]], 1)).tanh()
        return self.update(collect(messages, target, len(x)), self.start(x))


class Graph(nn.Module):
    """Two layers, the sum or mean over the nodes of every graph, and its class."""

    def __init__(self, layer: Callable[[int, int], nn.Module], mean: bool, norm: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            layer(FEATURES, WIDTH),
            layer(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )
        self.norm, self.mean = nn.LayerNorm(WIDTH) if norm else nn.Identity(), mean

    def forward(self, x: Tensor, edges: Tensor, owner: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x, edges)).tanh(), edges).tanh()
        count = int(owner[-1]) + 1
        pooled = collect(x, owner, count)
        return self.head(pooled / owner.bincount()[:, None] if self.mean else pooled)


def of_graphs(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the graphs."""
    return F.cross_entropy(model(batch["x"], batch["edges"], batch["owner"]), batch["y"])


def problem(
    layer: type[nn.Module], sizes: tuple[int, ...], mean: bool, norm: bool, samples: int
) -> Problem:
    """Graphs to classify."""
    torch.manual_seed(0)
    chosen = sizes[:samples]
    return Problem(
        settled(Graph(layer, mean, norm)),
        graphs(chosen),
        samples,
        of_graphs,
        lambda _, n: graphs(chosen, n),
    )


LAYERS = {"gcn": GCN, "gat": GAT, "gin": GIN, "sage": SAGE, "mpnn": MPNN}
NETWORKS = [
    *(Network(name, "graphs", partial(problem, layer, RAGGED, True, False), samples=(3, 1, 5)) for name,
       layer in LAYERS.items()),
    *(Network(f"{name}-equal", "graphs", partial(problem, layer, EQUAL, True, False), samples=(3, 4)) for name,
       layer in LAYERS.items()),
    *(Network(f"{name}-sum-norm", "graphs", partial(problem, layer, RAGGED, False, True)) for name,
       layer in LAYERS.items()),
]  # fmt: skip

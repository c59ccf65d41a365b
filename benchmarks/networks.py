"""The networks of the benchmarks, each with its mini-batch; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from workloads import Characters

Activation = Callable[[], nn.Module]
VOCABULARY, POSITIONS = 96, 64


class FirstOutput(nn.Module):
    """The first of several outputs: an LSTM's sequence without its last state."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


class ClassesSecond(nn.Module):
    """``[N, T, C]`` to ``[N, C, T]``, as cross-entropy wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def logistic(_: Activation) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp(act: Activation = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), act(), nn.Linear(512, 256), act(), nn.Linear(256, 10)
    )


def cnn_2c2d(act: Activation = nn.ReLU) -> nn.Sequential:
    """DeepOBS' network for MNIST: two convolutions, two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 1024), act(), nn.Linear(1024, 10)),
    )


def cnn_3c3d(act: Activation = nn.ReLU) -> nn.Sequential:
    """DeepOBS' network for CIFAR-10: three convolutions, three linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), act(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(64, 96, 3), act(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(96, 128, 3, padding=1), act(), nn.MaxPool2d(3, 2, 1)),
        *(
            nn.Flatten(),
            nn.Linear(1152, 512),
            act(),
            nn.Linear(512, 256),
            act(),
            nn.Linear(256, 10),
        ),
    )


def all_cnn_c(act: Activation = nn.ReLU) -> nn.Sequential:
    """Springenberg et al., *Striving for simplicity*, 2015, for 100 classes: nine convolutions, no dropout."""
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 3, padding=1), act(), nn.Conv2d(96, 96, 3, padding=1), act()),
        *(
            nn.Conv2d(96, 96, 3, padding=1, stride=2),
            act(),
            nn.Conv2d(96, 192, 3, padding=1),
            act(),
        ),
        *(
            nn.Conv2d(192, 192, 3, padding=1),
            act(),
            nn.Conv2d(192, 192, 3, padding=1, stride=2),
            act(),
        ),
        *(
            nn.Conv2d(192, 192, 3),
            act(),
            nn.Conv2d(192, 192, 1),
            act(),
            nn.Conv2d(192, 100, 1),
            act(),
        ),
        *(nn.AvgPool2d(6), nn.Flatten()),
    )


def transformer(_: Activation) -> nn.Module:
    """Decoder-only: pre-norm blocks with GELU, learned positions."""
    net = Characters(VOCABULARY, width=128, layers=4, context=POSITIONS)
    net.head.append(ClassesSecond())
    return net


def lstm(_: Activation) -> nn.Sequential:
    embedding, layer = nn.Embedding(VOCABULARY, 128), nn.LSTM(128, 128, batch_first=True)
    return nn.Sequential(
        embedding, layer, FirstOutput(), nn.Linear(128, VOCABULARY), ClassesSecond()
    )


def images(classes: int, *shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda samples: (torch.randn(samples, *shape), torch.randint(classes, (samples,)))


def tokens(samples: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(VOCABULARY, (samples, POSITIONS + 1))
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


@dataclass(frozen=True)
class Network:
    """A network and its data.

    Attributes:
        title: for tables.
        build: makes it with an activation function, where it has a choice.
        data: makes inputs and targets of this many samples.
        samples: N.
        rectified: whether it is piecewise linear with ReLU.
    """

    title: str
    build: Callable[[Activation], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    samples: int
    rectified: bool = False


NETWORKS = {
    "logistic": Network("logistic regression 784-10", logistic, images(10, 1, 28, 28), 512),
    "mlp": Network("MLP 784-512-256-10", mlp, images(10, 1, 28, 28), 256, rectified=True),
    "2c2d": Network("2C2D", cnn_2c2d, images(10, 1, 28, 28), 128, rectified=True),
    "3c3d": Network("3C3D", cnn_3c3d, images(10, 3, 32, 32), 64, rectified=True),
    "allcnnc": Network(
        "All-CNN-C, 100 classes", all_cnn_c, images(100, 3, 32, 32), 16, rectified=True
    ),
    "transformer": Network("transformer, 4 layers, d = 128, T = 64", transformer, tokens, 32),
    "lstm": Network("LSTM 128, T = 64", lstm, tokens, 32),
}

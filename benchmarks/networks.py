"""The networks of the benchmarks, each with its mini-batch; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

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


def logistic(_: Activation, inputs: int = 784, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))


def mlp(act: Activation = nn.ReLU, hidden: tuple[int, ...] = (512, 256)) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((784, *hidden)):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 10))


def cnn_2c2d(act: Activation = nn.ReLU, width: int = 32) -> nn.Sequential:
    """DeepOBS' network for MNIST: two convolutions, two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 5, padding=2), act(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(98 * width, 32 * width), act(), nn.Linear(32 * width, 10)),
    )


def cnn_3c3d(act: Activation = nn.ReLU, width: int = 64) -> nn.Sequential:
    """DeepOBS' network for CIFAR-10: three convolutions, three linear layers."""
    middle, last = 3 * width // 2, 2 * width
    return nn.Sequential(
        *(nn.Conv2d(3, width, 5), act(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(width, middle, 3), act(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(middle, last, 3, padding=1), act(), nn.MaxPool2d(3, 2, 1)),
        *(
            nn.Flatten(),
            nn.Linear(9 * last, 8 * width),
            act(),
            nn.Linear(8 * width, 4 * width),
            act(),
            nn.Linear(4 * width, 10),
        ),
    )


def all_cnn_c(act: Activation = nn.ReLU, width: int = 96) -> nn.Sequential:
    """Springenberg et al., *Striving for simplicity*, 2015, for 100 classes: nine convolutions, no dropout."""
    double = 2 * width
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), act(), nn.Conv2d(width, width, 3, padding=1), act()),
        *(
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            act(),
            nn.Conv2d(width, double, 3, padding=1),
            act(),
        ),
        *(
            nn.Conv2d(double, double, 3, padding=1),
            act(),
            nn.Conv2d(double, double, 3, padding=1, stride=2),
            act(),
        ),
        *(
            nn.Conv2d(double, double, 3),
            act(),
            nn.Conv2d(double, double, 1),
            act(),
            nn.Conv2d(double, 100, 1),
            act(),
        ),
        *(nn.AvgPool2d(6), nn.Flatten()),
    )


def transformer(_: Activation, width: int = 128, layers: int = 4) -> nn.Module:
    """Decoder-only: pre-norm blocks with GELU, learned positions."""
    net = Characters(VOCABULARY, width=width, layers=layers, context=POSITIONS)
    net.head.append(ClassesSecond())
    return net


def lstm(_: Activation, width: int = 128) -> nn.Sequential:
    embedding, layer = nn.Embedding(VOCABULARY, width), nn.LSTM(width, width, batch_first=True)
    return nn.Sequential(
        embedding, layer, FirstOutput(), nn.Linear(width, VOCABULARY), ClassesSecond()
    )


def token_mlp(act: Activation, width: int = 32) -> nn.Sequential:
    """Two linear layers on every position of a sequence."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width),
        nn.Linear(width, width),
        act(),
        nn.Linear(width, VOCABULARY),
        ClassesSecond(),
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


def _mlp(*hidden: int) -> Network:
    """784 inputs, hidden layers of these widths; sigmoids where the network's own Hessian counts."""
    title = "MLP " + "-".join(map(str, (784, *hidden, 10)))
    build = partial(mlp, hidden=hidden)
    return Network(title, build, images(10, 1, 28, 28), 96, rectified=True)


# The same networks in other sizes, small ones too: nothing was tuned for them.
OTHER_SIZES = {
    "logistic-64": Network(
        "logistic regression 64-10", partial(logistic, inputs=64), images(10, 1, 8, 8), 64
    ),
    "logistic-3072": Network(
        "logistic regression 3072-100",
        partial(logistic, inputs=3072, classes=100),
        images(100, 3, 32, 32),
        128,
    ),
    "mlp-32": _mlp(32),
    "mlp-64": _mlp(64),
    "mlp-128": _mlp(128),
    "mlp-256": _mlp(256),
    "mlp-64-32": _mlp(64, 32),
    "mlp-128-128": _mlp(128, 128),
    "mlp-1024-512": _mlp(1024, 512),
    "2c2d-8": Network("2C2D, width 8", partial(cnn_2c2d, width=8), images(10, 1, 28, 28), 64, True),
    "2c2d-16": Network(
        "2C2D, width 16", partial(cnn_2c2d, width=16), images(10, 1, 28, 28), 64, True
    ),
    "3c3d-8": Network("3C3D, width 8", partial(cnn_3c3d, width=8), images(10, 3, 32, 32), 32, True),
    "3c3d-32": Network(
        "3C3D, width 32", partial(cnn_3c3d, width=32), images(10, 3, 32, 32), 32, True
    ),
    "allcnnc-16": Network(
        "All-CNN-C, width 16", partial(all_cnn_c, width=16), images(100, 3, 32, 32), 16, True
    ),
    "allcnnc-48": Network(
        "All-CNN-C, width 48", partial(all_cnn_c, width=48), images(100, 3, 32, 32), 16, True
    ),
    "tokens-32": Network("token model, d = 32, T = 64", token_mlp, tokens, 16),
    "transformer-32": Network(
        "transformer, 2 layers, d = 32, T = 64",
        partial(transformer, width=32, layers=2),
        tokens,
        16,
    ),
    "transformer-64": Network(
        "transformer, 2 layers, d = 64, T = 64",
        partial(transformer, width=64, layers=2),
        tokens,
        32,
    ),
    "lstm-32": Network("LSTM 32, T = 64", partial(lstm, width=32), tokens, 16),
    "lstm-64": Network("LSTM 64, T = 64", partial(lstm, width=64), tokens, 32),
}
ALL_SIZES = {**NETWORKS, **OTHER_SIZES}

"""Small versions of families of convolutional networks, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES = 8, 3
Norm = Callable[[int], nn.Module]
group_norm: Norm = partial(nn.GroupNorm, 2)


class Residual(nn.Module):
    """x + s f(x), with a scale per channel of the last axis where one is wanted."""

    def __init__(self, *inner: nn.Module, scaled: int = 0) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.scale = nn.Parameter(torch.ones(scaled)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return x + (y if self.scale is None else self.scale * y)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Parallel(nn.Module):
    """Several branches, joined by a function."""

    def __init__(self, join: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))


def concatenated(*tensors: Tensor) -> Tensor:
    """Along the channels."""
    return torch.cat(tensors, 1)


def conv(
    inp: int,
    out: int,
    size: int = 3,
    norm: Norm = group_norm,
    act: nn.Module | None = None,
    **how: int,
) -> nn.Module:
    """Convolution, norm and activation."""
    convolution = nn.Conv2d(inp, out, size, padding=size // 2, bias=False, **how)
    return nn.Sequential(convolution, norm(out), act or nn.ReLU(inplace=True))


def head(width: int = WIDTH) -> nn.Module:
    """Classes from the mean over the pixels."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def convolutional(*layers: nn.Module) -> nn.Module:
    """A stem, layers and a head."""
    return nn.Sequential(conv(3, WIDTH), *layers, head())


def squeeze_excite(act: nn.Module, gate: nn.Module) -> nn.Module:
    """Channels weighted by their means."""
    weights = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 4, 1), act, nn.Conv2d(4, WIDTH, 1), gate
    )
    return Parallel(torch.mul, nn.Identity(), weights)


def resnet(norm: Norm) -> nn.Module:
    """Two residual blocks, one with a projection."""
    block = nn.Sequential(
        conv(WIDTH, WIDTH, norm=norm), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), norm(WIDTH)
    )
    wide = nn.Sequential(
        conv(WIDTH, 16, norm=norm, stride=2), nn.Conv2d(16, 16, 3, padding=1), norm(16)
    )
    down = nn.Sequential(nn.Conv2d(WIDTH, 16, 1, stride=2), norm(16))
    return nn.Sequential(
        conv(3, WIDTH, norm=norm),
        Residual(block),
        nn.ReLU(),
        Parallel(torch.add, wide, down),
        nn.ReLU(inplace=True),
        head(16),
    )


def densenet() -> nn.Module:
    """Every layer sees those before it."""
    grow = [
        Parallel(concatenated, nn.Identity(), conv(WIDTH + 4 * i, 4, norm=nn.BatchNorm2d))
        for i in range(2)
    ]
    return nn.Sequential(conv(3, WIDTH, norm=nn.BatchNorm2d), *grow, nn.AvgPool2d(2), head(16))


def squeezenet() -> nn.Module:
    """Fire modules; classes by a convolution."""
    wide = [
        nn.Sequential(nn.Conv2d(4, WIDTH, k, padding=k // 2), nn.ReLU(inplace=True)) for k in (1, 3)
    ]
    fire = nn.Sequential(
        nn.Conv2d(WIDTH, 4, 1), nn.ReLU(inplace=True), Parallel(concatenated, *wide)
    )
    end = nn.Sequential(
        nn.Conv2d(16, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2, ceil_mode=True),
        fire,
        end,
    )


def inverted(act: nn.Module, gate: nn.Module, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """MobileNet's and EfficientNet's block: wide, depthwise, squeeze and excite, narrow."""
    block = [
        conv(4, WIDTH, 1, norm, act), conv(WIDTH, WIDTH, 3, norm, act, groups=WIDTH),
        squeeze_excite(nn.ReLU(), gate), nn.Conv2d(WIDTH, 4, 1), norm(4),
    ]  # fmt: skip
    return nn.Sequential(conv(3, 4, 3, norm, act), Residual(*block), head(4))


def shufflenet() -> nn.Module:
    """Grouped convolutions with channels shuffled in between."""
    shuffle = Lambda(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))
    return convolutional(conv(WIDTH, WIDTH, 1, groups=2), shuffle, conv(WIDTH, WIDTH, groups=2))


def convnext(width: int = WIDTH) -> nn.Module:
    """Depthwise convolution, then a perceptron on the channels, which come last; a scale per channel."""
    block = Residual(
        Lambda(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(width, width, 3, padding=1, groups=width),
        Lambda(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(),
           nn.Linear(16, width),
        scaled=width,
    )  # fmt: skip
    pool = Lambda(lambda x: x.mean((1, 2)))
    stem = nn.Sequential(
        nn.Conv2d(3, width, 2, stride=2),
        Lambda(lambda x: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(width),
    )
    return nn.Sequential(stem, block, pool, nn.LayerNorm(width), nn.Linear(width, CLASSES))


def poolformer() -> nn.Module:
    """Pooling for attention."""
    mix = Parallel(torch.sub, nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Identity())
    mlp = [nn.Conv2d(WIDTH, 16, 1), nn.GELU(), nn.Conv2d(16, WIDTH, 1)]
    return convolutional(Residual(group_norm(WIDTH), mix), Residual(group_norm(WIDTH), *mlp))


def convmixer() -> nn.Module:
    """Depthwise and pointwise convolutions with BatchNorm after the activation."""
    depth = Residual(
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.GELU(), nn.BatchNorm2d(WIDTH)
    )
    return convolutional(depth, nn.Conv2d(WIDTH, WIDTH, 1), nn.GELU(), nn.BatchNorm2d(WIDTH))


class StandardizedConv(nn.Conv2d):
    """Convolution whose weights have mean zero and variance one in every output channel."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), unbiased=False, keepdim=True)
        return F.conv2d(
            x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias, padding=self.padding
        )


class UNet(nn.Module):
    """Down, up and a shortcut; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv(3, WIDTH), nn.Sequential(nn.MaxPool2d(2), conv(WIDTH, 16))
        self.up, self.last = (
            nn.ConvTranspose2d(16, WIDTH, 2, stride=2),
            nn.Conv2d(2 * WIDTH, CLASSES, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.down(x))], 1))


class Pyramid(nn.Module):
    """Features of two sizes, the smaller one interpolated; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv(3, WIDTH), conv(WIDTH, 16, stride=2)
        self.sides, self.last = (
            nn.ModuleList([nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(16, 4, 1)]),
            nn.Conv2d(4, CLASSES, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        large = self.first(x)
        small = self.sides[1](self.down(large))
        return self.last(
            self.sides[0](large) + F.interpolate(small, scale_factor=2, mode="bilinear")
        )


def autoencoder() -> nn.Module:
    """Pictures from pictures."""
    return nn.Sequential(
        conv(3, WIDTH, stride=2), nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1), nn.Sigmoid()
    )

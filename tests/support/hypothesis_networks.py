"""Strategies for small random networks: images or sequences, a stack of layers, a head, a loss."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from losses_table import LOSS
from torch import nn
from torch.nn import functional as F
from zoo import Problem

ACTIVATIONS = [nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus]


class Residual(nn.Module):
    """x + f(x); with `twice` the same layers are applied to their own output."""

    def __init__(self, inner, twice):
        super().__init__()
        self.inner, self.twice = inner, twice

    def forward(self, x):
        out = x + self.inner(x)
        return out + self.inner(out) if self.twice else out


class Attention(nn.Module):
    """One head, written with functional calls and raw parameters."""

    def __init__(self, d):
        super().__init__()
        self.qkv, self.out = nn.Parameter(0.5 * torch.randn(3 * d, d)), nn.Linear(d, d)
        self.scale = nn.Parameter(torch.rand(d) + 0.5)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv).chunk(3, dim=-1)
        return x + self.scale * self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


@st.composite
def image_layers(draw):
    channels, size = draw(st.sampled_from([2, 4])), draw(st.integers(5, 6))
    layers, shape = [], (channels, size, size)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(
            st.sampled_from(["conv", "transposed", "group", "instance", "pool", "residual"])
        )
        if kind == "conv":
            groups, stride = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 1, 2]))
            mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))
            dilation = draw(st.sampled_from([1, 1, 2])) if size >= 5 else 1
            layers.append(
                nn.Conv2d(
                    channels,
                    4,
                    2,
                    stride,
                    1,
                    dilation,
                    groups,
                    draw(st.booleans()),
                    padding_mode=mode,
                )
            )
            layers += [nn.ReLU(inplace=True)] if draw(st.booleans()) else []
            channels = 4
        elif kind == "transposed" and size <= 4:
            layers.append(
                nn.ConvTranspose2d(channels, 2, 2, stride=draw(st.sampled_from([1, 2])), padding=1)
            )
            channels = 2
        elif kind == "group":
            layers.append(nn.GroupNorm(draw(st.sampled_from([1, 2])), channels))
        elif kind == "instance":
            layers.append(nn.InstanceNorm2d(channels, affine=True))
        elif kind == "pool" and size >= 4:
            layers.append(draw(st.sampled_from([nn.AvgPool2d, nn.MaxPool2d]))(2))
        elif kind == "residual":
            inner = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), draw(st.sampled_from(ACTIVATIONS))()
            )
            layers.append(Residual(inner, draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        size = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[-1]
        if size < 2:
            break
    return [*layers, nn.Flatten()], torch.randn, shape


@st.composite
def sequence_layers(draw):
    length, d = (
        draw(st.integers(2, 4)),
        draw(st.integers(3, 5)),
    )  # a norm over two entries has no gradient
    tokens = draw(st.booleans())
    layers = [nn.Embedding(5, d, padding_idx=draw(st.sampled_from([None, 0])))] if tokens else []
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["linear", "norm", "residual", "attention"]))
        if kind == "linear":
            out = draw(st.integers(3, 5))
            layers += [
                nn.Linear(d, out, bias=draw(st.booleans())),
                draw(st.sampled_from(ACTIVATIONS))(),
            ]
            d = out
        elif kind == "norm":
            layers.append(nn.LayerNorm(d))
        elif kind == "residual":
            inner = nn.Sequential(nn.Linear(d, d), draw(st.sampled_from(ACTIVATIONS))())
            layers.append(Residual(inner, draw(st.booleans())))
        else:
            layers.append(Attention(d))
    make = (lambda *shape: torch.randint(5, shape)) if tokens else torch.randn
    shape = (length,) if tokens else (length, d if not layers else next(first_width(layers)))
    return [*layers, Pool()], make, shape


def first_width(layers):
    """Input features of the first layer that has any."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                yield module.in_features
            elif isinstance(module, nn.LayerNorm):
                yield module.normalized_shape[0]
            elif isinstance(module, Attention):
                yield module.out.in_features


@st.composite
def problems(draw, dtypes=(torch.float64, torch.float64, torch.float32)):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    samples, dtype = draw(st.integers(1, 5)), draw(st.sampled_from(dtypes))
    layers, make, shape = draw(st.one_of(image_layers(), sequence_layers()))
    body = nn.Sequential(*layers)
    X = make(samples, *shape)
    width = body(X).shape[1]
    model = nn.Sequential(body, nn.Linear(width, 3)).to(dtype)
    loss = draw(st.sampled_from(["ce", "ce_smoothing", "ce_sum", "mse", "bce"]))
    row = LOSS[loss]
    X = X.to(dtype) if X.is_floating_point() else X
    y = row.target((samples, 3))
    return Problem(model, X, y.to(dtype) if y.is_floating_point() else y, row)

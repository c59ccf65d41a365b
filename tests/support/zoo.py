"""The architecture zoo: one row per model; a new row is tested by every quantity.

Sizes differ on purpose (a mixed-up axis must not fit), except in the row where all of them are
equal on purpose.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import oracle
import torch
import torch.nn.functional as F
from losses_table import LOSS, Loss
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lightning_curv.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SumGradSquared,
    Variance,
)

QUANTITIES = [
    (BatchGrad, "grad_batch", oracle.grad_batch),
    (BatchL2Grad, "batch_l2", oracle.batch_l2),
    (SumGradSquared, "sum_grad_squared", oracle.sum_grad_squared),
    (Variance, "variance", oracle.variance),
    (DiagGGNExact, "diag_ggn_exact", oracle.diag_ggn),
    (BatchDiagGGNExact, "diag_ggn_exact_batch", oracle.diag_ggn_batch),
]


@dataclass
class Problem:
    """One model with one batch."""

    model: nn.Module
    X: Tensor
    y: Tensor
    loss: Loss

    def compute_loss(self) -> Tensor:
        return self.loss.function(self.model(self.X), self.y)

    def parameters(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Row:
    """How to make a problem; the same every time it is made."""

    name: str
    model: Callable[[], nn.Module]
    X: Callable[[], Tensor]
    loss: str = "ce"
    rtol: float = 1e-6

    def make(self) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name))
            model, X = self.model().double(), self.X()
            with torch.no_grad():
                shape = model(X).shape
            return Problem(model, X, LOSS[self.loss].target(shape), LOSS[self.loss])


def randn(*shape):
    return partial(torch.randn, *shape, dtype=torch.float64)


def ints(high, *shape):
    return partial(torch.randint, high, shape)


def raw(*shape):
    return Parameter(torch.randn(shape, dtype=torch.float64) / 2)


class Mean(nn.Module):
    """Averages some axes away."""

    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)


# --- module networks -------------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(
        nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False), nn.Tanh(), nn.Linear(2, 3)
    )


def image_net(*layers, head):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(head, 3))


def cnn_inplace_groups():
    return image_net(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 2, groups=2, stride=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((2, 1)),
        head=12,
    )


def conv2d_paddings():
    return image_net(
        nn.Conv2d(2, 3, 3, padding="same", bias=False),
        nn.Tanh(),
        nn.Conv2d(3, 2, (3, 2), padding=(2, 1), padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, padding=1, padding_mode="replicate", groups=4),
        nn.AvgPool2d(2),
        head=4,
    )


def conv2d_stride_dilation():
    return image_net(
        nn.Conv2d(2, 3, (2, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 0)),
        nn.ELU(),
        nn.Conv2d(3, 2, 3, stride=2, padding=1),
        head=4,
    )


def conv2d_same_dilated():
    return image_net(
        nn.Conv2d(2, 4, (2, 3), padding="same", dilation=2, groups=2), nn.Tanh(), head=80
    )


def conv1d():
    return image_net(
        nn.Conv1d(2, 4, 3, dilation=2),
        nn.Softplus(),
        nn.Conv1d(4, 2, 2, stride=2, groups=2, padding=1),
        head=6,
    )


def conv3d():
    return image_net(
        nn.Conv3d(2, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0), groups=2), nn.Tanh(), head=32
    )


def groupnorm_cnn():
    return image_net(
        nn.Conv2d(1, 4, 2),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 2, 2),
        nn.GroupNorm(1, 2),
        head=18,
    )


def batchnorm_eval_cnn():
    model = image_net(
        nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2), head=18
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    nn.init.normal_(model[1].weight)
    return model.eval()


def deconvolution():
    return image_net(
        nn.Conv2d(1, 3, 2),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
        head=72,
    )


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def segmentation():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 1))


def parametrized():
    return nn.Sequential(
        weight_norm(nn.Linear(5, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 3), dim=None)
    )


def mlp_head():
    return nn.Sequential(nn.Tanh(), nn.Linear(4, 3))


def transformer_encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), Mean(1), nn.Linear(4, 3)
    )


def token_norm():
    """LayerNorm over two axes, one without bias."""
    return nn.Sequential(
        nn.Linear(5, 4),
        nn.LayerNorm((2, 4)),
        nn.GELU(),
        nn.LayerNorm(4, bias=False),
        Mean(1),
        nn.Linear(4, 3),
    )


class ScaledLinear(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


# --- functional and irregular networks -------------------------------------------------------------------------------


class ResidualFunctional(nn.Module):
    """A residual network without a single parametrised module."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bias = raw(4, 2, 3, 3), raw(4, 2, 3, 3), raw(4)
        self.head = raw(3, 4)

    def forward(self, x):
        x = F.conv2d(x, self.stem, padding=1)
        h = F.conv2d(F.relu(x, inplace=True), self.conv, self.bias, padding=1, groups=2)
        x = x + F.silu(h)
        return F.linear(x.mean((2, 3)), self.head)


class ViT(nn.Module):
    """Class token, position parameter, one attention block with layer scale; SDPA or an explicit softmax."""

    def __init__(self, explicit=False):
        super().__init__()
        d = 4
        self.explicit = explicit
        self.patch = nn.Conv2d(1, d, 2, stride=2)
        self.token, self.position = raw(1, 1, d), raw(1, 5, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.qkv_bias, self.out = raw(3 * d, d), raw(3 * d), raw(d, d)
        self.scale1, self.scale2 = raw(d), raw(d)
        self.mlp = nn.Sequential(nn.Linear(d, 6), nn.GELU(), nn.Linear(6, d))
        self.head = nn.Linear(d, 3)

    def attention(self, x):
        N, T, d = x.shape
        heads = F.linear(x, self.qkv, self.qkv_bias).reshape(N, T, 3, 2, d // 2)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.explicit:
            mixed = torch.softmax(q @ k.mT / (d // 2) ** 0.5, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return F.linear(mixed.transpose(1, 2).reshape(N, T, d), self.out)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.scale1 * self.attention(self.norm1(x))
        x = x + self.scale2 * self.mlp(self.norm2(x))
        return self.head(self.norm3(x[:, 0]))


class TiedEmbedding(nn.Module):
    """A language model whose embedding is its output projection."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)

    def forward(self, tokens):
        h = torch.tanh(self.mix(self.embedding(tokens)))
        return F.linear(h, self.embedding.weight).transpose(1, 2)


class Reused(nn.Module):
    """One layer applied three times, one convolution twice."""

    def __init__(self):
        super().__init__()
        self.inp, self.layer, self.out = nn.Linear(4, 6), nn.Linear(6, 6), raw(3, 6)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.inp(x)
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        x = x.unsqueeze(1)
        x = self.conv(torch.tanh(self.conv(x)))
        return F.linear(x.squeeze(1), self.out)


class RMSMatmul(nn.Module):
    """RMSNorm, then products with raw matrices: `x @ W` and `torch.matmul`."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(5)
        self.W, self.U, self.b = raw(5, 4), raw(4, 3), raw(3)

    def forward(self, x):
        return torch.matmul(torch.tanh(self.norm(x) @ self.W), self.U).mean(1) + self.b


class Products(nn.Module):
    """Other spellings of a product with a parameter."""

    def __init__(self):
        super().__init__()
        self.left, self.heads, self.W, self.b = raw(2, 3), raw(2, 5, 4), raw(4, 3), raw(3)

    def forward(self, x):  # [N, 3, 5]
        x = torch.tanh(self.left @ x)  # [N, 2, 5]
        x = torch.tanh(torch.einsum("nhi,hio->no", x, self.heads))
        return torch.addmm(self.b, x, self.W)


class Broadcast(nn.Module):
    """Arithmetic with parameters that broadcast: [d], [1, T, d], [C, 1, 1], scalars."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 4)
        self.shift, self.scale, self.position = raw(4), raw(4), raw(1, 2, 4)
        self.temperature, self.divisor = (
            Parameter(torch.tensor(0.7)),
            Parameter(torch.rand(2, 1) + 0.5),
        )
        self.channel, self.offset = raw(2, 1, 1), raw(1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):  # [N, 2, 5]
        x = self.inp(x) - self.shift
        x = torch.tanh(self.scale * x) + self.position
        x = torch.tanh(self.shift - x / self.divisor).mul(self.temperature)
        x = x.view(-1, 2, 2, 2) * self.channel
        x = x.add(self.offset, alpha=3)
        x = torch.sub(x, self.offset, alpha=0.5)
        return self.head(x.flatten(1)) / self.temperature


class InPlaceArithmetic(nn.Module):
    """`x += p`, `x *= p`, and a parameter as denominator and exponent."""

    def __init__(self):
        super().__init__()
        self.inp, self.shift, self.scale = nn.Linear(5, 3), raw(3), raw(3)

    def forward(self, x):
        x = self.inp(x)
        x += self.shift
        x = 2 * torch.sigmoid(x)
        x *= self.scale
        return x


class Unusual(nn.Module):
    """Parameters in prelu and bilinear, and in ops without a rule of their own: where, pow."""

    def __init__(self):
        super().__init__()
        self.inp, self.bilinear, self.prelu = nn.Linear(5, 4), nn.Bilinear(4, 5, 3), nn.PReLU(4)
        self.floor, self.exponent = raw(4), Parameter(torch.rand(3) + 1)

    def forward(self, x):
        h = self.prelu(self.inp(x))
        h = torch.where(x[:, :4] > 0, h, self.floor)
        return torch.pow(1 + self.bilinear(h, x) ** 2, self.exponent)


class Padding(nn.Module):
    """Embedding with repeated tokens and a padding index."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, padding_idx=1)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


def repeated_tokens():
    return torch.tensor([[0, 1, 0, 2, 0], [1, 1, 5, 5, 3], [2, 4, 4, 1, 4], [3, 0, 3, 3, 1]])


class Indexed(nn.Module):
    """A table looked up by indexing instead of F.embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.head = raw(6, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table[tokens]).mean(1))


class Views(nn.Module):
    """Parameters used through slices, reshapes, stacks and concatenations."""

    def __init__(self):
        super().__init__()
        self.position, self.gamma, self.beta = raw(1, 7, 4), raw(2), raw(2)
        self.W1, self.W2, self.packed = raw(2, 4), raw(1, 4), raw(3, 8)

    def forward(self, x):  # [N, 2, 4]
        x = torch.tanh(x + self.position[:, : x.shape[1]])
        x = x.view(-1, 2, 2, 2) * self.gamma.view(1, -1, 1, 1) + self.beta.reshape(2, 1, 1)
        x = x.flatten(1)
        x = torch.tanh(F.linear(x, self.packed[:, :8]))
        x = F.linear(F.pad(x, (0, 1)), torch.cat([self.W1, self.W2]))
        return x + torch.stack([self.gamma.sum(), self.beta[0], self.beta[1]])


class Transposed(nn.Module):
    """`F.linear(x, W.t())`, `x @ W.T`, a matrix-valued expression of two parameters (low-rank update)."""

    def __init__(self):
        super().__init__()
        self.W, self.V, self.down, self.up = raw(5, 4), raw(3, 4), raw(2, 4), raw(3, 2)

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.W.t()))
        return x @ self.V.T + F.linear(x, self.up @ self.down)


class Cast(nn.Module):
    """Weights stored in float32 and used in float64."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 4)
        self.W, self.b = Parameter(torch.randn(3, 4)), Parameter(torch.randn(3))

    def double(self):
        self.inp.double()
        return self

    def forward(self, x):
        return F.linear(torch.tanh(self.inp(x)), self.W.double(), self.b.to(x.dtype))


class Unused(nn.Module):
    """A branch nobody calls and a branch whose result nobody uses."""

    def __init__(self):
        super().__init__()
        self.body, self.idle, self.side = mlp(), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        self.side(x)
        return self.body(x)


class SequenceFirst(nn.Module):
    """Works on [T, N, d] inside, and on flattened [N·T, d]."""

    def __init__(self):
        super().__init__()
        self.inp, self.mid, self.scale, self.out = (
            nn.Linear(5, 4),
            nn.Linear(4, 4),
            raw(4),
            nn.Linear(4, 3),
        )

    def forward(self, x):  # [N, T, d]
        N, T, _ = x.shape
        x = torch.tanh(self.inp(x.transpose(0, 1)))
        x = torch.tanh(self.mid(x.transpose(0, 1).reshape(N * T, 4)) * self.scale)
        return self.out(x.view(N, T, 4).mean(1))


class Frames(nn.Module):
    """A video: the convolution sees [N·T, C, H, W], a second pass over the first frame only [N, C, H, W]."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(8, 3)

    def forward(self, x):  # [N, T, C, H, W]
        frames = torch.tanh(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]).mean(1)
        return self.head((frames * torch.tanh(self.conv(x[:, 0]))).flatten(1))


class FeaturesFirst(nn.Module):
    """Columns are samples: W @ xᵀ + b[:, None]."""

    def __init__(self):
        super().__init__()
        self.W, self.b, self.U = raw(4, 5), raw(4), raw(3, 4)

    def forward(self, x):
        return (self.U @ torch.tanh(self.W @ x.T + self.b[:, None])).T


class ConstantBranch(nn.Module):
    """Position features from a network of constant coordinates, with and without a leading axis of one."""

    def __init__(self, leading):
        super().__init__()
        self.register_buffer("coordinates", torch.rand(*leading, 2, 3))
        self.features, self.inp, self.head = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):  # [N, 2, 5]
        x = torch.tanh(self.inp(x) + torch.tanh(self.features(self.coordinates)))
        return self.head(x.mean(1))


class Positions(nn.Module):
    """A learned table of positions, looked up with a range: [T, d] or [1, T, d] (GPT-2), and constant segments."""

    def __init__(self, leading=False):
        super().__init__()
        self.leading = leading
        self.tokens, self.positions, self.segments = (
            nn.Embedding(6, 4),
            nn.Embedding(7, 4),
            nn.Embedding(2, 4),
        )
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1])
        places = places[None] if self.leading else places
        h = self.tokens(tokens) + self.positions(places) + self.segments(torch.zeros_like(tokens))
        return self.head(torch.tanh(h).mean(1))


class Hypernetwork(nn.Module):
    """The weight of a layer is the output of another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("code", torch.rand(1, 2))
        self.generator, self.head = nn.Linear(2, 20), nn.Linear(4, 3)

    def forward(self, x):
        weight = torch.tanh(self.generator(self.code)).view(4, 5)
        return self.head(torch.tanh(F.linear(x, weight)))


class LanguageModel(nn.Module):
    """Scores of every next token, class axis second."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = (
            nn.Embedding(6, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3, bias=False),
        )

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens))).transpose(1, 2)


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, scores of every token from its states."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = (
            nn.Embedding(5, 2),
            nn.LSTM(2, 2, bidirectional=True, batch_first=True),
        )
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0]).transpose(1, 2)


class SequenceToOne(nn.Module):
    """A GRU of two layers on [T, N, d] with a learned initial state; outputs and final states are used."""

    def __init__(self):
        super().__init__()
        self.gru, self.initial, self.head = (
            nn.GRU(3, 2, num_layers=2),
            raw(2, 1, 2),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        states, final = self.gru(
            x.transpose(0, 1), self.initial.expand(-1, len(x), -1).contiguous()
        )
        return self.head(torch.cat([states.mean(0), *final], -1))


class EncoderDecoder(nn.Module):
    """The final states of an LSTM start a cell, which is then applied to its own output."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.start = (
            nn.LSTM(2, 3, batch_first=True),
            nn.LSTMCell(3, 3),
            raw(3),
        )

    def forward(self, x):
        _, (h, c) = self.encoder(x)
        h, c = self.decoder(self.start.expand(len(x), -1), (h[0], c[0]))
        return self.decoder(h, (h, c))[0]


class CrossAttention(nn.Module):
    """Sequence-first attention to shorter sequences of other widths, padded, with bias and zero keys."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            4, 2, kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):  # [N, 3, 4]
        query, keys, values = (
            x.transpose(0, 1),
            x[:, :2, :3].sin().transpose(0, 1),
            x[:, 1:, :2].transpose(0, 1),
        )
        padding = x[:, 1:, 0] > 0
        return self.head(self.attention(query, keys, values, key_padding_mask=padding)[0].mean(0))


class TransformerDecoder(nn.Module):
    """Sequence-first, norm first, causal."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            4, 2, 3, dropout=0.0, norm_first=True, activation="gelu"
        )

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x.transpose(0, 1), x[:, :2].sin().transpose(0, 1), tgt_mask=mask)[-1]


class Experts(nn.Module):
    """One matrix per expert: batched products, einsum; a packed matrix used in slices."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.gate = raw(2, 3, 2), raw(2, 2, 3), raw(6, 3)

    def forward(self, x):  # [N, 3]
        a, b = (F.linear(x, part) for part in self.gate.chunk(2))
        h = torch.tanh(torch.bmm(torch.stack([a, b]), self.first))  # [E, N, 2]
        return torch.einsum("eni,eio->no", h, self.second)


class Windows(nn.Module):
    """Windows of a sequence are rows; each is as long as the batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):  # [N, 8, 3]
        h = torch.tanh(self.embed(x.unflatten(1, (2, 4)).flatten(0, 1)))  # [2N, 4, 4]
        return self.head((self.mix(h) * h.mean(1, keepdim=True)).view(len(x), 8, 4).mean(1))


class AllEqual(nn.Module):
    """Every size is 3: batch, time, features, classes."""

    def __init__(self):
        super().__init__()
        self.position, self.scale, self.inp = raw(3, 3), raw(3), nn.Linear(3, 3)
        self.norm, self.W = nn.LayerNorm(3), raw(3, 3)

    def forward(self, x):
        x = torch.tanh(self.inp(x) + self.position) * self.scale
        return (self.norm(x) @ self.W).mean(1)


ZOO = [
    Row("mlp_sigmoid", mlp, randn(4, 5)),
    Row("mlp_mse", mlp, randn(4, 5), "mse"),
    Row("mlp_bce", mlp, randn(4, 5), "bce_sum"),
    Row("one_datum", mlp, randn(1, 5)),
    Row("one_datum_cnn", cnn_inplace_groups, randn(1, 2, 5, 4)),
    Row("cnn_inplace_groups", cnn_inplace_groups, randn(5, 2, 5, 4)),
    Row("conv1d", conv1d, randn(4, 2, 8)),
    Row("conv2d_paddings", conv2d_paddings, randn(5, 2, 6, 5), "mse_sum"),
    Row("conv2d_stride_dilation", conv2d_stride_dilation, randn(4, 2, 5, 6)),
    Row("conv2d_same_dilated", conv2d_same_dilated, randn(3, 2, 4, 5)),
    Row("conv3d", conv3d, randn(3, 2, 3, 3, 5)),
    Row("residual_functional", ResidualFunctional, randn(5, 2, 3, 4)),
    Row("vit", ViT, randn(3, 1, 4, 4)),
    Row("vit_explicit_attention", partial(ViT, explicit=True), randn(5, 1, 4, 4), "mse"),
    Row("tied_embedding", TiedEmbedding, ints(6, 4, 5)),
    Row("layer_reused", Reused, randn(5, 4)),
    Row("rmsnorm_matmul", RMSMatmul, randn(6, 2, 5)),
    Row("products", Products, randn(6, 3, 5)),
    Row("groupnorm_cnn", groupnorm_cnn, randn(3, 1, 5, 5)),
    Row("batchnorm_eval_cnn", batchnorm_eval_cnn, randn(5, 1, 5, 5)),
    Row("layernorm_axes", token_norm, randn(5, 2, 5)),
    Row("deconvolution", deconvolution, randn(4, 1, 4, 4), "mse_sum"),
    Row("frozen", frozen, randn(4, 5)),
    Row("unused_branch", Unused, randn(4, 5)),
    Row("broadcast", Broadcast, randn(6, 2, 5)),
    Row("inplace_arithmetic", InPlaceArithmetic, randn(4, 5)),
    Row("unusual_ops", Unusual, randn(6, 5)),
    Row("embedding_padding", Padding, repeated_tokens),
    Row("embedding_indexed", Indexed, repeated_tokens),
    Row("sequence_linear", lambda: nn.Sequential(mlp(), Mean(1, 2)), randn(4, 2, 3, 5)),
    Row("sequence_first", SequenceFirst, randn(6, 2, 5)),
    Row("language_model", LanguageModel, ints(6, 4, 5), "ce_sequence"),
    Row(
        "scalar_output_mse",
        lambda: nn.Sequential(mlp(), nn.Linear(3, 1), nn.Flatten(0)),
        randn(4, 5),
        "mse",
    ),
    Row(
        "scalar_output_bce",
        lambda: nn.Sequential(mlp(), nn.Linear(3, 1), nn.Flatten(0)),
        randn(4, 5),
        "bce",
    ),
    Row("frames", Frames, randn(4, 2, 1, 3, 3)),
    Row("features_first", FeaturesFirst, randn(6, 5)),
    Row("constant_branch", partial(ConstantBranch, ()), randn(6, 2, 5)),
    Row("constant_branch_batch_of_one", partial(ConstantBranch, (1,)), randn(6, 2, 5)),
    Row("positions", Positions, ints(6, 4, 5)),
    Row("positions_leading", partial(Positions, True), ints(6, 4, 5)),
    Row("positions_as_many_as_samples", Positions, ints(6, 4, 4)),
    Row("hypernetwork", Hypernetwork, randn(6, 5)),
    Row("views", Views, randn(5, 2, 4)),
    Row("transposed", Transposed, randn(6, 5)),
    Row("cast", Cast, randn(6, 5), rtol=1e-5),  # the gradient of the cast is rounded to float32
    Row("weight_norm", parametrized, randn(6, 5)),
    Row(
        "subclass",
        lambda: nn.Sequential(ScaledLinear(5, 4), nn.Tanh(), ScaledLinear(4, 3)),
        randn(6, 5),
    ),
    Row("windows", Windows, randn(4, 8, 3)),
    Row("all_sizes_equal", AllEqual, randn(3, 3, 3)),
    Row("segmentation_ce", segmentation, randn(4, 2, 3, 2), "ce_image"),
    Row("lstm_tagger", Tagger, ints(5, 3, 4), "ce_sequence"),
    Row("gru_sequence_first", SequenceToOne, randn(4, 3, 3)),
    Row("encoder_decoder", EncoderDecoder, randn(4, 2, 2), "mse"),
    Row("transformer_encoder", transformer_encoder, randn(3, 2, 4)),
    Row("transformer_decoder", TransformerDecoder, randn(3, 3, 4), "mse"),
    Row("cross_attention", CrossAttention, randn(4, 3, 4)),
    Row("experts", Experts, randn(5, 3)),
    Row(
        "spectral_norm",
        lambda: nn.Sequential(spectral_norm(nn.Linear(5, 4)), mlp_head()).eval(),
        randn(6, 5),
    ),
    Row("segmentation_mse", segmentation, randn(4, 2, 3, 2), "mse_image"),
]
NAMES = [row.name for row in ZOO]
ROW = {row.name: row for row in ZOO}


@cache
def reference(quantity: str, name: str):
    """The oracle's value for one row, computed once per process."""
    return getattr(oracle, quantity)(ROW[name].make())


def compute(problem: Problem, *extensions, **options) -> None:
    """Run the extensions on one forward and backward pass; slow fallbacks may warn."""
    from lightning_curv import curvature

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with curvature(*extensions, **options):
            problem.compute_loss().backward()


def assert_close(
    actual: Tensor, expected: Tensor, rtol: float = 1e-6, label: str = "", rounding: float = 0.0
) -> None:
    """Relative agreement, entries far below the largest one excepted, and `rounding` (of what cancels) allowed."""
    assert actual.shape == expected.shape, (
        f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    largest = expected.abs().max().item() if expected.numel() else 0.0
    atol = max(1e-3 * rtol * largest, rounding)
    torch.testing.assert_close(
        actual,
        expected,
        rtol=rtol,
        atol=atol,
        check_dtype=False,
        msg=lambda text: f"{label}: {text}",
    )


def assert_fields(
    problem: Problem, field: str, expected: dict[str, Tensor], rtol: float = 1e-6
) -> None:
    """Every trainable parameter that the loss depends on carries the expected field."""
    for name, p in problem.parameters().items():
        if not hasattr(p, field) and expected[name].count_nonzero() == 0 and p.grad is None:
            continue  # an unused parameter carries no field, as it carries no gradient
        rounding = 1e-14 * p.grad.square().max().item() if field == "variance" else 0.0
        assert_close(getattr(p, field), expected[name], rtol, f"{name}.{field}", rounding)

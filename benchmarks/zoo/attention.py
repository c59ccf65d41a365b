"""Small versions of families of networks whose pictures are rows of tokens, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.convolutions import CLASSES, WIDTH, Lambda, Parallel, Residual

HEADS, SIDE = 2, 4


class Attention(nn.Module):
    """Self-attention on [N, T, D] with a bias of the positions.

    Args:
        bias: ``none``, ``sum`` (added to the scores), ``mask`` (handed to
           scaled_dot_product_attention), or ``log`` (Swin
            V2: cosine similarity, the bias from a perceptron on the distances).
        across: attention between channels, as in XCiT, instead of positions.
    """

    def __init__(self, bias: str = "none", across: bool = False, tokens: int = SIDE**2) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias, self.across, side = bias, across, int(tokens**0.5)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        distance = places[:, None] - places + side - 1
        self.register_buffer("index", distance[..., 0] * (2 * side - 1) + distance[..., 1])
        if bias in ("sum", "mask"):
            self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, HEADS))
        if bias == "log":
            grid = torch.cartesian_prod(
                torch.arange(1 - side, side), torch.arange(1 - side, side)
            ).double()
            self.register_buffer("grid", grid.sign() * grid.abs().log1p())
            self.perceptron = nn.Sequential(
                nn.Linear(2, 6), nn.ReLU(inplace=True), nn.Linear(6, HEADS, bias=False)
            )
        if bias == "log" or across:
            self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.across:
            q, k = F.normalize(q.mT, dim=-1), F.normalize(k.mT, dim=-1)
            y = ((q @ k.mT * self.temperature).softmax(-1) @ v.mT).mT
        elif self.bias == "mask":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._table(self.table))
        elif self.bias == "none" and mask is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = self._scores(q, k, mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))

    def _scores(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        if self.bias == "log":
            scale = self.temperature.clamp(max=4.6).exp()
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale
            scores = scores + 16 * self._table(self.perceptron(self.grid)).sigmoid()
        else:
            scores = q @ k.mT * q.shape[-1] ** -0.5 + (
                self._table(self.table) if self.bias == "sum" else 0
            )
        if mask is None:
            return scores
        windows = len(mask)
        return (scores.unflatten(0, (-1, windows)) + mask[:, None]).flatten(0, 1)

    def _table(self, table: Tensor) -> Tensor:
        return table[self.index.flatten()].view(*self.index.shape, HEADS).permute(2, 0, 1)[None]


class Windows(nn.Module):
    """Attention in windows of 2 x 2 pixels, shifted by one where wanted."""

    def __init__(self, bias: str, shift: int) -> None:
        super().__init__()
        self.attention, self.shift = Attention(bias, tokens=4), shift
        regions = torch.zeros(SIDE, SIDE)
        for i, rows in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
            for j, columns in enumerate((slice(0, -2), slice(-2, -1), slice(-1, None))):
                regions[rows, columns] = 3 * i + j
        regions = self._split(regions[None, ..., None]).squeeze(-1)
        apart = (regions[:, None] != regions[:, :, None]).double() * -100
        self.register_buffer("mask", apart)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (SIDE, SIDE)).roll((-self.shift, -self.shift), (1, 2))
        y = self.attention(self._split(x), self.mask if self.shift else None)
        y = y.view(len(x), 2, 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return y.roll((self.shift, self.shift), (1, 2)).flatten(1, 2)

    @staticmethod
    def _split(x: Tensor) -> Tensor:
        n, height, width, features = x.shape
        x = x.view(n, height // 2, 2, width // 2, 2, features).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, 4, features)


class Merge(nn.Module):
    """Swin's patch merging: four neighbours become one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (SIDE, SIDE))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduce(self.norm(x.flatten(1, 2)))


class Tokens(nn.Module):
    """Patches as tokens with positions, a class token where wanted, blocks, and classes from that token or the mean."""

    def __init__(self, *blocks: nn.Module, special: bool = False, positions: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.special = nn.Parameter(torch.zeros(1, 1, WIDTH)) if special else None
        self.positions = (
            nn.Parameter(torch.zeros(1, SIDE**2 + special, WIDTH)) if positions else None
        )
        self.blocks, self.norm, self.head = (
            nn.Sequential(*blocks),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.special is not None:
            x = torch.cat([self.special.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x if self.positions is None else x + self.positions))
        return self.head(x.mean(1) if self.special is None else x[:, 0])


def perceptron(act: nn.Module | None = None) -> nn.Module:
    """Of a transformer's block."""
    return nn.Sequential(nn.Linear(WIDTH, 16), act or nn.GELU(), nn.Linear(16, WIDTH))


def block(mix: nn.Module, scaled: int = 0) -> nn.Module:
    """A transformer's block with the norms in front."""
    mlp = Residual(nn.LayerNorm(WIDTH), perceptron(), scaled=scaled)
    return nn.Sequential(Residual(nn.LayerNorm(WIDTH), mix, scaled=scaled), mlp)


def after(mix: nn.Module) -> nn.Module:
    """The same with the norms behind, as in Swin V2."""
    return nn.Sequential(
        Residual(mix, nn.LayerNorm(WIDTH)), Residual(perceptron(), nn.LayerNorm(WIDTH))
    )


def mixer() -> nn.Module:
    """A perceptron over the tokens for attention."""
    tokens = SIDE**2
    turn = Lambda(lambda x: x.transpose(1, 2))
    return Tokens(
        block(nn.Sequential(turn, nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens), turn)),
        positions=False,
    )


def gmlp() -> nn.Module:
    """A spatial gate: one half of the features, mixed over the tokens, times the other."""
    gate = Lambda(lambda x: x.chunk(2, -1)[1])
    mixed = nn.Sequential(
        gate,
        nn.LayerNorm(8),
        Lambda(lambda x: x.mT),
        nn.Linear(SIDE**2, SIDE**2),
        Lambda(lambda x: x.mT),
    )
    halves = Parallel(torch.mul, Lambda(lambda x: x.chunk(2, -1)[0]), mixed)
    return Tokens(
        Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), halves, nn.Linear(8, WIDTH)),
        positions=False,
    )


class ClassAttention(nn.Module):
    """CaiT: a class token that joins late and asks the others."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.ask = (
            nn.Parameter(torch.zeros(1, 1, WIDTH)),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        return (
            token
            + self.ask(
                token, torch.cat([token, x], 1), torch.cat([token, x], 1), need_weights=False
            )[0]
        )


def torch_encoder(batch_first: bool) -> nn.Module:
    """The layer that torch has."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    turn = Lambda(lambda x: x.transpose(0, 1))
    return Tokens(encoder if batch_first else nn.Sequential(turn, encoder, turn), special=True)

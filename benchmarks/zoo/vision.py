"""Small versions of families of networks for pictures, in plain torch, and the networks of timm where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo.network import Batch, Network, Problem, integers, randn, settled

WIDTH, HEADS, SIDE, CLASSES = 8, 2, 4, 3
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
    inp: int, out: int, size: int = 3, norm: Norm = group_norm, act: nn.Module | None = None, **how: int
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
    weights = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(WIDTH, 4, 1), act, nn.Conv2d(4, WIDTH, 1), gate)
    return Parallel(torch.mul, nn.Identity(), weights)


def resnet(norm: Norm) -> nn.Module:
    """Two residual blocks, one with a projection."""
    block = nn.Sequential(conv(WIDTH, WIDTH, norm=norm), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), norm(WIDTH))
    wide = nn.Sequential(conv(WIDTH, 16, norm=norm, stride=2), nn.Conv2d(16, 16, 3, padding=1), norm(16))
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
    grow = [Parallel(concatenated, nn.Identity(), conv(WIDTH + 4 * i, 4, norm=nn.BatchNorm2d)) for i in range(2)]
    return nn.Sequential(conv(3, WIDTH, norm=nn.BatchNorm2d), *grow, nn.AvgPool2d(2), head(16))


def squeezenet() -> nn.Module:
    """Fire modules; classes by a convolution."""
    wide = [nn.Sequential(nn.Conv2d(4, WIDTH, k, padding=k // 2), nn.ReLU(inplace=True)) for k in (1, 3)]
    fire = nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.ReLU(inplace=True), Parallel(concatenated, *wide))
    end = nn.Sequential(nn.Conv2d(16, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True), fire, end
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
        Lambda(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width),
        scaled=width,
    )  # fmt: skip
    pool = Lambda(lambda x: x.mean((1, 2)))
    stem = nn.Sequential(nn.Conv2d(3, width, 2, stride=2), Lambda(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(width))
    return nn.Sequential(stem, block, pool, nn.LayerNorm(width), nn.Linear(width, CLASSES))


def poolformer() -> nn.Module:
    """Pooling for attention."""
    mix = Parallel(torch.sub, nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Identity())
    mlp = [nn.Conv2d(WIDTH, 16, 1), nn.GELU(), nn.Conv2d(16, WIDTH, 1)]
    return convolutional(Residual(group_norm(WIDTH), mix), Residual(group_norm(WIDTH), *mlp))


def convmixer() -> nn.Module:
    """Depthwise and pointwise convolutions with BatchNorm after the activation."""
    depth = Residual(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.GELU(), nn.BatchNorm2d(WIDTH))
    return convolutional(depth, nn.Conv2d(WIDTH, WIDTH, 1), nn.GELU(), nn.BatchNorm2d(WIDTH))


class StandardizedConv(nn.Conv2d):
    """Convolution whose weights have mean zero and variance one in every output channel."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), unbiased=False, keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias, padding=self.padding)


class Attention(nn.Module):
    """Self-attention on [N, T, D] with a bias of the positions.

    Args:
        bias: ``none``, ``sum`` (added to the scores), ``mask`` (handed to scaled_dot_product_attention), or ``log`` (Swin
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
            grid = torch.cartesian_prod(torch.arange(1 - side, side), torch.arange(1 - side, side)).double()
            self.register_buffer("grid", grid.sign() * grid.abs().log1p())
            self.perceptron = nn.Sequential(nn.Linear(2, 6), nn.ReLU(inplace=True), nn.Linear(6, HEADS, bias=False))
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
            scores = q @ k.mT * q.shape[-1] ** -0.5 + (self._table(self.table) if self.bias == "sum" else 0)
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
        self.positions = nn.Parameter(torch.zeros(1, SIDE**2 + special, WIDTH)) if positions else None
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

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
    return nn.Sequential(Residual(mix, nn.LayerNorm(WIDTH)), Residual(perceptron(), nn.LayerNorm(WIDTH)))


def mixer() -> nn.Module:
    """A perceptron over the tokens for attention."""
    tokens = SIDE**2
    turn = Lambda(lambda x: x.transpose(1, 2))
    return Tokens(
        block(nn.Sequential(turn, nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens), turn)), positions=False
    )


def gmlp() -> nn.Module:
    """A spatial gate: one half of the features, mixed over the tokens, times the other."""
    gate = Lambda(lambda x: x.chunk(2, -1)[1])
    mixed = nn.Sequential(
        gate, nn.LayerNorm(8), Lambda(lambda x: x.mT), nn.Linear(SIDE**2, SIDE**2), Lambda(lambda x: x.mT)
    )
    halves = Parallel(torch.mul, Lambda(lambda x: x.chunk(2, -1)[0]), mixed)
    return Tokens(
        Residual(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), halves, nn.Linear(8, WIDTH)), positions=False
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
        return token + self.ask(token, torch.cat([token, x], 1), torch.cat([token, x], 1), need_weights=False)[0]


def torch_encoder(batch_first: bool) -> nn.Module:
    """The layer that torch has."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    turn = Lambda(lambda x: x.transpose(0, 1))
    return Tokens(encoder if batch_first else nn.Sequential(turn, encoder, turn), special=True)


class UNet(nn.Module):
    """Down, up and a shortcut; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = conv(3, WIDTH), nn.Sequential(nn.MaxPool2d(2), conv(WIDTH, 16))
        self.up, self.last = nn.ConvTranspose2d(16, WIDTH, 2, stride=2), nn.Conv2d(2 * WIDTH, CLASSES, 1)

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
        return self.last(self.sides[0](large) + F.interpolate(small, scale_factor=2, mode="bilinear"))


def autoencoder() -> nn.Module:
    """Pictures from pictures."""
    return nn.Sequential(conv(3, WIDTH, stride=2), nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1), nn.Sigmoid())


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def several_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of every class."""
    logits = model(batch["x"])
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(batch["y"], CLASSES).to(logits.dtype))


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Squared errors of pixels."""
    return F.mse_loss(model(batch["x"]), batch["x"])


def row(name: str, net: Callable[[], nn.Module], loss: Callable[[nn.Module, Batch], Tensor] = classification, *, pixels: bool = False,
        samples: tuple[int, ...] = (3,), package: str = "torch", side: int = 2 * SIDE, coupled: bool = False) -> Network:  # fmt: skip
    """A row: name, network, loss, and whether every pixel has a class."""

    def make(count: int) -> Problem:
        torch.manual_seed(0)
        x, model = randn(count, 3, side, side), settled(net())
        y = integers(0, CLASSES, count, side, side) if pixels else torch.arange(count) % CLASSES
        return Problem(model.train(coupled), {"x": x, "y": y}, count, loss)

    return Network(name, "vision", make, package, coupled, samples=samples)


def timm_row(name: str, side: int = 32, **settings: object) -> Network:
    """A network of timm."""

    def net() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)

    return row(f"timm-{name}", net, package="timm", side=side)


VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
NETWORKS = [
    row("resnet-groupnorm", lambda: resnet(group_norm), samples=(3, 1, 4)),
    row("resnet-batchnorm", lambda: resnet(nn.BatchNorm2d)),
    row("resnet-batchnorm-training", lambda: resnet(nn.BatchNorm2d), coupled=True),
    row("resnet-labels", lambda: resnet(group_norm), several_labels),
    row("densenet", densenet),
    row("squeezenet", squeezenet),
    row("mobilenet-v2", lambda: inverted(nn.ReLU6(inplace=True), nn.Sigmoid())),
    row("mobilenet-v3", lambda: inverted(nn.Hardswish(inplace=True), nn.Hardsigmoid())),
    row("efficientnet", lambda: inverted(nn.SiLU(inplace=True), nn.Sigmoid())),
    row("shufflenet", shufflenet),
    row("convnext-plain", convnext),
    row("poolformer-plain", poolformer),
    row("convmixer", convmixer),
    row("standardized", lambda: convolutional(StandardizedConv(WIDTH, WIDTH, 3, padding=1), nn.ReLU())),
    row("vit-plain", lambda: Tokens(block(Attention()), block(Attention()), special=True), samples=(3, 1, 17)),
    row("vit-layerscale", lambda: Tokens(block(Attention(), scaled=WIDTH))),
    row("vit-relative", lambda: Tokens(block(Attention("sum")), positions=False), samples=(3, 1, 16)),
    row("vit-relative-mask", lambda: Tokens(block(Attention("mask")), positions=False), samples=(3, 1, 16)),
    row("swin-plain", lambda: Tokens(block(Windows("sum", 0)), block(Windows("sum", 1)), Merge(), positions=False), samples=(3, 1)),
    row("swin-mask", lambda: Tokens(block(Windows("mask", 0)), positions=False)),
    row("swin-v2-plain", lambda: Tokens(after(Windows("log", 0)), after(Windows("log", 1)), positions=False), samples=(3, 1)),
    row("cait", lambda: Tokens(block(Attention(), scaled=WIDTH), ClassAttention())),
    row("xcit", lambda: Tokens(block(Attention(across=True)))),
    row("torch-encoder", lambda: torch_encoder(True), samples=(3, 1)),
    row("torch-encoder-steps-first", lambda: torch_encoder(False), samples=(3, 17)),
    row("mlp-mixer", mixer, samples=(3, 1, 16)),
    row("gmlp", gmlp),
    row("unet", UNet, pixels=True),
    row("pyramid", Pyramid, pixels=True),
    row("autoencoder", autoencoder, reconstruction),
    timm_row("resnet10t", channels=(8, 8, 16, 16), stem_width=8),
    timm_row("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    timm_row("vit_tiny_patch16_224", **VIT),
    timm_row("vit_relpos_small_patch16_224", **VIT),
    timm_row("deit3_small_patch16_224", **VIT),
    timm_row("beit_base_patch16_224", **VIT),
    timm_row("cait_xxs24_224", **VIT),
    timm_row("eva02_tiny_patch14_224", **{**VIT, "embed_dim": 24}),
    timm_row("xcit_nano_12_p16_224", **VIT),
    timm_row("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2)),
    timm_row("swinv2_tiny_window8_256", img_size=32, window_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2)),
    timm_row("coatnet_pico_rw_224", img_size=32),
]  # fmt: skip

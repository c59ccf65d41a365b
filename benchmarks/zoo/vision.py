"""Networks for pictures: small versions of families in plain torch, and those of timm where it is installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import attention, convolutions
from zoo.attention import SIDE, Attention, ClassAttention, Merge, Tokens, Windows, after, block
from zoo.convolutions import CLASSES, WIDTH, convolutional, group_norm, inverted, resnet
from zoo.network import Batch, Network, Problem, integers, randn, settled


def classification(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def several_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy of every class."""
    logits = model(batch["x"])
    return F.binary_cross_entropy_with_logits(
        logits, F.one_hot(batch["y"], CLASSES).to(logits.dtype)
    )


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    """Squared errors of pixels."""
    return F.mse_loss(model(batch["x"]), batch["x"])


def row(name: str, net: Callable[[], nn.Module], loss: Callable[[nn.Module, Batch], Tensor] = classification, *,
   pixels: bool = False,
        samples: tuple[int, ...] = (3,), package: str = "torch", side: int = 2 * SIDE,
           coupled: bool = False) -> Network:  # fmt: skip
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
    row("densenet", convolutions.densenet),
    row("squeezenet", convolutions.squeezenet),
    row("mobilenet-v2", lambda: inverted(nn.ReLU6(inplace=True), nn.Sigmoid())),
    row("mobilenet-v3", lambda: inverted(nn.Hardswish(inplace=True), nn.Hardsigmoid())),
    row("efficientnet", lambda: inverted(nn.SiLU(inplace=True), nn.Sigmoid())),
    row("shufflenet", convolutions.shufflenet),
    row("convnext-plain", convolutions.convnext),
    row("poolformer-plain", convolutions.poolformer),
    row("convmixer", convolutions.convmixer),
    row("standardized", lambda: convolutional(convolutions.StandardizedConv(WIDTH, WIDTH, 3, padding=1), nn.ReLU())),
    row("vit-plain", lambda: Tokens(block(Attention()), block(Attention()), special=True), samples=(3, 1, 17)),
    row("vit-layerscale", lambda: Tokens(block(Attention(), scaled=WIDTH))),
    row("vit-relative", lambda: Tokens(block(Attention("sum")), positions=False), samples=(3, 1, 16)),
    row("vit-relative-mask", lambda: Tokens(block(Attention("mask")), positions=False), samples=(3, 1, 16)),
    row("swin-plain", lambda: Tokens(block(Windows("sum", 0)), block(Windows("sum", 1)), Merge(), positions=False),
       samples=(3, 1)),
    row("swin-mask", lambda: Tokens(block(Windows("mask", 0)), positions=False)),
    row("swin-v2-plain", lambda: Tokens(after(Windows("log", 0)), after(Windows("log", 1)), positions=False),
       samples=(3, 1)),
    row("cait", lambda: Tokens(block(Attention(), scaled=WIDTH), ClassAttention())),
    row("xcit", lambda: Tokens(block(Attention(across=True)))),
    row("torch-encoder", lambda: attention.torch_encoder(True), samples=(3, 1)),
    row("torch-encoder-steps-first", lambda: attention.torch_encoder(False), samples=(3, 17)),
    row("mlp-mixer", attention.mixer, samples=(3, 1, 16)),
    row("gmlp", attention.gmlp),
    row("unet", convolutions.UNet, pixels=True),
    row("pyramid", convolutions.Pyramid, pixels=True),
    row("autoencoder", convolutions.autoencoder, reconstruction),
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

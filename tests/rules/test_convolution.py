"""Convolutions: products with overlapping patches, and the weighted gradient, against one sample at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import curvature
from lightning_curv.extensions import Extension


class Contractions(Extension):
    savefield = "contractions"

    def evaluate(self, jacobian):
        weights = torch.linspace(-1, 2, jacobian.samples, dtype=torch.float64)
        return [
            jacobian.per_sample()[0],
            jacobian.squared_norms()[0],
            jacobian.variance(),
            jacobian.formed().squared_norms()[0],
            jacobian.formed().weighted_total(weights),
            jacobian.weighted_total(weights),
            jacobian[1:3].weighted_total(weights[1:3]),
        ]


def expectations(layer, X):
    """The same for the gradients of single samples."""
    singles = torch.stack(
        [torch.autograd.grad(F.silu(layer(x[None])).square().sum(), layer.weight)[0] for x in X]
    )
    weights = torch.linspace(-1, 2, len(X), dtype=X.dtype)
    return [
        singles,
        singles.flatten(1).square().sum(1),
        singles.var(0, correction=0),
        singles.flatten(1).square().sum(1),
        torch.tensordot(weights, singles, 1),
        torch.tensordot(weights, singles, 1),
        torch.tensordot(weights[1:3], singles[1:3], 1),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda: nn.Conv2d(4, 6, (3, 2), padding=(0, 2), bias=False),
        lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
        lambda: nn.Conv2d(4, 6, 4, padding="same"),
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1),
        lambda: nn.Conv2d(4, 6, (1, 3)),
        lambda: nn.Conv3d(4, 6, 2, padding=1),
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: nn.ConvTranspose2d(
            4, 6, 3, stride=(2, 1), padding=1, output_padding=(1, 0), groups=2
        ),
    ],
)
def test_contractions_equal_single_samples(make):
    torch.manual_seed(0)
    layer = make().double()
    dims = layer.weight.ndim - 2
    X = torch.randn(5, 4, *[6, 5, 4][:dims], dtype=torch.float64)
    with curvature(Contractions(), batch_size=5):
        F.silu(layer(X)).square().sum().backward()
    torch.testing.assert_close(
        layer.weight.contractions, expectations(layer, X), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    "make", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d], ids=lambda m: m.__name__
)
def test_a_bias_beside_a_frozen_weight_has_its_gradients(make):
    torch.manual_seed(0)
    layer = make(4, 6, 3).double()
    layer.weight.requires_grad_(False)
    X = torch.randn(5, 4, *[6, 5][: layer.weight.ndim - 2], dtype=torch.float64)
    with curvature(Contractions(), batch_size=5):
        F.silu(layer(X)).square().sum().backward()
    losses = [F.silu(layer(x[None])).square().sum() for x in X]
    singles = torch.stack([torch.autograd.grad(loss, layer.bias)[0] for loss in losses])
    torch.testing.assert_close(layer.bias.contractions[0], singles, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 100], ids=["one", "two", "all"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(16, 8, 3, padding=1),
        lambda: nn.Conv2d(16, 24, 3, padding=1),
        lambda: nn.Conv2d(16, 8, (3, 2), padding=(0, 2), bias=False),
        lambda: nn.Conv2d(16, 8, 3, stride=2, dilation=(1, 2), padding=2),
        lambda: nn.Conv2d(16, 32, 3, groups=2),
        lambda: nn.Conv2d(16, 8, 4, padding="same"),
        lambda: nn.Conv2d(16, 8, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv3d(16, 8, 2, padding=1),
        lambda: nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        lambda: nn.ConvTranspose2d(16, 16, (3, 2), dilation=(2, 1), groups=2),
    ],
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a way of oneDNN")
def test_samples_as_groups_of_one_convolution_equal_single_samples(make, samples, monkeypatch):
    torch.manual_seed(0)
    layer = make()
    X = torch.randn(5, 16, *[6, 5, 4][: layer.weight.ndim - 2])
    expected = expectations(layer.double(), X.double())
    layer.float()
    monkeypatch.setattr("lightning_curv.terms.jacobian.CHUNK_BYTES", samples * layer.weight.nbytes)
    monkeypatch.setattr("lightning_curv.terms.ghost_norms.are_cheaper", lambda term: False)
    with curvature(Contractions(), Kept(), batch_size=5):
        F.silu(layer(X)).square().sum().backward()
    assert layer.weight.kept.terms[0].own_gradients is not None
    found = [x.double() for x in layer.weight.contractions]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Kept(Extension):
    savefield = "kept"

    def evaluate(self, jacobian):
        return jacobian


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a way of oneDNN")
def test_samples_are_groups_only_where_that_is_faster():
    def own(layer, X):
        with curvature(Kept(), batch_size=len(X)):
            layer(X).square().sum().backward()
        return layer.weight.kept.terms[0].own_gradients is not None

    X = torch.randn(2, 16, 8, 8)
    assert own(nn.Conv2d(16, 8, 3), X)
    assert not own(nn.Conv2d(16, 8, 3).double(), X.double())
    assert not own(nn.Conv2d(16, 12, 3), X)  # part of a vector
    assert not own(nn.Conv2d(16, 16, 3, groups=4), X)
    assert not own(nn.Conv2d(16, 8, 1), X)  # nothing to copy
    assert not own(nn.Conv2d(16, 512, 3), X)  # more than the cache holds
    with torch.backends.mkldnn.flags(enabled=False):
        assert not own(nn.Conv2d(16, 8, 3), X)


@pytest.mark.parametrize("size", [3, 8], ids=["gram", "formed"])
@pytest.mark.parametrize(
    "reindex",
    [
        lambda w: w.transpose(0, 1),
        lambda w: w.permute(1, 0, 3, 2),
        lambda w: w[:-2],
        lambda w: w[:, 1:-1],
    ],
)
def test_contractions_of_a_weight_that_is_reindexed(reindex, size):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(18, 18, 3, 3, dtype=torch.float64))
    X = torch.randn(5, reindex(weight).shape[1], size, size, dtype=torch.float64)

    def loss(x):
        return F.silu(F.conv2d(x, reindex(weight), padding=1)).square().sum()

    with curvature(Contractions()):
        loss(X).backward()
    singles = torch.stack([torch.autograd.grad(loss(x[None]), weight)[0] for x in X])
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    expected = torch.tensordot(weights, singles, 1)
    _, norms, _, _, formed, found, some = weight.contractions
    torch.testing.assert_close(norms, singles.flatten(1).square().sum(1))
    torch.testing.assert_close([formed, found], [expected, expected])
    torch.testing.assert_close(some, torch.tensordot(weights[1:3], singles[1:3], 1))

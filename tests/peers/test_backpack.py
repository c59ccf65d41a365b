"""The seed's system gives the same fields, names, shapes and scaling, where it is right."""

import copy

import pytest
import torch
from packages import needs
from torch import nn
from zoo import assert_close

import lightning_curv
from lightning_curv import curvature, extend

backpack = needs("backpack")
theirs = needs("backpack.extensions")

MODELS = {
    "mlp": (lambda: [nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)], (7, 6)),
    "cnn": (
        lambda: [
            nn.Conv2d(2, 3, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ],
        (7, 2, 4, 4),
    ),
    "deconv1d": (
        lambda: [
            nn.ConvTranspose1d(2, 4, 3, padding=5),
            nn.Sigmoid(),
            nn.ConvTranspose1d(4, 3, 1),
            nn.Flatten(),
        ],
        (7, 2, 9),
    ),
    "deconv2d": (
        lambda: [
            nn.ConvTranspose2d(2, 3, 2, padding=2),
            nn.Sigmoid(),
            nn.ConvTranspose2d(3, 3, 1),
            nn.Flatten(),
        ],
        (7, 2, 4, 4),
    ),
    "deconv3d": (
        lambda: [
            nn.ConvTranspose3d(2, 4, 2, padding=3),
            nn.Sigmoid(),
            nn.ConvTranspose3d(4, 3, 1),
            nn.Flatten(),
        ],
        (7, 2, 6, 6, 6),
    ),
}
CHAINS = ["mlp", "cnn"]
FIELDS = """BatchGrad BatchL2Grad SumGradSquared Variance DiagGGNExact BatchDiagGGNExact SqrtGGNExact DiagHessian
BatchDiagHessian""".split()  # noqa: SIM905


def both(name, extension):
    """Our model and theirs after one backward pass with the extension of this name."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    ours = nn.Sequential(*make())
    peer = backpack.extend(copy.deepcopy(ours))
    X, y = torch.randn(shape), torch.randint(3, (shape[0],))
    lossfunc = extend(nn.CrossEntropyLoss())
    extend(ours)
    loss = lossfunc(ours(X), y)
    with curvature(getattr(lightning_curv, extension)()):
        loss.backward()
    with backpack.backpack(getattr(theirs, extension)()):
        backpack.extend(nn.CrossEntropyLoss())(peer(X), y).backward()
    return list(zip(ours.parameters(), peer.parameters()))


@pytest.mark.parametrize("extension", FIELDS)
@pytest.mark.parametrize("name", CHAINS)
def test_fields(name, extension):
    field = getattr(lightning_curv, extension)().savefield
    for ours, peer in both(name, extension):
        largest = getattr(peer, field).abs().max().item()
        torch.testing.assert_close(
            getattr(ours, field), getattr(peer, field), rtol=1e-4, atol=1e-5 * largest
        )


@pytest.mark.parametrize("extension", ["KFLR", "KFRA"])
def test_kronecker_factors_of_linear_layers(extension):
    for ours, peer in both("mlp", extension):
        field = extension.lower()
        for a, b in zip(getattr(ours, field), getattr(peer, field)):
            assert_close(a, b, rtol=1e-4)


@pytest.mark.filterwarnings(
    "ignore:The Kronecker factors stored in the weight parameters of transpose convolutions"
)
@pytest.mark.parametrize("extension", ["KFLR", "KFRA"])
@pytest.mark.parametrize("name", ["deconv1d", "deconv2d", "deconv3d"])
def test_kronecker_factors_of_transposed_convolutions(name, extension):
    """A single pixel of the output, where both are exact; elsewhere the seed's system mixes expand and reduce."""
    field = extension.lower()
    for ours, peer in both(name, extension):
        assert len(getattr(ours, field)) == len(getattr(peer, field))
        for a, b in zip(getattr(ours, field), getattr(peer, field)):
            assert_close(a, b, rtol=1e-4)


@pytest.mark.parametrize("extension", ["HMP", "GGNMP"])
@pytest.mark.parametrize("name", CHAINS)
def test_products(name, extension):
    for ours, peer in both(name, extension):
        V = torch.randn(3, *ours.shape)
        expected = getattr(peer, extension.lower())(V)
        largest = expected.abs().max().item()
        torch.testing.assert_close(
            getattr(ours, extension.lower())(V), expected, rtol=1e-3, atol=1e-5 * largest
        )

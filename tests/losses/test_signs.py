"""Signs that a graph tells: negative weights are refused all the same, and others cost no look at a number."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import DiagGGNExact, DiagGGNMC, curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import likelihoods

X, LABELS, VALUES = torch.randn(6, 4), torch.arange(6) % 3, torch.rand(6, 3)


def cross_entropy(out):
    return F.cross_entropy(out, LABELS)


TOLD = {
    "plain": cross_entropy,
    "smoothed": lambda out: F.cross_entropy(out, LABELS, label_smoothing=0.1),
    "sum": lambda out: F.cross_entropy(out, LABELS, reduction="sum"),
    "by hand": lambda out: F.cross_entropy(out, LABELS, reduction="none").mean(),
    "times a number": lambda out: 2 * cross_entropy(out) / 4,
    "plus": lambda out: cross_entropy(out) + 0.5 * F.mse_loss(out, VALUES),
    "mse": lambda out: F.mse_loss(out, VALUES),
    "bits": lambda out: F.binary_cross_entropy_with_logits(out, VALUES),
}
# Of the functions that are also refused where they are negative.
UNTOLD = {
    "minus": lambda out, sign: sign * cross_entropy(out),
    "quotient": lambda out, sign: cross_entropy(out) / (2 * sign),
    "difference": lambda out, sign: F.mse_loss(out, VALUES) - (-sign) * cross_entropy(out),
    "negation": lambda out, sign: -(-sign * cross_entropy(out)),
    "alpha": lambda out, sign: torch.add(torch.zeros(()), cross_entropy(out), alpha=sign),
    "a tensor": lambda out, sign: torch.tensor([2.0 * sign]).sum() * cross_entropy(out),
    "rows": lambda out, sign: (
        F.cross_entropy(out, LABELS, reduction="none") * sign * torch.ones(6)
    ).sum(),
    "weights": lambda out, sign: F.cross_entropy(
        out, LABELS, torch.tensor([1.0, sign, 3.0]), reduction="sum"
    ),
    "bits": lambda out, sign: F.binary_cross_entropy_with_logits(
        out, VALUES, torch.full((6, 3), sign)
    ),
    "matrix": lambda out, sign: (
        F.cross_entropy(out, LABELS, reduction="none") @ torch.full((6,), sign)
    ),
}


@pytest.fixture
def looks(monkeypatch):
    """The number of looks at weights."""
    seen = []
    look = likelihoods.nonnegative
    monkeypatch.setattr(
        likelihoods, "nonnegative", lambda weight: seen.append(weight) or look(weight)
    )
    return seen


def run(loss, extension, **options):
    net = nn.Linear(4, 3)
    with curvature(extension):
        loss(net(X)).backward(**options)
    return net.weight


@pytest.mark.parametrize("extension", [DiagGGNMC, DiagGGNExact])
@pytest.mark.parametrize("name", TOLD)
def test_nobody_looks_at_weights_whose_sign_the_graph_tells(name, extension, looks):
    run(TOLD[name], extension())
    assert not looks


@pytest.mark.parametrize("name", UNTOLD)
def test_negative_weights_are_refused(name):
    run(lambda out: UNTOLD[name](out, 1.0), DiagGGNMC())
    with pytest.raises(UnsupportedError, match="found a negative one"):
        run(lambda out: UNTOLD[name](out, -1.0), DiagGGNMC())
    with pytest.raises(UnsupportedError, match="found a negative one"):
        run(lambda out: UNTOLD[name](out, -1.0), DiagGGNExact())


def test_a_negative_gradient_at_the_root_is_refused():
    run(cross_entropy, DiagGGNMC(), gradient=torch.tensor(2.0))
    with pytest.raises(UnsupportedError, match="found a negative one"):
        run(cross_entropy, DiagGGNMC(), gradient=torch.tensor(-1.0))

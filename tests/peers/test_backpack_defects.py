"""One test per defect of the seed's system (BackPACK 1.7) that this project must not have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import assert_close

from lightning_curv import curvature, extend
from lightning_curv.extensions import (
    KFAC,
    KFLR,
    PCHMP,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    Variance,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def per_sample(model, loss, X, y):
    """Gradients of the summands of a mean loss, by one backward pass each."""
    rows = []
    for n in range(len(X)):
        grads = torch.autograd.grad(
            loss(model(X[n : n + 1]), y[n : n + 1]) / len(X), list(model.parameters())
        )
        rows.append(grads)
    return [torch.stack(column) for column in zip(*rows)]


def assert_per_sample(model, loss, X, y):
    expected = per_sample(model, loss, X, y)
    with curvature(BatchGrad(), BatchL2Grad()):
        loss(model(X), y).backward()
    for p, g in zip(model.parameters(), expected):
        assert_close(p.grad_batch, g)
        assert_close(p.batch_l2, g.flatten(1).square().sum(1))


def image_problem(*layers):
    model, X = nn.Sequential(*layers).double(), torch.randn(4, 4, 6, 6).double()
    width = model(X).flatten(1).shape[1]
    return (
        nn.Sequential(*model, nn.Flatten(), nn.Linear(width, 3)).double(),
        F.cross_entropy,
        X,
        torch.tensor([0, 2, 1, 0]),
    )


def test_variance_does_not_cancel_in_float32():
    """Gradients 100 ± 0.02 have the variance 0.0004; a difference of float32 moments gives 0.0117."""
    layer = nn.Linear(1, 1)
    x = torch.tensor([[99.98], [100.02]] * 50)
    with curvature(Variance()):
        layer(x).sum().backward()
    assert_close(layer.weight.variance, x.double().var(unbiased=False).reshape(1, 1), rtol=1e-3)


def test_positive_curvature_residual_is_linear_in_the_gradient():
    """ℓ = 3·φ(w), φ = square: φ''·g = 2·3; a residual with g² gives 18."""
    w = nn.Parameter(torch.tensor([0.5]))
    with curvature(PCHMP()):
        (3 * F.mse_loss(torch.ones(1, 1) * w, torch.zeros(1, 1))).backward()
    assert_close(w.pchmp(torch.ones(1)), torch.tensor([6.0]))
    with curvature(PCHMP()):
        F.mse_loss((torch.ones(1, 1) * w).square(), -torch.ones(1, 1)).backward()
    # f = w², y = -1: GGN (2w)²·2 = 2, residual 2·g with g = 2 (w² + 1) = 2.5
    assert_close(w.pchmp(torch.ones(1)), torch.tensor([2 + 5.0]))


def test_norms_with_groups():
    assert_per_sample(*image_problem(nn.Conv2d(4, 4, 3, groups=2), nn.Sigmoid()))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(4, 2, 3, padding="same"),
        lambda: nn.Conv2d(4, 2, (2, 3), padding="same", padding_mode="reflect"),
    ],
)
def test_padding_modes(layer):
    assert_per_sample(*image_problem(layer(), nn.Sigmoid()))


def test_ignored_targets():
    model, X, y = (
        nn.Linear(5, 3).double(),
        torch.randn(4, 5).double(),
        torch.tensor([0, -100, 2, -100]),
    )
    summands = F.cross_entropy(model(X), y, reduction="none") / 2
    expected = torch.stack(
        [torch.autograd.grad(s, model.weight, retain_graph=True)[0] for s in summands]
    )
    with curvature(BatchGrad(), DiagGGNExact()):
        F.cross_entropy(model(X), y).backward()
    assert_close(model.weight.grad_batch, expected)
    p = model(X).softmax(1)
    kept = (y != -100).double()
    assert_close(model.weight.diag_ggn_exact, torch.einsum("n,no,ni->oi", kept / 2, p - p**2, X**2))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(6, 3)

        def forward(self, tokens):
            return F.linear(self.embedding(tokens).tanh().mean(1), self.embedding.weight)

    assert_per_sample(
        Tied().double(), F.cross_entropy, torch.randint(6, (4, 5)), torch.tensor([0, 5, 2, 2])
    )


def test_reused_modules():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer).double()
    assert_per_sample(
        model, F.cross_entropy, torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 1])
    )


def test_backward_of_an_older_loss():
    model = extend(nn.Linear(3, 2)).double()
    lossfunc = extend(nn.MSELoss())
    old, new, y = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    expected = per_sample(model, F.mse_loss, old, y)[0]
    older = lossfunc(model(old), y)
    lossfunc(model(new), y)
    with curvature(BatchGrad()):
        older.backward()
    assert_close(model.weight.grad_batch, expected)


def test_a_factor_scales_gradients_and_curvature():
    model, X, y = nn.Linear(5, 3).double(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 1])
    fields = {}
    for factor in (1, 3):
        with curvature(BatchGrad(), DiagGGNExact(), DiagHessian(), KFLR()):
            (factor * F.cross_entropy(model(X), y)).backward()
        p = model.weight
        fields[factor] = [p.grad_batch, p.diag_ggn_exact, p.diag_h, p.kflr[0], p.kflr[1] * factor]
    for a, b in zip(fields[1], fields[3]):
        assert_close(b, 3 * a)


def test_float64_embedding_and_average_pooling():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(3, 3)

        def forward(self, tokens):
            return self.head(F.avg_pool1d(self.embedding(tokens), 2).mean(1))

    assert_per_sample(
        Net().double(), F.cross_entropy, torch.randint(7, (4, 5)), torch.tensor([0, 1, 2, 2])
    )


def test_inplace_relu():
    assert_per_sample(*image_problem(nn.Conv2d(4, 3, 3), nn.ReLU(inplace=True)))


def test_subclasses_of_linear():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    assert_per_sample(
        Scaled(5, 3).double(),
        F.cross_entropy,
        torch.randn(4, 5).double(),
        torch.tensor([0, 1, 2, 2]),
    )


def test_unknown_ops_are_errors():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x)
            return x * w

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return None, (g * x).sum(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Double.apply(x, self.w)

    net = Net()
    with (
        pytest.raises(NotImplementedError, match=r"`w` reaches the loss through `DoubleBackward`"),
        curvature(BatchGrad()),
    ):
        net(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.LayerNorm([4, 6, 6])])
@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU])
def test_norms_and_activations(norm, activation):
    assert_per_sample(*image_problem(norm(), activation(), nn.Conv2d(4, 2, 3)))


def test_attention_and_gru():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.gru = (
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.GRU(4, 3, batch_first=True),
            )

        def forward(self, x):
            return self.gru(self.attention(x, x, x)[0])[0][:, -1]

    assert_per_sample(
        Net().double(), F.cross_entropy, torch.randn(4, 5, 4).double(), torch.tensor([0, 1, 2, 2])
    )


def test_kfac_of_sequences_and_groups():
    layers = nn.ModuleList([nn.Linear(4, 6), nn.Conv1d(5, 5, 2, groups=5), nn.Linear(25, 3)])
    with curvature(KFAC(), KFLR()):
        out = layers[1](layers[0](torch.randn(4, 5, 4))).flatten(1)
        F.cross_entropy(layers[2](out), torch.tensor([0, 1, 2, 2])).backward()
    assert [f.shape for f in layers[0].weight.kfac] == [(6, 6), (4, 4)]
    assert [f.shape for f in layers[1].weight.kflr] == [(5, 1, 1), (5, 2, 2)]


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (
            lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 2.0, 0.5]).double()),
            torch.tensor([0, 1, 2, 1]),
        ),
        (F.mse_loss, torch.randn(4, 3, 2).double()),
        (F.binary_cross_entropy_with_logits, torch.rand(4, 3, 2).double()),
    ],
    ids=["weighted_ce", "mse_3d", "bce_3d"],
)
def test_losses(loss, y):
    """The GGN of a linear model is its Hessian."""
    model, X = nn.Linear(5, 3 if y.ndim == 1 else 6).double(), torch.randn(4, 5).double()

    def forward(w):
        out = F.linear(X, w, model.bias)
        return loss(out if y.ndim == 1 else out.reshape(4, 3, 2), y)

    H = torch.autograd.functional.hessian(forward, model.weight.detach())
    expected = H.reshape(model.weight.numel(), -1).diagonal().reshape(model.weight.shape)
    with curvature(DiagGGNExact()):
        out = model(X)
        loss(out if y.ndim == 1 else out.reshape(4, 3, 2), y).backward()
    assert_close(model.weight.diag_ggn_exact, expected)

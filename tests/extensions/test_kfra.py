"""KFRA against its recursion written out layer by layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ROW, assert_close, compute

from lightning_curv import curvature
from lightning_curv.extensions import KFLR, KFRA


def averaged(layers, X, H, upto):
    """H̄ at the output of layer `upto`, from H̄ at the network's output: mean of JᵀH̄J per layer, J in full."""
    inputs = [X]
    for layer in layers:
        inputs.append(layer(inputs[-1]).detach())
    for k in range(len(layers) - 1, upto, -1):
        total = torch.zeros(inputs[k][0].numel(), inputs[k][0].numel(), dtype=X.dtype)
        for x in inputs[k]:
            J = torch.autograd.functional.jacobian(lambda x, k=k: layers[k](x[None])[0], x)
            J = J.reshape(-1, x.numel())
            total += J.T @ H @ J
        H = total / len(X)
    return H


def loss_hessian(output):
    """Sum over the samples of the Hessian of the mean cross-entropy."""
    p = output.detach().softmax(1)
    return torch.stack([(q.diag() - q.outer(q)) / len(p) for q in p]).sum(0)


class OnColumns(nn.Module):
    """The samples are the columns of a product of matrices."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return (self.weight @ x.mT).mT


CHAINS = {
    "mlp": (
        lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)],
        (6, 4),
    ),
    "cnn": (
        lambda: [
            nn.Conv2d(2, 3, 2),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 2, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(8, 3),
        ],
        (4, 2, 5, 5),
    ),
    "wide": (
        lambda: [nn.Linear(3, 7), nn.Dropout(0.0), nn.Linear(7, 7), nn.Sigmoid(), nn.Linear(7, 3)],
        (2, 3),
    ),
    "samples_as_many_as_features": (
        lambda: [nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)],
        (5, 5),
    ),
    "samples_on_columns": (
        lambda: [nn.Linear(4, 3), nn.Tanh(), OnColumns(3, 4), nn.ReLU(), nn.Linear(4, 3)],
        (5, 4),
    ),
    "functions_of_every_entry": (
        lambda: [
            nn.Linear(4, 3),
            nn.ELU(),
            nn.GELU(),
            nn.Hardtanh(),
            nn.LeakyReLU(),
            nn.LogSigmoid(),
            nn.Mish(),
            nn.Softplus(),
            nn.Linear(3, 3),
        ],
        (5, 4),
    ),
}


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CHAINS)
def test_factors_equal_the_recursion(name, weight_sharing):
    torch.manual_seed(0)
    make, shape = CHAINS[name]
    layers, X, y = (
        [layer.double() for layer in make()],
        torch.randn(shape).double(),
        torch.randint(3, (shape[0],)),
    )
    model = nn.Sequential(*layers)
    with curvature(KFRA(weight_sharing), KFLR(weight_sharing)):
        F.cross_entropy(model(X), y).backward()
    H = loss_hessian(model(X))
    for k, layer in enumerate(layers):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        out = layers[0](X) if k == 0 else model[: k + 1](X)
        o, s = out.shape[1], out[0].numel() // out.shape[1]
        bar = averaged(layers, X, H, k).reshape(o, s, o, s)
        B = torch.einsum("osps->op", bar) if weight_sharing == "expand" else bar.sum((1, 3))
        assert_close(layer.weight.kfra[0], B, label=f"{k}.weight")
        assert_close(layer.bias.kfra[0], B, label=f"{k}.bias")
        assert_close(layer.weight.kfra[1], layer.weight.kflr[1], label=f"{k}.weight")


class Product(nn.Module):
    """x W."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.weight


def test_forms_of_other_parameters():
    """Groups, a transposed weight and a diagonal, from the averages written out."""
    torch.manual_seed(0)
    conv, norm, last = nn.Conv1d(2, 4, 2, groups=2), nn.LayerNorm(4), Product()
    layers = [conv, nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), norm, nn.Sigmoid(), last]
    layers = [layer.double() for layer in layers]
    model, X, y = nn.Sequential(*layers), torch.randn(6, 2, 3).double(), torch.randint(3, (6,))
    with curvature(KFRA()):
        F.cross_entropy(model(X), y).backward()
    H = loss_hessian(model(X))
    bars = [averaged(layers, X, H, k) for k in range(len(layers))]
    assert_close(last.weight.kfra[1], H, label="product")
    normed = F.layer_norm(model[:4](X), (4,))
    assert_close(norm.weight.kfra[0], bars[4].diagonal() * normed.square().mean(0), label="norm")
    grouped = torch.einsum("qosqps->qop", bars[0].reshape(2, 2, 2, 2, 2, 2))
    assert_close(conv.weight.kfra[0], grouped, label="groups")
    assert conv.weight.kfra[1].shape == (2, 2, 2)


def test_an_empty_batch_has_no_curvature():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with curvature(KFRA()):
        F.cross_entropy(
            model(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), reduction="sum"
        ).backward()
    for p in model.parameters():
        assert not any(factor.any() for factor in p.kfra)
    assert [factor.shape for factor in model[0].weight.kfra] == [(4, 4), (3, 3)]


def test_factors_share_no_memory():
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, KFRA())
    factors = [factor for p in problem.parameters().values() for factor in p.kfra]
    assert len({factor.data_ptr() for factor in factors}) == len(factors)


def test_a_layer_that_starts_to_mix_samples_is_found():
    model, X, y = (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        torch.randn(5, 3),
        torch.ones(5).long(),
    )
    model.eval()
    with curvature(KFRA()):
        F.cross_entropy(model(X), y).backward()
    model.train()
    with pytest.raises(NotImplementedError, match="an op mixes samples"), curvature(KFRA()):
        F.cross_entropy(model(X), y).backward()


def test_equals_kflr_for_one_datum():
    problem = ROW["one_datum"].make()
    compute(problem, KFRA(), KFLR())
    for key, p in problem.parameters().items():
        for a, b in zip(p.kfra, p.kflr):
            assert_close(a, b, label=key)


def test_branches_are_named():
    problem = ROW["residual_functional"].make()
    with pytest.raises(
        NotImplementedError,
        match="KFRA expects a chain of layers, found a branch at `AddBackward0`",
    ):
        compute(problem, KFRA())


def test_a_parameter_used_twice_is_named():
    problem = ROW["layer_reused"].make()
    with pytest.raises(
        NotImplementedError,
        match=r"KFRA expects every parameter to be used once, found .* used again",
    ):
        compute(problem, KFRA())


class Rounded(nn.Module):
    def forward(self, x):
        return x.float().double()


def test_casts_in_the_chain():
    torch.manual_seed(0)
    first, last = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    found = []
    for between in (nn.Sequential(nn.Tanh(), Rounded()), nn.Tanh()):
        with curvature(KFRA()):
            F.cross_entropy(nn.Sequential(first, between, last)(x), y).backward()
        found.append([factor.clone() for p in (first.weight, last.weight) for factor in p.kfra])
    for rounded, exact in zip(*found):
        torch.testing.assert_close(rounded, exact, rtol=1e-5, atol=1e-6)


def test_complex_numbers_are_refused():
    layer = nn.Linear(4, 4)
    with curvature(KFRA()):
        loss = F.mse_loss(
            torch.fft.irfft(torch.fft.rfft(layer(torch.rand(5, 4)))), torch.rand(5, 4)
        )
        with pytest.raises(
            NotImplementedError, match="KFRA expects real numbers, found complex ones below `FftC2R"
        ):
            loss.backward()


def test_several_losses_are_refused():
    model = nn.Linear(3, 2)
    with curvature(KFRA()):
        out = model(torch.ones(4, 3))
        loss = F.mse_loss(out, torch.zeros(4, 2)) + F.mse_loss(out, torch.ones(4, 2))
        with pytest.raises(
            NotImplementedError, match="KFRA expects one loss of one output, found losses of 2"
        ):
            loss.backward()

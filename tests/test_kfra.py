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


CHAINS = {
    "mlp": (lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)], (6, 4)),
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
}


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CHAINS)
def test_factors_equal_the_recursion(name, weight_sharing):
    torch.manual_seed(0)
    make, shape = CHAINS[name]
    layers, X, y = [layer.double() for layer in make()], torch.randn(shape).double(), torch.randint(3, (shape[0],))
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


def test_equals_kflr_for_one_datum():
    problem = ROW["one_datum"].make()
    compute(problem, KFRA(), KFLR())
    for key, p in problem.parameters().items():
        for a, b in zip(p.kfra, p.kflr):
            assert_close(a, b, label=key)


def test_branches_are_named():
    problem = ROW["residual_functional"].make()
    with pytest.raises(NotImplementedError, match="KFRA expects a chain of layers, found a branch at `AddBackward0`"):
        compute(problem, KFRA())


def test_several_losses_are_refused():
    model = nn.Linear(3, 2)
    with curvature(KFRA()):
        out = model(torch.ones(4, 3))
        loss = F.mse_loss(out, torch.zeros(4, 2)) + F.mse_loss(out, torch.ones(4, 2))
        with pytest.raises(NotImplementedError, match="KFRA expects one loss, found 2"):
            loss.backward()

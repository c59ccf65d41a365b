"""`KFACOptimizer` and `DiagGGNOptimizer` train with any loss by default."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from refused_ops import Once
from torch import nn
from torch.distributions import Normal, kl_divergence
from zoo import assert_close

from lightning_curv import DiagGGNExact, curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers import DiagGGNOptimizer, KFACOptimizer

N = 32  # samples


def mlp(outputs):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))


def data():
    X = torch.randn(N, 4)
    return X, torch.stack([X[:, 0].sin() + X[:, 1], X[:, 2] * 0.5, X[:, 3].abs()], 1)


def cross_entropy(f, y):
    return -f.log_softmax(1).gather(1, y.argmax(1)[:, None]).mean()


def smoothed(f, y):
    return 0.9 * cross_entropy(f, y) - 0.1 * f.log_softmax(1).mean()


def focal(f, y):
    entropy = F.cross_entropy(f, y.argmax(1), reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def gaussian(f, y):
    return -Normal(f[:, :3], F.softplus(f[:, 3:]) + 0.1).log_prob(y).mean()


def divergence(f, y):
    posterior = Normal(f[:, :3], (f[:, 3:] / 2).clamp(-3, 3).exp())
    return (
        F.mse_loss(f[:, :3], y)
        + 0.1 * kl_divergence(posterior, Normal(torch.zeros(3), torch.ones(3))).sum(1).mean()
    )


def dice(f, y):
    p, target = f.sigmoid(), (y > 0).float()
    return (1 - 2 * (p * target).sum(1) / (p.sum(1) + target.sum(1) + 1)).mean()


def contrastive(f, y):
    z, near = F.normalize(f, dim=1), F.normalize(y, dim=1)
    similar = z @ near.T / 0.2
    return -(similar.log_softmax(0) + similar.log_softmax(1)).diagonal().mean()


def quantile(f, y):
    return torch.max(0.7 * (y - f), -0.3 * (y - f)).mean()


def once(f, y):
    return Once.apply(f - y) / f.numel()


CURVED = {
    "cross_entropy": (cross_entropy, 3),
    "smoothed": (smoothed, 3),
    "focal": (focal, 3),
    "gaussian": (gaussian, 6),
    "divergence": (divergence, 6),
    "dice": (dice, 3),
    "contrastive": (contrastive, 3),
}
OTHERS = {
    "quantile": (quantile, 3, "the curvature of the loss is zero"),
    "l1": (F.l1_loss, 3, "the curvature of the loss is zero"),
    "once": (once, 3, "the loss has no second derivative"),
}
OPTIMIZERS = {
    "kfac": KFACOptimizer,
    "kfac_exact": lambda params: KFACOptimizer(params, curvature="exact"),
    "kfac_rate": lambda params: KFACOptimizer(params, lr=0.03, damping=0.01),
    "ekfac": lambda params: KFACOptimizer(params, eigen=True),
    "diag_ggn": DiagGGNOptimizer,
    "diag_ggn_exact": lambda params: DiagGGNOptimizer(params, curvature="exact"),
    "diag_ggn_auto": lambda params: DiagGGNOptimizer(params, lr="auto", damping="auto"),
}


def trained(make, loss, outputs, steps=30):
    """The optimizer, and the losses of the first and after the last step."""
    torch.manual_seed(0)
    model, (X, y) = mlp(outputs), data()
    optimizer, losses = make(model.parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            value = loss(model(X), y)
            value.backward()
        optimizer.step()
        losses.append(value.item())
    return optimizer, losses[0], loss(model(X), y).item()


RUNS = [
    (k, n)
    for k in OPTIMIZERS
    for n in CURVED
    if not (k.startswith("diag_ggn") and n == "contrastive")
]


@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_optimizers_minimize_any_loss(kind, name):
    loss, outputs = CURVED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, first, last = trained(OPTIMIZERS[kind], loss, outputs)
    assert last < first - 0.05 * abs(first)
    assert {*optimizer.summary().values()} == {"curvature"}


def test_a_diagonal_needs_samples_that_are_apart():
    with pytest.raises(UnsupportedError, match="samples that do not influence each other"):
        trained(DiagGGNOptimizer, *CURVED["contrastive"], steps=1)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_take_the_empirical_fisher_where_there_is_no_curvature(kind, name):
    loss, outputs, reason = OTHERS[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer, first, last = trained(OPTIMIZERS[kind], loss, outputs)
    assert last < 0.7 * first
    assert {*optimizer.summary().values()} == {"curvature"}
    told = [str(w.message) for w in caught if "empirical Fisher" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]


@pytest.mark.parametrize("loss", [F.l1_loss, quantile, once])
def test_the_empirical_fisher_is_that_of_the_samples(loss):
    """Divided by the loss, which gives it the unit of a curvature."""
    torch.manual_seed(0)
    model, (X, y) = mlp(3).double(), [t.double() for t in data()]
    optimizer = DiagGGNOptimizer(model.parameters())
    with (
        pytest.warns(RuntimeWarning, match="empirical Fisher"),
        curvature(*optimizer.required_extensions()),
    ):
        loss(model(X), y).backward()
    for name, p in model.named_parameters():
        rows = []
        for n in range(N):
            (g,) = torch.autograd.grad(loss(model(X[n : n + 1]), y[n : n + 1]), p)
            rows.append(g.square())
        assert_close(
            p.diag_ggn_mc, torch.stack(rows).mean(0) / loss(model(X), y).detach(), label=name
        )


def test_known_losses_draw_what_they_drew():
    """The columns are those of the same extension without a way out."""
    from lightning_curv.extensions import DiagGGNMC

    torch.manual_seed(0)
    model, (X, y) = mlp(3), data()
    twin = copy.deepcopy(model)
    with curvature(
        *DiagGGNOptimizer(model.parameters()).required_extensions(), generator=torch.Generator()
    ):
        F.cross_entropy(model(X), y.argmax(1)).backward()
    with curvature(DiagGGNMC(), generator=torch.Generator()):
        F.cross_entropy(twin(X), y.argmax(1)).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.diag_ggn_mc, q.diag_ggn_mc)


def test_a_loss_that_may_be_negative_is_a_likelihood_as_it_is():
    torch.manual_seed(0)
    model, (X, y) = mlp(3).double(), [t.double() for t in data()]
    optimizer = DiagGGNOptimizer(model.parameters())
    with (
        pytest.warns(RuntimeWarning, match="empirical Fisher"),
        curvature(*optimizer.required_extensions()),
    ):
        (quantile(model(X), y) - 10).backward()
    row = [
        torch.autograd.grad(quantile(model(x[None]), z[None]), model[2].bias)[0].square()
        for x, z in zip(X, y)
    ]
    assert_close(model[2].bias.diag_ggn_mc, torch.stack(row).mean(0))


def test_a_loss_of_differences_between_samples_is_curved():
    """Nothing moves if all samples move alike."""
    torch.manual_seed(0)
    layer, X = nn.Linear(4, 3), torch.randn(N, 4)
    optimizer = KFACOptimizer(layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with curvature(*optimizer.required_extensions()):
            f = layer(X)
            (f - f.mean(0)).pow(4).mean().backward()
    optimizer.step()
    assert layer.weight.isfinite().all()


def test_confident_and_diverging_networks_go_on():
    """Where all but rounding cancels, and where nothing is finite, samples are still told apart."""
    torch.manual_seed(0)
    layer, X = nn.Linear(4, 3), torch.randn(N, 4)
    labels = layer(X).argmax(1)
    for scale in (1.0, 5.0, 10.0, 15.0, 20.0, 40.0, 100.0, 1e3, 1e6, torch.inf):
        with curvature(*DiagGGNOptimizer(layer.parameters()).required_extensions()):
            f = scale * layer(X)
            entropy = F.cross_entropy(f, labels, reduction="none")
            (
                (1 - torch.exp(-entropy)) ** 2 * entropy - f.log_softmax(1)[torch.arange(N), labels]
            ).mean().backward()
        assert layer.weight.diag_ggn_mc.isfinite().all() == (scale < torch.inf)


def policy_gradient(net, x):
    """Advantages of both signs times log-probabilities."""
    losses = F.cross_entropy(net(x), torch.arange(len(x)) % 3, reduction="none")
    return (losses * torch.linspace(-1, 1, len(x))).mean()


def test_negative_weights_are_refused_with_two_ways_out():
    net, x = nn.Linear(4, 3), torch.randn(9, 4)
    optimizer = KFACOptimizer(net.parameters())
    refused = pytest.raises(UnsupportedError, match=r"negative one.*empirical.*output=")
    with refused, curvature(*optimizer.required_extensions()):
        policy_gradient(net, x).backward()


def test_outputs_that_are_named_train_with_negative_weights():
    net, x = nn.Linear(4, 3), torch.randn(9, 4)
    optimizer = KFACOptimizer(net.parameters())
    before = policy_gradient(net, x).item()
    for _ in range(3):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions(), output=net):
            policy_gradient(net, x).backward()
        optimizer.step()
    assert policy_gradient(net, x).item() < before


def test_empirical_curvature_needs_no_sign_of_the_weights():
    """The loss is negative, and may fall all the same."""
    net, x = nn.Linear(4, 3), torch.randn(9, 4)
    optimizer = KFACOptimizer(net.parameters(), curvature="empirical")
    before = policy_gradient(net, x).item()
    assert before < 0
    with curvature(*optimizer.required_extensions()):
        policy_gradient(net, x).backward()
    optimizer.step()
    assert optimizer.last_step["predicted"] < 0
    assert policy_gradient(net, x).item() < before


def test_terms_of_negative_weight_have_no_curvature():
    net, x = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    weights = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    targets = torch.arange(6) % 3

    def diagonal(weights):
        with curvature(DiagGGNExact(), output=net):
            losses = F.cross_entropy(net(x), targets, reduction="none")
            (losses * weights).mean().backward()
        return net.weight.diag_ggn_exact

    torch.testing.assert_close(diagonal(weights), diagonal(weights.clamp(min=0)))

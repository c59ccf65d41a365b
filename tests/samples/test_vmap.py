"""Models under `torch.func`: parameters inside of `vmap` and `functional_call` have exact per-sample gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from lightning_curv import curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import GGNMP, HMP, PCHMP, BatchGrad

N, D, C = 4, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")


def draw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).double()
    return model, torch.randn(N, D, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def by_hand(z, y):
    return -z.log_softmax(-1).gather(-1, y[:, None]).sum()


def known(z, y):
    return F.cross_entropy(z, y, reduction="sum")


def of_one(model, x, y):
    """The loss of a sample."""
    return known(functional_call(model, dict(model.named_parameters()), (x[None],)), y[None])


def of_one_by_hand(model, x, y):
    return by_hand(model(x[None]), y[None])


ORDER = torch.tensor([2, 0, 3, 1])


def numbers_choose_rows():
    """Whether this torch lets a number that is mapped choose a row; torch 2.6 reads it instead."""
    try:
        vmap(lambda i: ORDER[i])(ORDER)
    except RuntimeError:
        return False
    return True


FORMS: dict[str, Callable] = {
    "model": lambda m, x, y: known(vmap(m)(x), y),
    "model, by hand": lambda m, x, y: by_hand(vmap(m)(x), y),
    "model of moved rows": lambda m, x, y: known(vmap(m)(x[ORDER]), y[ORDER]),
    "model of moved rows, by hand": lambda m, x, y: by_hand(vmap(m)(x[ORDER]), y[ORDER]),
    "moved outputs": lambda m, x, y: known(vmap(m)(x)[ORDER], y[ORDER]),
    "moved outputs, by hand": lambda m, x, y: by_hand(vmap(m)(x)[ORDER], y[ORDER]),
    "rows by number": lambda m, x, y: by_hand(vmap(lambda i: m(x[i]))(ORDER), y[ORDER]),
    "loss": lambda m, x, y: vmap(lambda a, b: of_one(m, a, b))(x, y).sum(),
    "loss, by hand": lambda m, x, y: vmap(lambda a, b: of_one_by_hand(m, a, b))(x, y).sum(),
    "loss of moved rows": lambda m, x, y: vmap(lambda a, b: of_one(m, a, b))(
        x[ORDER], y[ORDER]
    ).sum(),
    "loss of moved rows, by hand": lambda m, x, y: vmap(lambda a, b: of_one_by_hand(m, a, b))(
        x[ORDER], y[ORDER]
    ).sum(),
    "loss by number": lambda m, x, y: vmap(lambda i: of_one(m, x[i], y[i]))(ORDER).sum(),
    "functional call": lambda m, x, y: known(
        functional_call(m, dict(m.named_parameters()), (x,)), y
    ),
    "second axis": lambda m, x, y: known(vmap(m, in_dims=1)(x.T), y),
    "twice": lambda m, x, y: by_hand(vmap(vmap(m))(x[:, None])[:, 0], y),
}


@pytest.mark.parametrize("size", [N, None])
@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_each_row_of_the_batch(name, size):
    if name.endswith("by number") and not numbers_choose_rows():
        pytest.skip("this torch does not map the numbers of rows")
    model, x, y = draw()
    with curvature(BatchGrad(), batch_size=size):
        FORMS[name](model, x, y).backward()
    for p in model.parameters():
        alone = [
            torch.autograd.grad(known(model(x[n : n + 1]), y[n : n + 1]), p)[0] for n in range(N)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))


class Ensemble(nn.Module):
    """Several models, and one call that is mapped over their parameters."""

    def __init__(self, members, features):
        super().__init__()
        torch.manual_seed(1)
        stacked = {"weight": (C, features), "bias": (C,), "last.weight": (C, C)}
        self.stacked = nn.ParameterDict(
            {
                name.replace(".", "_"): torch.randn(members, *shape).double()
                for name, shape in stacked.items()
            }
        )

    def forward(self, x, call):
        return vmap(call, in_dims=(0, None))(dict(self.stacked), x)


CALLS: dict[str, Callable] = {
    "linear": lambda p, x: F.linear(x, p["weight"], p["bias"]).tanh() @ p["last_weight"],
    "product": lambda p, x: (x @ p["weight"].T).tanh() @ p["last_weight"],
    "scaled": lambda p, x: (x * p["weight"].sum(0)).tanh() @ p["weight"].T + p["bias"],
}
MIXING_CALLS: dict[str, Callable] = {
    "rows": lambda p, x: CALLS["linear"](p, x - x.mean(0)),
    "hidden": lambda p, x: CALLS["linear"](p, x).softmax(0),
    "from the left": lambda p, x: p["weight"][:, :1].expand(-1, len(x)) @ x,
}


@pytest.mark.parametrize("size", [N, None])
@pytest.mark.parametrize("members", [2, N])
@pytest.mark.parametrize("name", CALLS)
def test_a_model_may_be_mapped_over_its_parameters(name, members, size):
    _, x, y = draw()
    model = Ensemble(members, x.shape[1])
    with curvature(BatchGrad(), batch_size=size):
        known(model(x, CALLS[name]).mean(0), y).backward()
    for p in model.parameters():
        if p.grad is None:
            continue
        alone = [
            torch.autograd.grad(known(model(x[n : n + 1], CALLS[name]).mean(0), y[n : n + 1]), p)[0]
            for n in range(N)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))


@pytest.mark.parametrize("members", [2, N])
@pytest.mark.parametrize("name", MIXING_CALLS)
def test_samples_that_mix_in_a_model_that_is_mapped_over_its_parameters_are_refused(name, members):
    _, x, _ = draw()
    model = Ensemble(members, x.shape[1])
    with pytest.raises(NotImplementedError, match="sample"), curvature(BatchGrad(), batch_size=N):
        model(x, MIXING_CALLS[name]).square().sum().backward()


MIXING: dict[str, Callable] = {
    "outputs": lambda m, x, y: by_hand((z := vmap(m)(x)) - z.mean(0), y),
    "hidden": lambda m, x, y: by_hand(vmap(m[2])((h := vmap(m[0])(x)) - h.mean(0)), y),
    "raw mean": lambda m, x, y: by_hand(vmap(lambda row: m(row - x.mean(0)))(x), y),
    "raw rows": lambda m, x, y: vmap(lambda row: (m(row) @ m(x).T).logsumexp(0))(x).sum(),
    "batch of raw rows": lambda m, x, y: vmap(
        lambda row: (m[0](row) @ x[:, :1].T.expand(6, -1)).logsumexp(0)
    )(x).sum(),
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_refused(name):
    model, x, y = draw()
    with pytest.raises(NotImplementedError, match="sample"), curvature(BatchGrad(), batch_size=N):
        MIXING[name](model, x, y).backward()


def test_rows_in_an_order_that_is_not_known_are_refused():
    model, x, y = draw()
    with pytest.raises(NotImplementedError, match="sample"), curvature(BatchGrad(), batch_size=N):
        by_hand(vmap(lambda i: model(x.index_select(0, i[None])[0]))(ORDER), y[ORDER]).backward()


TRANSFORMED = {
    "vmap_jacrev": lambda net, X: torch.func.vmap(torch.func.jacrev(lambda x: net(x)[0]))(X),
    "jvp": lambda net, X: torch.func.jvp(net, (X,), (torch.ones_like(X),))[1],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_hessian_products_need_no_record(name):
    """Nothing is recorded of a forward pass that runs inside of transforms only."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    X = torch.randn(4, 2).double()

    def loss():
        return TRANSFORMED[name](net, X).square().mean()

    with curvature(HMP()):
        loss().backward()
    params = [*net.parameters()]
    gradients = torch.autograd.grad(loss(), params, create_graph=True)
    for p, g in zip(params, gradients):
        rows = [torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in g.flatten()]
        units = torch.eye(p.numel()).double().view(-1, *p.shape)
        torch.testing.assert_close(p.hmp(units), torch.stack(rows))
    for extension in (BatchGrad(), GGNMP(), PCHMP()):
        with (
            pytest.raises(UnsupportedError, match=r"no record of any.*`torch.func`.*use `HMP`"),
            curvature(extension),
        ):
            loss().backward()

"""Numbers of private steps: N is in no rounding, and nothing under- or overflows."""

import pytest
import torch
import torch.nn.functional as F
from private_sums import change, clipped_sum
from torch import nn

from lightning_curv import curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers import DPSGD
from lightning_curv.optimizers.privacy.clipped_sum import ClippedSum
from lightning_curv.optimizers.privacy.clipping import FlatClipping
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.safe_norms import product_norms, row_norms
from lightning_curv.terms.term import Term

# --- N is in nobody's rounding ----------------------------------------------------------------------------------------


def one_hot(h, y):
    return F.one_hot(y, h.shape[1]).to(h.dtype)


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "smoothed": lambda h, y: F.cross_entropy(h, y, label_smoothing=0.1),
    "probabilities": lambda h, y: F.cross_entropy(h, one_hot(h, y)),
    "nll": lambda h, y: F.nll_loss(h.log_softmax(1), y),
    "mse": lambda h, y: F.mse_loss(h, one_hot(h, y)),
    "l1": lambda h, y: F.l1_loss(h, one_hot(h, y)),
    "smooth_l1": lambda h, y: F.smooth_l1_loss(h, one_hot(h, y)),
    "huber": lambda h, y: F.huber_loss(h, one_hot(h, y)),
    "binary": lambda h, y: F.binary_cross_entropy_with_logits(h, one_hot(h, y)),
    "probability": lambda h, y: F.binary_cross_entropy(h.sigmoid(), one_hot(h, y)),
    "poisson": lambda h, y: F.poisson_nll_loss(h, y[:, None].to(h.dtype).expand_as(h)),
    "kl_div": lambda h, y: F.kl_div(h.log_softmax(1), one_hot(h, y), reduction="batchmean"),
    "gaussian": lambda h, y: F.gaussian_nll_loss(h, one_hot(h, y), torch.ones_like(h).detach()),
    "mean": lambda h, y: (h**2).sum(1).mean(),
    "mean of means": lambda h, y: (h**2).mean(1).mean(),
    "all entries": lambda h, y: (h**2).mean(),
    "two axes": lambda h, y: (h**2).mean((0, 1)),
    "quotient": lambda h, y: (h**2).sum() / len(h),
    "inverse": lambda h, y: (h**2).sum() * (1 / len(h)),
    "factor": lambda h, y: 0.1 * F.cross_entropy(h, y) + 0.3 * F.mse_loss(h, one_hot(h, y)),
    "weights": lambda h, y: ((y + 0.7) * F.cross_entropy(h, y, reduction="none")).mean(),
    "accumulated": lambda h, y: F.cross_entropy(h, y) / 3,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_what_arrives_at_a_sample_does_not_depend_on_the_number_of_samples(name, dtype):
    torch.manual_seed(0)
    model = nn.Linear(5, 4).to(dtype)
    X, y = torch.randn(50, 5).to(dtype), torch.randint(4, (50,))
    arrived = []

    class Receiver(ClippedSum):
        def receive(self, jacobian):
            if jacobian.parameter is model.bias:
                arrived.append(jacobian.terms[0].g[0])

    with torch.no_grad():
        H = model(X)
    for n in (49, 50, 7):
        optimizer = DPSGD(model.parameters(), expected_batch_size=1.0)
        receiver = Receiver(optimizer.statistics.parameters, optimizer.clipping, True)
        receiver.loss_scale = 1 / 3 if name == "accumulated" else 1.0
        with curvature(receiver, batch_size=n):
            h = model(X[:n])
            loss = LOSSES[name](
                h + (H[:n] - h).detach(), y[:n]
            )  # the same outputs, whatever the kernel does
            loss.backward()
    own = H.double().requires_grad_()
    for i in range(7):  # the gradient of a sample's own loss
        (expected,) = torch.autograd.grad(LOSSES[name](own[i : i + 1], y[i : i + 1]), own)
        scale = 3 if name == "accumulated" else 1
        torch.testing.assert_close(
            arrived[0][i].double(),
            scale * expected[i],
            rtol=4 * torch.finfo(dtype).eps,
            atol=4 * torch.finfo(dtype).eps,
        )
    # torch's exp of single floats is not that of a vector of them: the last entries of a batch have
    # another last digit
    rtol = (
        torch.finfo(dtype).eps
        if name in ("binary", "probability") and dtype == torch.float32
        else 0
    )
    torch.testing.assert_close(arrived[0], arrived[1][:49], rtol=rtol, atol=rtol)
    torch.testing.assert_close(arrived[0][:7], arrived[2], rtol=rtol, atol=rtol)


def test_half_precision_is_refused_where_the_division_cannot_be_seen():
    model, X = nn.Linear(5, 4).bfloat16(), torch.randn(6, 5).bfloat16()
    with pytest.raises(UnsupportedError, match="half precision need a loss that is a mean"):
        clipped_sum(model, lambda m, x: (m(x) ** 2).sum() * torch.full((), 0.17), [X], 1.0)
    clipped_sum(model, lambda m, x: (m(x) ** 2).sum(), [X], 1.0, loss_reduction="sum")


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_no_usual_mean_is_refused_in_half_precision(name, n):
    model, X, y = nn.Linear(5, 4).bfloat16(), torch.randn(n, 5).bfloat16(), torch.randint(4, (n,))
    assert clipped_sum(model, lambda m, x, y: LOSSES[name](m(x), y), [X, y], 1.0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [40, 400])
def test_sums_are_accumulated_in_float32_or_better(dtype, count):
    """Of terms in any type: a sum in the network's own half precision would lose the share of a sample."""
    torch.manual_seed(0)
    x, g = torch.randn(count, 6).to(dtype), torch.randn(1, count, 5).to(dtype)
    parameter = nn.Parameter(torch.zeros(5, 6, dtype=dtype))
    for C in (1.0, 1e-3):
        sums = []
        for n in (count, count - 1):
            total = ClippedSum([parameter], FlatClipping(C), True)
            total.begin(n)
            total.receive(Jacobian(parameter, [Term("o", "i", "oi", g[:, :n], x[:n])]))
            total.end()
            sums += total.totals()
        exact = torch.einsum("no,ni->noi", g[0].double(), x.double())
        exact *= (C / exact.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
        assert sums[0].dtype == torch.float32
        assert (sums[0].double() - exact.sum(0)).norm() <= 2**-20 * count * C
        assert (sums[0].double() - sums[1].double()).norm() <= C * (1 + 2**-20 * count)


@pytest.mark.parametrize("filling", [0.0, 1.0, 1e15, 1e19, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_do_not_depend_on_what_fills_up_a_sample(filling, dtype):
    """Positions that a shorter sample does not have hold numbers of others."""
    torch.manual_seed(0)
    x, g = torch.randn(4, 3, 8, dtype=dtype), torch.randn(1, 4, 3, 6, dtype=dtype)
    g[:, 1:, 2], x[1:, 2] = 0, filling
    jacobian = Jacobian(nn.Parameter(torch.zeros(6, 8)), [Term("so", "si", "oi", g, x)])
    assert not jacobian.forms_norms
    exact = (
        torch.einsum("nso,nsi->noi", g[0, :, :2].double(), x[:, :2].double()).flatten(1).norm(dim=1)
    )
    torch.testing.assert_close(
        jacobian.norms()[0, 1:], exact[1:], rtol=4 * torch.finfo(dtype).eps, atol=0
    )


def test_identical_samples_in_bfloat16_change_nothing():
    """What 1/N does in the rounding of one sample, it does in that of all: 4.4 C before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    X, y = torch.randn(1, 8).repeat(2000, 1), torch.zeros(2000, dtype=torch.long)
    X[-1] = 0

    def compute_loss(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    C = 1.02 * float(clipped_sum(model, compute_loss, [X[:1], y[:1]], 1e9).norm())
    assert change(model, compute_loss, [X, y], C) <= 1 + 1e-5


# --- numbers at the ends of their range -------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1.0, 0.1, 0.01, 1e-6])
@pytest.mark.parametrize(
    ("dtype", "large", "shift"),
    [(torch.float32, 1.8e19, -43.0), (torch.float32, 1e30, -80.0), (torch.float64, 1e200, -450.0)],
)
@pytest.mark.parametrize("positions", [(), (3,)], ids=["rows", "positions"])
def test_tiny_cotangents_times_huge_inputs(positions, dtype, large, shift, C):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Sigmoid(), nn.Linear(7, 3)).to(dtype)
    model[2].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.zero_()[:, 1] = 1.0
        model[0].bias.zero_()
    X, y = torch.randn(64, *positions, 9, dtype=dtype), torch.zeros(64, dtype=torch.long)
    X[-1] = 0
    X[-1, ..., 0], X[-1, ..., 1] = large, shift

    def compute_loss(model, x, y):
        h = model(x)
        return F.cross_entropy(h.sum(1) if positions else h, y)

    assert change(model, compute_loss, [X, y], C) <= 1 + 64 * 2.0**-20


def test_a_norm_that_is_no_number_hides_no_factor_that_is_too_large():
    nan = float("nan")
    for g, x, expected in (
        ([1.0, nan, 2.0], [3.0, 1.0, 4.0], [3.0, nan, 8.0]),
        ([nan, 1e30, 2.0, 1e30], [1.0, 2.0, 3.0, 0.0], [nan, float("inf"), 6.0, 0.0]),
        ([], [], []),
    ):
        g, x, expected = (torch.tensor([v], dtype=torch.float64) for v in (g, x, expected))
        found = product_norms(g, x[0], torch.float32)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [64, 49 * 16, 12800, 1009])
def test_norms_of_float32_are_rounded_up_and_only_by_what_rounding_may_take(length):
    """Whatever library adds the squares up in which order, and at the ends of the range."""
    torch.manual_seed(0)
    scales = torch.tensor([0.0, 1e-44, 1e-30, 1e-22, 1e-12, 1.0, 1e12, 1e18, 1e20, 1e36])
    rows = (
        torch.randn(2**14 // length + 20, length) * scales.repeat(30)[: 2**14 // length + 20, None]
    )
    exact = rows.double().norm(dim=1)
    found = row_norms(rows, 1)
    assert found.dtype == torch.float64
    # The exact norm is one of float64 itself.
    assert (found >= exact * (1 - 1e-13)).all()
    assert (found <= exact * (1 + 2**-17)).all()
    rows[3, 5], rows[4, 0], rows[5, 0] = float("nan"), float("inf"), -float("inf")
    broken = row_norms(rows[None], 2)[0]
    assert broken[3].isnan()
    assert broken[4] == broken[5] == float("inf")
    others = torch.arange(len(rows)) > 5
    torch.testing.assert_close(broken[others], found[others], rtol=0, atol=0)


@pytest.mark.parametrize("letters", [("o", "i", "oi"), ("so", "si", "oi"), ("os", "si", "oi")])
@pytest.mark.parametrize("size", [3, 70], ids=["small", "large"])
def test_weighted_sums_leave_their_factors_alone(letters, size):
    """However the product is made: large ones by oneDNN, of a copy with the weights in it."""
    torch.manual_seed(0)
    out, inp, par = letters
    sizes = {"s": 4, "o": size, "i": size + 1}
    g = torch.randn(1, size, *map(sizes.get, out))
    x, weights = torch.randn(size, *map(sizes.get, inp)), torch.rand(size, dtype=torch.float64)
    before = g.clone(), x.clone(), weights.clone()
    found = Term(out, inp, par, g, x).weighted_total(weights)
    exact = torch.einsum(f"n,n{out},n{inp}->{par}", weights, g[0].double(), x.double())
    torch.testing.assert_close(found.double().reshape(exact.shape), exact, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, before, (g, x, weights)))


# --- several rows of a sample -----------------------------------------------------------------------------------------

VIEWS = {
    "view after view": lambda x, y: (torch.cat([x, 0.9 * x]), y.repeat(2)),
    "sample after sample": lambda x, y: (
        torch.stack([x, 0.9 * x], 1).flatten(0, 1),
        y.repeat_interleave(2),
    ),
    "copies": lambda x, y: (x.repeat_interleave(3, 0), y.repeat_interleave(3)),
    "copy after copy": lambda x, y: (x.repeat(3, 1), y.repeat(3)),
    "expanded": lambda x, y: (x.expand(3, *x.shape).flatten(0, 1), y.expand(3, len(y)).flatten()),
    "indexed": lambda x, y: (
        x[torch.arange(2 * len(x)) % len(x)],
        y[torch.arange(2 * len(y)) % len(y)],
    ),
}
HEADS = {
    "torch": F.cross_entropy,
    "sum": lambda h, y: F.cross_entropy(h, y, reduction="sum") / len(h),
    "own": lambda h, y: -h.log_softmax(1).gather(1, y[:, None]).mean(),
    "cubes": lambda h, y: (h**3).sum(1).mean(),
}


@pytest.mark.parametrize("network", ["linear", "deep"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("view", VIEWS)
def test_rows_of_a_sample_are_clipped_together_or_refused(view, head, network):
    """As two samples, a sample would count 2 C."""
    torch.manual_seed(0)
    layers = (
        [nn.Linear(4, 3, bias=False)]
        if network == "linear"
        else [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    )
    model = nn.Sequential(*layers).double()
    X, y = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    X[-1] = 100.0

    def compute_loss(model, x, y):
        rows, targets = VIEWS[view](x, y)
        return HEADS[head](model(rows), targets)

    for C in (1.0, 1e-3):
        try:
            found = change(model, compute_loss, [X, y], C)
        except UnsupportedError:
            continue
        assert found <= 1 + 1e-9

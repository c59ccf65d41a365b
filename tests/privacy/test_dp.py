"""The private step against naive loops: batches of one sample, plain autograd, float64."""

import copy
import math
import warnings

import hypothesis_networks as networks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zoo import NAMES, ROW, reference

from lightning_curv import BatchGrad, curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers import (
    DPSGD,
    AdaptiveClipping,
    DPAdam,
    DPOptimizer,
    PrivacyAccountant,
)
from lightning_curv.optimizers.privacy import clipped_sum as clipped_sums
from lightning_curv.optimizers.privacy.clipped_sum import ClippedSum
from lightning_curv.optimizers.privacy.clipping import Clipping, clipping_rule
from lightning_curv.samples import finder
from lightning_curv.terms import ghost_norms
from lightning_curv.terms.term import Term


def private(parameters, lr=1.0, **settings):
    """SGD with σ = 0 and B̄ = 1: `p.grad` is the clipped sum."""
    defaults = {"noise_multiplier": 0.0, "expected_batch_size": 1.0}
    return DPOptimizer(torch.optim.SGD(list(parameters), lr=lr), **{**defaults, **settings})


def backward(optimizer, compute_loss, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with curvature(*optimizer.extensions, **options):
            compute_loss().backward()


def clipped_sum(gradients, factor):
    """Σ_n factor(‖g_n‖) g_n from per-sample gradients by parameter name."""
    norms = sum(g.reshape(len(g), -1).square().sum(1) for g in gradients.values()).sqrt()
    return {
        name: torch.tensordot(factor(norms).to(g), g, 1) for name, g in gradients.items()
    }, norms


# --- the clipped sum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_clipped_sum_equals_brute_force(name):
    gradients = reference("grad_batch", name)
    _, norms = clipped_sum(gradients, torch.ones_like)
    C = float(norms.median())  # some samples are clipped, some are not
    expected, _ = clipped_sum(gradients, lambda norms: (C / norms).clamp(max=1))
    problem = ROW[name].make()
    optimizer = private(problem.parameters().values(), lr=0.0, clip_norm=C, loss_reduction="sum")
    backward(optimizer, problem.compute_loss)
    optimizer.step()
    rtol = 1e-9 if ROW[name].rtol <= 1e-6 else ROW[name].rtol
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, p in problem.parameters().items():
        torch.testing.assert_close(
            p.grad, expected[key], rtol=rtol, atol=rtol * 1e-3 * largest, check_dtype=False
        )


@pytest.mark.parametrize("name", NAMES)
def test_weighted_total_equals_the_weighted_sum_of_per_sample_gradients(name):
    from lightning_curv.extensions.base import Extension

    class Weighted(Extension):
        savefield = "weighted"

        def evaluate(self, jacobian):
            weights = torch.linspace(-1, 2, jacobian.samples, dtype=torch.float64)
            return jacobian.weighted_total(weights), torch.tensordot(
                weights, jacobian.per_sample()[0].double(), 1
            )

    problem = ROW[name].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with curvature(Weighted()):
            problem.compute_loss().backward()
    for p in problem.parameters().values():
        if hasattr(p, "weighted"):
            torch.testing.assert_close(*p.weighted, check_dtype=False, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(64, 96), (256, 64)),
        (lambda: nn.Linear(64, 96), (64, 8, 64)),
        (lambda: nn.Linear(64, 96), (16, 3, 5, 64)),
        (lambda: nn.Linear(4096, 1), (256, 4096)),
        (lambda: nn.Linear(4096, 512), (1, 4096)),
        (
            lambda: nn.Sequential(nn.Linear(64, 96), nn.Unflatten(1, (8, -1)), nn.Linear(96, 64)),
            (64, 8, 64),
        ),
        (lambda: nn.Conv1d(64, 96, 1), (64, 64, 8)),  # cotangents by columns already
    ],
)
def test_large_products_of_float32_equal_single_samples(make, shape):
    torch.manual_seed(0)
    model, X = make(), torch.randn(shape)
    exact = copy.deepcopy(model).double()
    gradients = {}
    for name, p in exact.named_parameters():
        losses = (exact(x[None]).sin().sum() for x in X.double())
        gradients[name] = torch.stack([torch.autograd.grad(loss, p)[0] for loss in losses])
    _, norms = clipped_sum(gradients, torch.ones_like)
    C = float(norms.median())
    expected, _ = clipped_sum(gradients, lambda norms: (C / norms).clamp(max=1))
    optimizer = private(model.parameters(), lr=0.0, clip_norm=C, loss_reduction="sum")
    with record():
        loss = model(X).sin().sum()
    for _ in range(2):  # nothing recorded is changed: the second pass adds the same
        with curvature(*optimizer.extensions, batch_size=len(X)):
            loss.backward(retain_graph=True)
    optimizer.step()
    for name, p in model.named_parameters():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(
            p.grad.double(), 2 * expected[name], rtol=1e-4, atol=1e-4 * largest
        )


# --- whole runs ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding tied to the output layer, one block used twice, a norm without bias, an unused layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.block = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        h = self.embedding(x)
        h = self.frozen(self.block(torch.tanh(self.block(h))))
        return self.norm(h).mean(1) @ self.embedding.weight.t()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Fallback(nn.Module):
    """An op without a rule."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        return self.head(torch.cdist(x.unsqueeze(1), self.w.t().unsqueeze(0)).squeeze(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=2, groups=2, padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 2, stride=2, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(64, 7),
    )


def tokens(n):
    return torch.randint(7, (n, 5))


def randn(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 7)),
        randn(3),
    ),
    "linear_4d": (
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 7)),
        randn(2, 2, 3),
    ),
    "cnn": (cnn, randn(2, 4, 4)),
    "tied": (Tied, tokens),
    "lstm": (Recurrent, randn(4, 3)),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(12, 7),
        ),
        randn(3, 4),
    ),
    "fallback": (Fallback, randn(3)),
}


def loop_of_single_samples(model, parts, optimizer, C, size):
    """The naive step: one backward pass per sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for X, y in parts:
        for i in range(len(X)):
            loss = F.cross_entropy(model(X[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            for t, g in zip(total, grads):
                t += min(1.0, C / float(norm)) * g
    for p, t in zip(parameters, total):
        p.grad = t / size
    optimizer.step()


@pytest.mark.parametrize("name", list(MODELS))
def test_run_equals_a_loop_of_single_samples(name):
    make, draw = MODELS[name]
    torch.manual_seed(3)
    model = make().double()
    naive = copy.deepcopy(model)
    C, size = 0.8, 6.0
    optimizer = DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.01),
        C,
        noise_multiplier=0.0,
        expected_batch_size=size,
    )
    reference = torch.optim.Adam(naive.parameters(), lr=0.01)
    sizes = [
        (3, 4),
        (0, 0),
        (1, 2),
        (5, 0),
        (2, 2, 3),
        (1,),
    ]  # accumulated parts, empty ones among them
    for step in range(30):
        parts = [(draw(n), torch.randint(7, (n,))) for n in sizes[step % len(sizes)]]
        optimizer.zero_grad()
        for X, y in parts:
            if len(X):
                backward(
                    optimizer, lambda X=X, y=y: F.cross_entropy(model(X), y), batch_size=len(X)
                )
        optimizer.step()
        loop_of_single_samples(naive, parts, reference, C, size)
    for p, q in zip(model.parameters(), naive.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


# --- sensitivity -----------------------------------------------------------------------------------------------------


def contribution(model, X, y, C, **settings):
    """Σ(S) over all parameters, flat."""
    model.zero_grad()
    optimizer = private(model.parameters(), lr=0.0, clip_norm=C, **settings)
    if len(X):
        backward(optimizer, lambda: F.cross_entropy(model(X), y), batch_size=len(X))
    optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


CLIPPINGS = ["flat", "per_layer", "automatic", "adaptive"]


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("name", list(MODELS))
def test_one_sample_changes_the_sum_by_no_more_than_the_norm(name, clipping):
    make, draw = MODELS[name]
    for seed in range(4):
        torch.manual_seed(seed)
        model, n, C = make().double(), int(torch.randint(1, 6, ())), float(torch.rand(()) + 0.1)
        X, y = draw(n + 1), torch.randint(7, (n + 1,))
        if X.is_floating_point():
            X[n] *= [1, 1e3, 1e8, 1e150][seed]
        with_x = contribution(model, X, y, C, clipping=clipping)
        without = contribution(model, X[:n], y[:n], C, clipping=clipping)
        assert with_x.isfinite().all()
        assert (with_x - without).norm() <= C * (1 + 1e-5)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    networks.problems(),
    st.sampled_from(CLIPPINGS),
    st.sampled_from([1.0, 1e3, 1e8, 1e30, math.nan, math.inf]),
    st.floats(0.01, 10.0),
)
def test_one_sample_changes_the_sum_of_any_network_by_no_more_than_the_norm(
    problem, clipping, scale, C
):
    X = problem.X.clone()
    if X.is_floating_point():
        X[-1] *= scale
    y = torch.randint(3, (len(X),), generator=torch.Generator().manual_seed(0))
    with_x = contribution(problem.model, X, y, C, clipping=clipping)
    without = contribution(problem.model, X[:-1], y[:-1], C, clipping=clipping)
    assert with_x.isfinite().all()
    assert (with_x - without).norm() <= C * (1 + 1e-5)


class Centred(nn.Module):
    """What positions have in common is subtracted: their contributions to the first gradient cancel."""

    def __init__(self, first):
        super().__init__()
        self.first, self.head = first, nn.Linear(64, 7, bias=False)
        self.register_buffer("place", torch.randn(16, 64))

    def forward(self, x):
        h = self.first(x)
        return self.head(((h - h.mean(1, keepdim=True)) * self.place[: x.shape[1]]).sum(1))


@pytest.mark.parametrize("C", [1e-10, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("positions", [2, 4, 16])
@pytest.mark.parametrize("size", ["tokens", 1.0, 1e2, 1e4, 1e8])
def test_rounding_of_what_cancels_breaks_no_bound(size, positions, C):
    """In float32, where a norm is of the size of the rounding errors of what it is computed from."""
    for seed in range(4):
        torch.manual_seed(seed)
        y = torch.randint(7, (4,))
        if size == "tokens":
            model, X = Centred(nn.Embedding(9, 64)), torch.randint(9, (4, positions))
            X[-1] = X[-1, 0]
        else:
            model, X = Centred(nn.Linear(64, 64, bias=False)), torch.randn(4, positions, 64)
            X[-1] = 0.1 * X[-1] + size
        with_x, without = (contribution(model, X[:n], y[:n], C) for n in (4, 3))
        assert with_x.isfinite().all()
        assert (with_x.double() - without.double()).norm() <= C * (1 + 1e-5)


class Kept(ClippedSum):
    """Keeps what it received."""

    def receive(self, jacobian):
        self.received = [*getattr(self, "received", []), jacobian]


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2.0**-20), (torch.float64, 2.0**-49)]
)
@pytest.mark.parametrize("C", [1e-4, 1.0])
@pytest.mark.parametrize("size", ["tokens", 1e2, 1e4, 1e8, 1e18])
def test_what_cancels_in_all_samples_breaks_no_bound(size, C, dtype, rounding):
    """A sum over all samples at once would round what each adds before it cancels: by 10⁻⁴ C in float32."""
    for seed in range(4):
        torch.manual_seed(seed)
        y, count = torch.randint(7, (12,)), 12
        if size == "tokens":
            model, X = Centred(nn.Embedding(9, 64)), torch.randint(9, (count, 1)).repeat(1, 16)
        else:
            model, X = (
                Centred(nn.Linear(64, 64, bias=False)),
                0.1 * torch.randn(count, 16, 64, dtype=dtype) + size,
            )
        X[0] = (
            torch.randint(9, (16,)) if size == "tokens" else torch.randn(16, 64)
        )  # first: all sums after it change
        model = model.to(dtype)
        kept = Kept([*model.parameters()], clipping_rule("flat", C), mean=True)
        with curvature(kept, batch_size=count):
            F.cross_entropy(model(X), y).backward()
        sums = []
        for first in (
            0,
            1,
        ):  # of the same cotangents, whose last digits may depend on the number of samples in torch
            summed = ClippedSum(kept.parameters, kept.clipping, mean=True)
            summed.begin(count - first)
            for jacobian in kept.received:
                summed.receive(jacobian[first:])
            summed.end()
            sums.append(torch.cat([total.flatten() for total in summed.totals()]).double())
        assert (sums[0] - sums[1]).norm() <= C * (1 + count * rounding)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "tied"]
)  # whose inputs are integers
def test_samples_that_are_not_finite_contribute_nothing_and_are_counted(name, clipping, bad):
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model, X, y = make().double(), draw(4), torch.randint(7, (4,))
    expected = contribution(model, X[[0, 2, 3]], y[[0, 2, 3]], 1.0, clipping=clipping)
    X[1].view(-1)[0] = bad
    finder.MEMORY.entries.clear()  # as in the first batch of a run
    optimizer = private(model.parameters(), lr=0.0, clipping=clipping)
    backward(optimizer, lambda: F.cross_entropy(model(X), y), batch_size=4)
    assert optimizer.statistics.discarded == 1
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("factor", [0.5, math.nan, math.inf, 1e-310])
def test_a_sample_counts_only_if_its_norm_and_its_factor_are_usual_numbers(factor, bad):
    """Whatever a rule says of it: of one sample among others, and of all that there are."""

    class Stubborn(Clipping):
        def factors(self, norms, parameters):
            factors = torch.full_like(norms, 0.5)
            factors[-1, one] = factor  # of one parameter, the other one has usual factors
            return factors

    for samples in ([0, 1, 2, 3], [1]):
        model, X, y = linear_problem()
        X, y, one = X[samples], y[samples], samples.index(1)
        optimizer = private(model.parameters(), lr=0.0, clipping=Stubborn(1.0))
        if bad is not None:
            X[one, 0] = bad
        finder.MEMORY.entries.clear()
        backward(optimizer, lambda: F.cross_entropy(model(X), y), batch_size=len(X))
        counts = bad is None and factor == 0.5
        assert optimizer.statistics.discarded == (0 if counts else 1)
        optimizer.step()
        others = [n for n in range(len(X)) if counts or n != one]
        for p in model.parameters():
            expected = torch.zeros_like(p)
            if others:
                loss = F.cross_entropy(model(X[others]), y[others], reduction="sum")
                expected = 0.5 * torch.autograd.grad(loss, p)[0]
            torch.testing.assert_close(p.grad, expected)


def tokens_of_classes(lengths):
    """Scores of five positions, and targets of which the first ones of each sample are not ignored."""
    torch.manual_seed(3)
    targets = torch.randint(4, (len(lengths), 5))
    targets[torch.arange(5) >= torch.tensor(lengths)[:, None]] = -100
    return nn.Linear(3, 4).double(), torch.randn(len(lengths), 5, 3, dtype=torch.float64), targets


WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
MEANS_OVER_CLASSES = {
    "last axis": lambda scores, y, **how: F.cross_entropy(scores.mT, y, **how),
    "rows": lambda scores, y, **how: F.cross_entropy(scores.flatten(0, 1), y.flatten(), **how),
    "negative logarithms": lambda scores, y, **how: F.nll_loss(scores.log_softmax(2).mT, y, **how),
    "among others": lambda scores, y, **how: (
        F.cross_entropy(scores.mT, y, **how) / 2 + scores.square().mean()
    ),
}


@pytest.mark.parametrize("how", [{}, {"weight": WEIGHTS}, {"ignore_index": 2}], ids=str)
@pytest.mark.parametrize("compute", MEANS_OVER_CLASSES.values(), ids=[*MEANS_OVER_CLASSES])
def test_means_over_rows_of_which_one_sample_has_more_are_refused(compute, how):
    """Its rows would be a part of what the losses of all others are divided by."""
    model, X, y = tokens_of_classes([5, 3, 4])
    if "ignore_index" in how:
        y = y.clamp(min=0)
    with pytest.raises(UnsupportedError, match=r"influence each other.*one loss of each sample"):
        backward(private(model.parameters()), lambda: compute(model(X), y, **how), batch_size=3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("how", ["equal numbers", "equal weights", "one by one", "sum", "legacy"])
def test_means_over_rows_of_which_all_samples_have_as_many_are_those_of_the_samples(how, smoothing):
    model, X, y = tokens_of_classes(
        [5, 3, 4] if how in ("one by one", "sum", "legacy") else [3, 3, 3]
    )
    settings = {"label_smoothing": smoothing}
    if how == "equal weights":
        y[y >= 0] = torch.tensor([0, 1, 3, 1, 3, 0, 3, 0, 1])  # in another order each
        settings["weight"] = WEIGHTS
    if how == "legacy":
        settings = {"size_average": False}

    def compute(X, y):
        if how == "one by one":
            losses = [F.cross_entropy(model(x), t, **settings) for x, t in zip(X, y, strict=True)]
            return torch.stack(losses).mean()
        if how in ("sum", "legacy"):
            total = {"reduction": "sum"} if how == "sum" else {}
            return F.cross_entropy(model(X).mT, y, **settings, **total) / len(X)
        return F.cross_entropy(model(X).mT, y, **settings)

    optimizer = private(model.parameters(), lr=0.0, clip_norm=0.2)
    backward(optimizer, lambda: compute(X, y), batch_size=3)
    optimizer.step()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for n in range(3):
        gradients = torch.autograd.grad(compute(X[n : n + 1], y[n : n + 1]), [*model.parameters()])
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for total, gradient in zip(expected, gradients):
            total += gradient * min(1.0, 0.2 / norm)
    for p, total in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, total)


def test_batch_without_a_finite_sample_is_an_empty_one():
    model, X, y = linear_problem()
    optimizer = private(model.parameters(), lr=0.0)
    backward(optimizer, lambda: F.cross_entropy(model(X * math.nan), y))
    assert optimizer.statistics.discarded == 6
    optimizer.step()
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())


def test_samples_that_are_not_finite_hide_no_dependence():
    """What they conceal is found in the next batch: nothing is concluded from them."""
    _, X, y = linear_problem()
    model = nn.Linear(3, 7).double()

    def mixing(X):
        h = torch.tanh(model(X))
        return F.cross_entropy(h - h.mean(0), y)

    optimizer = private(model.parameters())
    finder.MEMORY.entries.clear()
    backward(optimizer, lambda: mixing(X * math.nan))
    assert optimizer.statistics.discarded == 6
    with pytest.raises(RuntimeError, match="samples mix"):
        backward(optimizer, lambda: mixing(X))


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive", "per_group"])
def test_what_stands_in_is_in_no_sum_and_no_statistic(name, clipping):
    torch.manual_seed(0)
    model = {
        "linear": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)),
        "conv": nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 2)),
    }[name].double()
    X = torch.randn(6, *((4,) if name == "linear" else (1, 2, 2)), dtype=torch.float64)
    y, counted = torch.randint(2, (6,)), torch.tensor([True, False, True, True, False, False])
    X[1] = math.nan  # whatever it is

    def run(X, y, counted):
        optimizer = DPSGD(
            model.parameters(),
            clip_norm=0.3,
            noise_multiplier=0.0,
            expected_batch_size=1.0,
            clipping=clipping,
        )
        optimizer.statistics.keep_norms = True
        optimizer.counted = counted
        with curvature(*optimizer.extensions, batch_size=len(X)):
            F.cross_entropy(model(X), y).backward()
        assert optimizer.counted is None  # it is of one pass
        found = optimizer.statistics
        count = optimizer.clipping.counts()
        return found.totals(), torch.cat(found.norms), found.discarded, count

    sums, norms, discarded, count = run(X, y, counted)
    expected = run(X[counted], y[counted], None)
    for total, other in zip(sums, expected[0]):
        torch.testing.assert_close(total, other, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norms, expected[1], rtol=1e-12, atol=0)
    assert discarded == expected[2] == 0
    assert count == expected[3]
    nobody = run(X[:2], y[:2], torch.tensor([False, False]))
    assert not any(total.any() for total in nobody[0])


def test_what_counts_is_said_of_every_sample():
    layer = nn.Linear(2, 2)
    optimizer = DPSGD(layer.parameters(), noise_multiplier=0.0, expected_batch_size=1.0)
    for wrong in (torch.ones(3), torch.ones(3, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="one bool per sample"):
            optimizer.counted = wrong
    optimizer.counted = torch.tensor([True, False])
    with (
        pytest.raises(ValueError, match="each of the 3 samples"),
        curvature(*optimizer.extensions, batch_size=3),
    ):
        layer(torch.randn(3, 2)).square().mean().backward()


def test_per_layer_and_automatic_clipping_equal_their_formulas():
    gradients = reference("grad_batch", "mlp_sigmoid")
    for clipping, expected in {
        "automatic": clipped_sum(gradients, lambda n: 0.3 / (n + 0.01))[0],
        "per_layer": {
            name: clipped_sum(
                {name: g}, lambda n: (0.3 / math.sqrt(len(gradients)) / n).clamp(max=1)
            )[0][name]
            for name, g in gradients.items()
        },
    }.items():
        problem = ROW["mlp_sigmoid"].make()
        optimizer = private(
            problem.model.parameters(), clip_norm=0.3, clipping=clipping, loss_reduction="sum"
        )
        backward(optimizer, problem.compute_loss)
        optimizer.step()
        for key, p in problem.parameters().items():
            torch.testing.assert_close(p.grad, expected[key])


# --- scale -----------------------------------------------------------------------------------------------------------


def linear_problem():
    torch.manual_seed(1)
    model = nn.Linear(3, 7).double()
    return model, torch.randn(6, 3, dtype=torch.float64), torch.randint(7, (6,))


@pytest.mark.parametrize(
    ("reduction", "factor"),
    [("mean", 1.0), ("mean", 0.25), ("mean", 65536.0), ("sum", 1.0), ("sum", 0.5)],
)
def test_any_scale_of_the_loss_is_undone(reduction, factor):
    model, X, y = linear_problem()
    expected = contribution(model, X, y, 0.5)
    optimizer = private(model.parameters(), lr=0.0, clip_norm=0.5, loss_reduction=reduction)
    optimizer.loss_scale = factor
    backward(optimizer, lambda: factor * F.cross_entropy(model(X), y, reduction=reduction))
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


def test_parts_of_a_batch_add_up_to_the_batch():
    model, X, y = linear_problem()
    expected = contribution(model, X, y, 0.5)
    optimizer = private(model.parameters(), lr=0.0, clip_norm=0.5)
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        backward(
            optimizer,
            lambda part=part: F.cross_entropy(model(X[part]), y[part]),
            batch_size=len(X[part]),
        )
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


# --- what must not leak ----------------------------------------------------------------------------------------------


def test_noise_has_mean_zero_and_the_promised_deviation():
    w = nn.Parameter(torch.zeros(10**5))
    optimizer = private(
        [w], noise_multiplier=1.5, clip_norm=0.4, expected_batch_size=3.0, noise_seed=1, lr=0.0
    )
    optimizer.step()
    std = 1.5 * 0.4 / 3
    assert abs(w.grad.mean()) < 0.01 * std
    assert abs(w.grad.std() / std - 1) < 0.01


def test_noise_leaves_the_global_generator_alone_and_does_not_follow_it():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(5))
        state = torch.get_rng_state()
        private([w], noise_multiplier=1.0).step()
        assert torch.equal(torch.get_rng_state(), state)
        draws.append(w.grad)
    assert not torch.equal(*draws)


def test_empty_batch_is_a_step_of_noise_and_a_tick():
    model = nn.Linear(3, 7)
    optimizer = DPSGD(model.parameters(), noise_multiplier=1.0, expected_batch_size=2.0)
    for _ in range(3):
        optimizer.step()  # the noise of the step before is no gradient from elsewhere
        assert all(p.grad.count_nonzero() == p.numel() for p in model.parameters())


def test_gradient_from_elsewhere_is_refused():
    model, X, y = linear_problem()
    optimizer = private(model.parameters())
    F.cross_entropy(model(X), y).backward()
    with pytest.raises(RuntimeError, match="which is not private"):
        optimizer.step()


def test_gradient_of_an_earlier_step_is_never_used_again():
    """A layer that takes part in every second step only contributes its own share."""
    a, b = nn.Linear(3, 7).double(), nn.Linear(3, 7).double()
    _, X, y = linear_problem()
    optimizer = private([*a.parameters(), *b.parameters()], lr=0.0)
    for _ in range(2):
        backward(optimizer, lambda: F.cross_entropy(a(X) + b(X), y))
        optimizer.step()
        backward(optimizer, lambda: F.cross_entropy(a(X), y))
        optimizer.step()
        assert all(p.grad.count_nonzero() == 0 for p in b.parameters())
        torch.testing.assert_close(
            torch.cat([p.grad.flatten() for p in a.parameters()]), contribution(a, X, y, 1.0)
        )


def test_failed_backward_leaves_nothing():
    model, X, y = linear_problem()
    optimizer = private(model.parameters(), lr=0.0)
    expected = contribution(model, X, y, 1.0)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError

    def failing():
        h = model(X)
        return F.cross_entropy(h, y) + Broken.apply(h.sum()) * 0

    with pytest.raises(ArithmeticError):
        backward(optimizer, failing)
    optimizer.zero_grad()
    backward(optimizer, lambda: F.cross_entropy(model(X), y))
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


def test_batchnorm_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7))
    _, X, y = linear_problem()
    optimizer = private(model.parameters())
    with pytest.raises(RuntimeError, match=r"`\.eval\(\)`"):
        backward(optimizer, lambda: F.cross_entropy(model(X.float()), y))
    model.eval()
    backward(optimizer, lambda: F.cross_entropy(model(X.float()), y))


def test_frozen_and_other_parameters_stay_out_of_the_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    _, X, y = linear_problem()
    with curvature(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    grads = {name: 6 * p.grad_batch for name, p in model[2].named_parameters()}
    expected, _ = clipped_sum(grads, lambda n: (0.5 / n).clamp(max=1))
    for freeze in (True, False):
        model.zero_grad()
        model[0].requires_grad_(not freeze)
        optimizer = private(
            model.parameters() if freeze else model[2].parameters(), lr=0.0, clip_norm=0.5
        )
        backward(optimizer, lambda: F.cross_entropy(model(X), y))
        optimizer.step()
        for name, p in model[2].named_parameters():
            torch.testing.assert_close(p.grad, expected[name])


def test_a_pass_leaves_nothing_on_the_parameters():
    model, X, y = linear_problem()
    before = {name: set(vars(p)) for name, p in model.named_parameters()}
    optimizer = private(model.parameters())
    backward(optimizer, lambda: F.cross_entropy(model(X), y))
    assert {name: set(vars(p)) for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())


# --- the backward pass -----------------------------------------------------------------------------------------------


def test_gradients_of_weights_are_not_computed():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    _, X, y = linear_problem()
    passed = []
    optimizer = private(model.parameters())
    with curvature(*optimizer.extensions):
        loss = F.cross_entropy(model(X), y)
        first, last = loss.grad_fn.next_functions[0][0].next_functions[0][0], model[0].weight
        first.register_hook(lambda inputs, outputs: passed.append([g is not None for g in inputs]))
        last.register_hook(lambda g: passed.append("weight"))
        loss.backward()
    assert passed
    assert all(computed == [False, True, False] for computed in passed)  # of bias, input and weight


@pytest.mark.parametrize("shared", [False, True])
def test_other_leaves_get_their_gradients(shared):
    """Inputs, parameters of another optimizer: as in a pass without privacy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    _, X, y = linear_problem()
    X.requires_grad_()
    F.cross_entropy(model(X), y).backward()
    expected = {"x": X.grad, **{name: p.grad for name, p in model[0].named_parameters()}}
    last = contribution(model[2], torch.tanh(model[0](X)).detach(), y, 0.5)
    model.zero_grad()
    X.grad = None
    optimizer = private(model[2].parameters(), lr=0.0, clip_norm=0.5)
    with curvature(*optimizer.extensions, *([BatchGrad()] if shared else [])):
        F.cross_entropy(model(X), y).backward()
    torch.testing.assert_close(
        {"x": X.grad, **{n: p.grad for n, p in model[0].named_parameters()}}, expected
    )
    optimizer.step()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model[2].parameters()]), last)
    if shared:
        torch.testing.assert_close(model[0].weight.grad_batch.sum(0), expected["weight"])


def test_graph_is_kept_where_it_is_asked_for():
    model, X, y = linear_problem()
    optimizer = private(model.parameters(), lr=0.0)
    with curvature(*optimizer.extensions):
        loss = F.cross_entropy(torch.tanh(model(X)), y)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    optimizer.step()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, 2 * contribution(nn.Sequential(model, nn.Tanh()), X, y, 1.0))


@pytest.mark.parametrize("options", [{"create_graph": True}, {"inputs": []}])
def test_options_that_clipping_cannot_honour_are_refused(options):
    model, X, y = linear_problem()
    with curvature(*private(model.parameters()).extensions):
        loss = F.cross_entropy(model(X), y)
        with pytest.raises(RuntimeError, match="neither `create_graph` nor `inputs`"):
            loss.backward(**options)


def test_two_private_optimizers_share_a_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    _, X, y = linear_problem()
    expected = []
    for layer in (model[0], model[2]):
        alone = private(layer.parameters(), lr=0.0, clip_norm=0.2)
        backward(alone, lambda: F.cross_entropy(model(X), y))
        alone.step()
        expected += [p.grad.clone() for p in layer.parameters()]
    optimizers = [
        private(layer.parameters(), lr=0.0, clip_norm=0.2) for layer in (model[0], model[2])
    ]
    with curvature(*(e for optimizer in optimizers for e in optimizer.extensions)):
        F.cross_entropy(model(X), y).backward()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_recorded_forward_and_closure():
    model, X, y = linear_problem()
    expected = contribution(model, X, y, 1.0)
    optimizer = private(model.parameters(), lr=0.0)

    def closure():
        optimizer.zero_grad()
        with record():
            loss = F.cross_entropy(model(X), y)
        with curvature(*optimizer.extensions):
            loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), expected)


# --- adaptive clipping -----------------------------------------------------------------------------------------------


def test_adaptive_norm_follows_the_quantile():
    model, X, y = linear_problem()
    with curvature(BatchGrad()):
        F.cross_entropy(model(X), y).backward()
    norms = sum(36 * p.grad_batch.flatten(1).square().sum(1) for p in model.parameters()).sqrt()
    optimizer = private(
        model.parameters(), lr=0.0, clipping="adaptive", clip_norm=50.0, expected_batch_size=6.0
    )
    for _ in range(300):
        optimizer.zero_grad()
        backward(optimizer, lambda: F.cross_entropy(model(X), y))
        optimizer.step()
    low, high = norms.sort().values[2:4].tolist()
    assert 0.8 * low < optimizer.clip_norm < 1.25 * high


def test_adaptive_noise_pays_for_the_count():
    rule = AdaptiveClipping(count_noise=12.8)
    assert rule.noise_multiplier(1.1, 256.0) == pytest.approx(1.1010, abs=1e-4)
    with pytest.raises(ValueError, match="the count alone would spend"):
        AdaptiveClipping(count_noise=0.4).noise_multiplier(1.0, 256.0)


def test_adaptive_norm_moves_on_empty_batches_too():
    optimizer = private(
        [nn.Parameter(torch.zeros(2))], clipping="adaptive", noise_multiplier=1.0, noise_seed=0
    )
    before = optimizer.clip_norm
    optimizer.step()
    assert optimizer.clip_norm != before
    assert math.isfinite(optimizer.clip_norm)


# --- an optimizer like any other -------------------------------------------------------------------------------------


def test_groups_and_state_are_those_of_the_inner_optimizer():
    model, X, y = linear_problem()
    optimizer = DPAdam(
        [{"params": [model.weight], "lr": 0.1}], noise_multiplier=0.0, expected_batch_size=6.0
    )
    optimizer.add_param_group({"params": [model.bias]})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    backward(optimizer, lambda: F.cross_entropy(model(X), y))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.05, 0.0005]
    assert optimizer.state[model.bias]["step"] == 1


def test_resumed_run_equals_the_uninterrupted_one():
    def make():
        model, X, y = linear_problem()
        optimizer = DPAdam(
            model.parameters(),
            noise_multiplier=1.0,
            expected_batch_size=6.0,
            clipping="adaptive",
            noise_seed=5,
            exact_resume=True,
        )
        return model, optimizer, lambda: F.cross_entropy(model(X), y)

    def steps(optimizer, compute_loss, count):
        for _ in range(count):
            optimizer.zero_grad()
            backward(optimizer, compute_loss)
            optimizer.step()

    model, optimizer, compute_loss = make()
    steps(optimizer, compute_loss, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(optimizer, compute_loss, 3)
    resumed, other, resumed_loss = make()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(other, resumed_loss, 3)
    assert other.clip_norm == optimizer.clip_norm
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_gradients_over_many_positions_are_formed_once_for_norm_and_sum(monkeypatch, clipping):
    """Gram matrices would take longer than the product that the sum then needs no more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(112, 112), nn.Tanh(), nn.Linear(112, 112)).double()
    X = torch.randn(9, 66, 112).double()
    factors = torch.ones(1, 9, 66, 112), X
    assert ghost_norms.are_cheaper(Term("so", "si", "oi", *factors))  # than gradients for norms
    monkeypatch.setattr(ghost_norms, "norms", None)
    monkeypatch.setattr(clipped_sums, "FEW", 4)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for x in X:
        own = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
        norms = torch.stack([g.norm() for g in own])
        bounds = 300.0 / (norms.norm() if clipping == "flat" else 2 * norms)
        for total, g, c in zip(expected, own, bounds.clamp(max=1).expand(4), strict=True):
            total += c * g
    optimizer = private(model.parameters(), clip_norm=300.0, clipping=clipping)
    with curvature(*optimizer.extensions):
        model(X).square().sum((1, 2)).mean().backward()
    optimizer.step()
    for p, total in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, total)


def test_state_of_another_optimizer_is_refused():
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(KeyError, match="what that spent is unknown"):
        private([w]).load_state_dict(torch.optim.SGD([w], lr=1.0).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0.0}, "`clip_norm` must be positive"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must not be negative"),
        ({"expected_batch_size": 0.0}, "`expected_batch_size` must be positive"),
        ({"clipping": "ghost"}, "`clipping` must be one of 'flat'"),
        ({"loss_reduction": "none"}, "`loss_reduction` must be one of"),
        ({"secure": True, "noise_seed": 1}, "`secure=True` has no seed"),
        (
            {"noise_multiplier": 1e-9, "accountant": PrivacyAccountant()},
            "`noise_multiplier` must be at least 0.01 where an account is kept, or 0, .*found 1e-09",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        private([nn.Parameter(torch.zeros(2))], **settings)


def test_noise_and_batch_size_must_be_known():
    with pytest.raises(RuntimeError, match="`noise_multiplier` must be known"):
        private([nn.Parameter(torch.zeros(2))], noise_multiplier=None).step()
    with pytest.raises(RuntimeError, match="PrivacyCallback"):
        private([nn.Parameter(torch.zeros(2))], expected_batch_size=None).step()


# --- parameters that come and go -------------------------------------------------------------------------------------


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def naive_clipped_sum(model, trainable, X, y, clip_norm):
    """By a loop over the samples, with the norm over the parameters that are trainable."""
    total = {p: torch.zeros_like(p) for p in trainable}
    for x, t in zip(X, y):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), t[None]), trainable)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for p, g in zip(trainable, grads):
            total[p] += min(1.0, clip_norm / float(norm)) * g
    return total


def empty_pass(optimizer, model, X, y):
    """On a sample that stands in, outside of the context."""
    F.cross_entropy(model(X[:1]), y[:1]).backward()
    optimizer.add_empty_pass()


STEPS = {
    "unfrozen before an empty pass": ["unfreeze", "empty"],
    "unfrozen between an empty pass and a full one": ["empty", "unfreeze", "pass"],
    "unfrozen between full passes": ["pass", "unfreeze", "pass"],
    "unfrozen after the last pass": ["pass", "unfreeze"],
    "frozen between passes": ["unfreeze", "pass", "freeze", "pass"],
    "frozen after the last pass": ["unfreeze", "pass", "freeze"],
    "a raw gradient of a frozen parameter": ["pass", "raw"],
    "a raw gradient before the parameter is unfrozen": ["pass", "raw", "unfreeze"],
    "added before an empty pass": ["add", "empty"],
    "added between passes": ["pass", "add", "pass"],
    "added after the last pass, with a raw gradient": ["pass", "raw", "add"],
}


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("events", STEPS.values(), ids=STEPS)
def test_no_raw_gradient_reaches_the_inner_optimizer(events, sigma):
    """Of parameters that are frozen, unfrozen or added between passes: what moves them is clipped, and noised."""
    model = two_layers()
    layer, rest = list(model[0].parameters()), list(model[2].parameters())
    if "add" not in events:
        for p in layer:
            p.requires_grad_("unfreeze" not in events and "raw" not in events)
    groups = rest if "add" in events else [*layer, *rest]
    inner = torch.optim.SGD(groups, lr=1.0)
    optimizer = DPOptimizer(
        inner, clip_norm=0.3, noise_multiplier=sigma, expected_batch_size=2.0, noise_seed=0
    )
    generator = torch.Generator().manual_seed(1)
    before = {p: p.detach().clone() for p in model.parameters()}
    expected = {p: torch.zeros_like(p) for p in model.parameters()}
    optimizer.zero_grad()
    for event in events:
        X = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (5,), generator=generator)
        if event == "pass":
            known = {p for group in optimizer.param_groups for p in group["params"]}
            trainable = [p for p in model.parameters() if p.requires_grad and p in known]
            for p, total in naive_clipped_sum(model, trainable, X, y, 0.3).items():
                expected[p] += total / 2
            backward(optimizer, lambda X=X, y=y: F.cross_entropy(model(X), y))
        elif event == "empty":
            empty_pass(optimizer, model, X, y)
            assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        elif event == "raw":
            for p in layer:
                p.grad = torch.full_like(p, 100.0)
        elif event == "add":
            optimizer.add_param_group({"params": layer})
        else:
            for p in layer:
                p.requires_grad_(event == "unfreeze")
    if sigma:
        optimizer._noise.rounded = lambda sizes, deviation: [
            deviation * torch.ones(n).double() for n in sizes
        ]
    optimizer.step()
    moved = {p: before[p] - p.detach() for p in model.parameters()}
    for p in model.parameters():
        noised = sigma * 0.3 / 2 if p.grad is not None else 0.0
        torch.testing.assert_close(moved[p], expected[p] + noised, rtol=1e-9, atol=1e-12)
    if "raw" not in events or "add" in events or "unfreeze" in events:
        assert all(p.grad is not None for p in layer)


# --- inner optimizers ------------------------------------------------------------------------------------------------


class Wrapping(torch.optim.Optimizer):
    """Lookahead and the like: another optimizer inside."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base


class Measuring(torch.optim.SGD):
    def required_extensions(self):
        return ()


def test_optimizers_that_read_the_data_by_another_way_are_refused():
    from lightning_curv.optimizers import DiagGGNOptimizer, KFACOptimizer

    layer = nn.Linear(3, 2)
    kinds = [
        KFACOptimizer(layer.parameters()),
        DiagGGNOptimizer(layer.parameters()),
        Measuring(layer.parameters(), lr=0.1),
        DPOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1)),
    ]
    for inner in [*kinds, Wrapping(DiagGGNOptimizer(layer.parameters()))]:
        with pytest.raises(TypeError, match="reads the data by the gradient alone"):
            DPOptimizer(inner)
    DPOptimizer(Wrapping(torch.optim.Adam(layer.parameters())))

"""No sample changes the clipped sum by more than C and the stated rounding: a search for one that does."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_curv import backprop, curvature, grams, norms, receiving, record, samples, terms
from lightning_curv.errors import UnsupportedError
from lightning_curv.graph import walk
from lightning_curv.heads import find_heads
from lightning_curv.optimizers import DPSGD, privacy_noise
from lightning_curv.optimizers.privacy_noise import NoiseSource
from lightning_curv.optimizers.privacy_reduce import grid, summed_over_ranks
from lightning_curv.optimizers.privacy_sum import ClippedSum
from lightning_curv.owners import BatchAxis
from lightning_curv.passes import Column
from lightning_curv.rowwise import samples_cannot_meet


@pytest.fixture
def sensitivity(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import sensitivity

    return sensitivity


def clipped_sum(model, compute_loss, batch, C, **settings):
    """Σ(S), flat, in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DPSGD(parameters, lr=0.0, clip_norm=C, noise_multiplier=0.0, expected_batch_size=1.0, **settings)
    with curvature(*optimizer.extensions, batch_size=len(batch[0])):
        compute_loss(model, *batch).backward()
    return torch.cat([total.flatten().double() for total in optimizer.statistics.totals()])


def change(model, compute_loss, batch, C):
    """‖Σ(S ∪ {x}) - Σ(S)‖ / C for the last sample x."""
    rest = [t[:-1] for t in batch]
    sums = [clipped_sum(model, compute_loss, b, C) for b in (batch, rest)]
    return float((sums[0] - sums[1]).norm()) / C


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_sample_changes_the_sum_by_more_than_the_norm(sensitivity):
    found = [sensitivity.search(case, climbs=4) for case in sensitivity.cases(200, seed=3)]
    violations = [sensitivity.describe(case) for case in found if case.violated]
    assert not violations
    assert sum(bool(case.refused) for case in found) < 30  # of what is not finite


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16-true"])
def test_no_ordinary_batch_is_refused(sensitivity, precision):
    for i, model in enumerate(sensitivity.MODELS):
        loss = [*sensitivity.LOSSES][i % len(sensitivity.LOSSES)]
        case = sensitivity.Case(model, loss, precision, "flat", 1.0, 6, seed=0)
        evaluate = sensitivity.Sum(case)
        assert evaluate(evaluate.draw(6)).isfinite().all()


def scaled(monkeypatch):
    """The pass carries 1/N, which is undone afterwards."""
    end = ClippedSum.end

    def with_division(passes, mean, loss_scale):
        return Column([GradientEdge(passes.loss.grad_fn, 0)], [passes.seed])

    def undone(self):
        for jacobian in [*self._jacobians, *self._formed]:
            jacobian.terms = [term.of(term.g * self._samples, term.x) for term in jacobian.terms]
        self._norms = [norm * self._samples for norm in self._norms]
        end(self)

    monkeypatch.setattr(receiving, "unscaled", with_division)
    monkeypatch.setattr(ClippedSum, "end", undone)


def float32_norms(monkeypatch):
    """Squares in the type of the gradient."""

    def row_norms(tensor, start):
        return tensor[..., None].flatten(start).square().sum(start).sqrt().double()

    for module in (terms, grams):
        monkeypatch.setattr(module, "row_norms", row_norms)
    monkeypatch.setattr(norms, "limit", lambda dtype: math.inf)
    monkeypatch.setattr(grams, "RANGE", dict.fromkeys(grams.RANGE, (-1.0, math.inf)))


def regrouped(monkeypatch):
    """Rows of several positions are taken for rows of several samples, the other way round."""
    find = backprop.find_samples

    def other_way_round(passes, *arguments):
        samples = find(passes, *arguments)
        uses = {
            node: dataclasses.replace(owners, minor=not owners.minor)
            if isinstance(owners, BatchAxis) and passes.tape.uses[node].shape[owners.axis] != owners.count
            else owners
            for node, owners in samples.uses.items()
        }
        return dataclasses.replace(samples, uses=uses)

    monkeypatch.setattr(backprop, "find_samples", other_way_round)


@pytest.mark.parametrize(
    ("mutant", "model", "precision", "C"),
    [
        (scaled, "centred", "float32", 1e-5),
        (float32_norms, "gate", "float32", 1e-8),
        (regrouped, "views major", "float64", 1.0),
        (regrouped, "views minor", "bf16-mixed", 1.0),
    ],
)
def test_the_search_finds_what_is_broken(sensitivity, monkeypatch, mutant, model, precision, C):
    def violated(number):
        chosen = sensitivity.cases(number, seed=5, only=model)
        found = (dataclasses.replace(case, precision=precision, clip_norm=C) for case in chosen)
        return any(sensitivity.search(case, climbs=12).violated for case in found)

    assert not violated(8)
    mutant(monkeypatch)
    assert violated(60)


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
            loss = LOSSES[name](h + (H[:n] - h).detach(), y[:n])  # the same outputs, whatever the kernel does
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
    # torch's exp of single floats is not that of a vector of them: the last entries of a batch have another last digit
    rtol = torch.finfo(dtype).eps if name in ("binary", "probability") and dtype == torch.float32 else 0
    torch.testing.assert_close(arrived[0], arrived[1][:49], rtol=rtol, atol=rtol)
    torch.testing.assert_close(arrived[0][:7], arrived[2], rtol=rtol, atol=rtol)


def test_half_precision_is_refused_where_the_division_cannot_be_seen():
    model, X = nn.Linear(5, 4).bfloat16(), torch.randn(6, 5).bfloat16()
    with pytest.raises(UnsupportedError, match="half precision need a loss that is a mean"):
        clipped_sum(model, lambda m, x: (m(x) ** 2).sum() * torch.full((), 0.17), [X], 1.0)
    clipped_sum(model, lambda m, x: (m(x) ** 2).sum(), [X], 1.0, loss_reduction="sum")


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


# --- several rows of a sample -----------------------------------------------------------------------------------------

VIEWS = {
    "view after view": lambda x, y: (torch.cat([x, 0.9 * x]), y.repeat(2)),
    "sample after sample": lambda x, y: (torch.stack([x, 0.9 * x], 1).flatten(0, 1), y.repeat_interleave(2)),
    "copies": lambda x, y: (x.repeat_interleave(3, 0), y.repeat_interleave(3)),
    "copy after copy": lambda x, y: (x.repeat(3, 1), y.repeat(3)),
    "expanded": lambda x, y: (x.expand(3, *x.shape).flatten(0, 1), y.expand(3, len(y)).flatten()),
    "indexed": lambda x, y: (x[torch.arange(2 * len(x)) % len(x)], y[torch.arange(2 * len(y)) % len(y)]),
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
    layers = [nn.Linear(4, 3, bias=False)] if network == "linear" else [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
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


# --- what is verified, and how often ----------------------------------------------------------------------------------


class Between(nn.Module):
    """A layer, something between, and another."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def block(h, sizes):
    """Attention among the rows of a block; blocks are told by a mask."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scores = (h @ h.T).masked_fill(owner[:, None] != owner, -math.inf)
    return scores.softmax(1) @ h


GATES = {
    "threshold": (lambda h: h + (h - 100).relu().mean(0), lambda h: h + (h + 100).relu().mean(0)),
    "factor": (lambda h: h + 0.0 * h.mean(0), lambda h: h + 1.0 * h.mean(0)),
    "mask": (lambda h: block(h, [1, 1, 1, 1]), lambda h: block(h, [1, 2, 1])),
    "matrix": (lambda h: torch.eye(4).double() @ h, lambda h: torch.ones(4, 4).double() @ h),
    "routes": (lambda h: h[torch.arange(4)], lambda h: h[torch.tensor([0, 0, 1, 1])] + h),
}


@pytest.mark.parametrize("name", GATES)
def test_a_private_step_finds_a_gate_that_opens_at_once(name):
    torch.manual_seed(0)
    samples.MEMORY.entries.clear()
    closed, opened = GATES[name]
    X, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    for _ in range(2):
        model = Between(closed).double()
        clipped_sum(model, lambda m, x, y: F.cross_entropy(m(x), y), [X, y], 1.0)
    model.between = opened
    with pytest.raises(UnsupportedError, match="samples mix"):
        clipped_sum(model, lambda m, x, y: F.cross_entropy(m(x), y), [X, y], 1.0)


def verifications(monkeypatch, model, compute_loss, batch):
    """How often samples were searched for in three private steps."""
    searched, search = [], samples._Finder.found
    monkeypatch.setattr(samples._Finder, "found", lambda *arguments: searched.append(1) or search(*arguments))
    samples.MEMORY.entries.clear()
    for _ in range(3):
        clipped_sum(model, compute_loss, batch, 1.0)
    return len(searched)


ONCE = "mlp norm cnn positions wide centred attention transformer".split()  # noqa: SIM905
ALWAYS = ["ragged", "no rule", "views major"]


@pytest.mark.parametrize("name", [*ONCE, "time first", *ALWAYS])
def test_what_cannot_mix_samples_is_verified_once(sensitivity, monkeypatch, name):
    evaluate = sensitivity.Sum(sensitivity.Case(name, "cross-entropy", "float64", "flat", 1.0, 6, seed=0))
    found = verifications(monkeypatch, evaluate.model, lambda m, x, y: F.cross_entropy(m(x), y), evaluate.draw(6))
    assert found == (3 if name in ALWAYS else 1)


ALONG = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "cumsum": lambda h: h.cumsum(0),
    "softmax": lambda h: h.softmax(0),
    "mean": lambda h: h - h.mean(0),
    "sum": lambda h: h + h.sum(0, keepdim=True),
    "transposed": lambda h: h.t() + h,
    "view": lambda h: h.t().reshape(4, 4),
    "padded": lambda h: F.pad(h, (0, 0, 1, -1)),
    "slice": lambda h: h + h[:1],
    "select": lambda h: h + h[0],
    "permuted": lambda h: h.unflatten(1, (2, 2)).permute(1, 0, 2).reshape(4, 4),
    "pairs": lambda h: (h @ h.T) @ h,
    "attention": lambda h: F.scaled_dot_product_attention(h[None, None], h[None, None], h[None, None])[0, 0],
    "strided": lambda h: h.as_strided((4, 4), (1, 4)),
}


@pytest.mark.parametrize("name", ALONG)
def test_what_works_along_the_samples_is_not_taken_for_apart(name):
    """Of the structure alone, without the weights: with the owners that the outputs have."""
    torch.manual_seed(0)
    model = Between(ALONG[name]).double()
    X, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    with record():
        loss = F.cross_entropy(model(X), y)
    tape = walk(loss.grad_fn)
    heads = [(head, BatchAxis(4)) for head in find_heads(tape, loss)]
    assert not samples_cannot_meet(tape, heads, dict.fromkeys(tape.uses, BatchAxis(4)))


# --- noise ------------------------------------------------------------------------------------------------------------


def released(total, std, **settings):
    return summed_over_ranks([total], [std], NoiseSource(**settings))[0]


@pytest.mark.parametrize("settings", [{}, {"secure": True}], ids=["library", "system"])
def test_noise_is_standard_normal(settings):
    z = NoiseSource(**settings).normal(200_001)
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs(z.pow(moment).mean() - expected) < 0.06
    below = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    assert (below - torch.linspace(0, 1, len(z))).abs().max() < 0.005  # Kolmogorov and Smirnov; 0.005 √N = 2.2
    halves = z[: len(z) // 2], z[len(z) // 2 : -1]  # the pairs of Box and Muller's method are independent
    assert abs(torch.corrcoef(torch.stack(halves))[0, 1]) < 0.015
    assert abs(torch.corrcoef(torch.stack(halves).square())[0, 1]) < 0.015


def test_tails_reach_as_far_as_those_of_a_normal_number():
    """52 bits of a uniform number end at 8.5 standard deviations; smaller ones get further bits."""
    bits = iter([[2**52 - 1, 0], [2**52 - 1]])  # the smallest radius and an angle; the further bits

    def entropy(size):
        return b"".join(number.to_bytes(8, "little") for number in next(bits))

    assert privacy_noise._normal(2, entropy).abs().max() > 11.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-9, 0.7, 3e5])
def test_released_numbers_lie_on_a_grid_that_does_not_depend_on_the_sum(dtype, std):
    step = grid(std)
    assert 2**34 <= std / step < 2**35
    for total in (torch.zeros(1000), 1e3 * std * torch.rand(1000), torch.full((1000,), std / 3)):
        found = released(total.to(dtype), std)
        if dtype == torch.float64:
            units = found / step
            assert torch.equal(units, units.round())
        assert found.dtype == dtype


def test_rounding_to_the_grid_commutes_with_the_noise():
    """round(S) + round(z) = round(round(S) + z): what is released is a function of the Gaussian mechanism's result."""
    total = torch.randn(10_000, dtype=torch.float64)
    step = grid(0.5)
    with pytest.warns(RuntimeWarning, match="not secure"):
        found = released(total.clone(), 0.5, seed=1)
    with pytest.warns(RuntimeWarning, match="not secure"):
        z = 0.5 * NoiseSource(seed=1).normal(10_000)
    assert torch.equal(found, ((total / step).round() + z / step).round() * step)
    assert (found - total - z).abs().max() <= step


def test_without_noise_nothing_is_rounded():
    total = torch.randn(10, dtype=torch.float64)
    assert torch.equal(released(total.clone(), 0.0), total)


def test_only_seeded_noise_is_repeated():
    with pytest.warns(RuntimeWarning, match="`noise_seed=7`: not secure"):
        a, b = NoiseSource(seed=7), NoiseSource(seed=7)
    assert torch.equal(a.normal(5), b.normal(5))
    state = a.state_dict()
    first = a.normal(5)
    a.load_state_dict(state)
    assert torch.equal(a.normal(5), first)
    for fresh in (NoiseSource(), NoiseSource(secure=True)):
        assert fresh.state_dict() == {}
        fresh.load_state_dict(state)  # of a run with a seed: nothing is drawn again
        assert not torch.equal(fresh.normal(5), first)
        assert not torch.equal(fresh.normal(5), fresh.normal(5))


def test_the_seed_of_a_torch_generator_plays_no_part(monkeypatch):
    monkeypatch.setattr(torch, "randn", None)
    monkeypatch.setattr(torch, "Generator", None)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    NoiseSource().normal(5)
    assert torch.equal(torch.get_rng_state(), state)

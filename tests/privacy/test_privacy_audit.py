"""The audit: its statistics against enumeration, and runs that are as private as claimed, or less."""

import math
import re
import warnings
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from packages import needs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curv import PrivacyCallback, curvature, privacy_audit
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler
from lightning_curv.optimizers import (
    DPSGD,
    GradientCanaries,
    PoissonSampling,
    PrivacyAccountant,
    PrivacyAudit,
)
from lightning_curv.optimizers.privacy.audit_bound import epsilon_lower_bound, tail_bound

needs("scipy")
da = needs("dp_accounting")


# --- the bound -------------------------------------------------------------------------------------------------------


def binomial(r, accuracy):
    """Exact probabilities of 0 ... r right guesses."""
    return [math.comb(r, k) * accuracy**k * (1 - accuracy) ** (r - k) for k in range(r + 1)]


@pytest.mark.parametrize(("m", "r"), [(1, 1), (5, 3), (12, 12), (40, 25)])
@pytest.mark.parametrize(
    ("odds", "delta"), [(1, 0), (2, 0), (3, Fraction(1, 1000)), (20, Fraction(1, 50))]
)
def test_tail_bound_equals_the_theorem_in_exact_arithmetic(m, r, odds, delta):
    p = binomial(r, Fraction(odds, odds + 1))  # odds = exp(ε)
    for v in range(r + 1):
        tail = sum(p[v:])
        gained = max((sum(p[v - i : v]) / Fraction(i) for i in range(1, v + 1)), default=0)
        expected = min(1, tail + 2 * m * delta * gained)
        assert tail_bound(m, r, v, math.log(odds), float(delta)) == pytest.approx(
            float(expected), rel=1e-11
        )


def right_guesses(m, r, odds, delta, revealed):
    """Distribution of right guesses about an (ε, δ)-private release, by enumeration.

    Randomized response of every coin; with a probability that gives each coin δ, all of
    ``revealed`` coins are released as they are.
    """
    q = Fraction(odds, odds + 1)
    chance = Fraction(delta) * m / revealed if revealed else Fraction(0)
    result = [Fraction(0)] * (r + 1)
    for correct in product((0, 1), repeat=r):
        probability = math.prod(q if c else 1 - q for c in correct)
        result[sum(correct)] += (1 - chance) * probability
        if revealed:  # the revealed ones are guessed first
            result[min(r, revealed) + sum(correct[min(r, revealed) :])] += chance * probability
    return result


@pytest.mark.parametrize("revealed", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("r", [1, 4, 8])
def test_no_private_mechanism_is_above_the_bound(r, revealed):
    m, odds, delta = 8, 3, Fraction(1, 100)
    p = right_guesses(m, r, odds, delta, revealed)
    for v in range(r + 1):
        assert float(sum(p[v:])) <= tail_bound(m, r, v, math.log(odds), float(delta)) * (1 + 1e-12)


def test_revealing_coins_is_above_the_bound_without_delta():
    """The part with δ is needed: the bound of pure differential privacy is exceeded."""
    m = r = 8
    p = right_guesses(m, r, 3, Fraction(1, 100), 8)
    assert any(float(sum(p[v:])) > tail_bound(m, r, v, math.log(3), 0.0) for v in range(r + 1))


@pytest.mark.parametrize("delta", [0.0, 1e-5])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
@pytest.mark.parametrize(("m", "r"), [(200, 200), (1000, 60)])
def test_randomized_response_is_never_above_at_the_stated_confidence(m, r, epsilon, delta):
    """Exactly: the probability of all results whose ε_lower is above ε."""
    q = 1 / (1 + math.exp(-epsilon))
    p = binomial(r, q)
    above = [v for v in range(r + 1) if epsilon_lower_bound(m, r, v, delta, 0.95) > epsilon + 1e-6]
    assert sum(p[v] for v in above) <= 0.05
    if not delta and 0 < epsilon < 3:
        assert sum(p[v] for v in above) > 0.005  # and the bound is not lax


def test_lower_bound_solves_for_epsilon_and_grows_with_right_guesses():
    bounds = [epsilon_lower_bound(500, 100, v, 1e-5) for v in range(0, 101, 10)]
    assert bounds[:6] == [0.0] * 6
    assert all(a < b for a, b in pairwise(bounds[5:]))
    for v, bound in zip(range(60, 101, 10), bounds[6:]):
        assert tail_bound(500, 100, v, bound, 1e-5) == pytest.approx(0.05, rel=1e-3)
    assert epsilon_lower_bound(500, 100, 90, 1e-5, 0.99) < bounds[9]
    assert epsilon_lower_bound(500, 100, 90, 1e-3) < bounds[9]
    assert epsilon_lower_bound(500, 100, 90, 1.0) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tail_bound(10, 11, 3, 1.0, 0.0), "guesses=11, canaries=10"),
        (lambda: tail_bound(10, 4, 5, 1.0, 0.0), "correct=5, guesses=4"),
        (lambda: tail_bound(10, 4, 3, -1.0, 0.0), "epsilon=-1.0"),
        (lambda: tail_bound(10, 4, 3, 1.0, 1.5), "delta=1.5"),
        (lambda: epsilon_lower_bound(10, 4, 3, 0.0, 1.0), "`confidence` must lie in"),
        (lambda: PrivacyAudit.of([1.0], [True, False], 1.0, 1e-5), r"shapes \(1,\) and \(2,\)"),
        (
            lambda: PrivacyAudit.of([1.0], [True], 1.0, 1e-5, guesses=[2]),
            r"between 1 and 1, the canaries, found \[2\]",
        ),
        (
            lambda: PrivacyAudit.of([1.0], [True], 1.0, 1e-5, guesses=[]),
            "`guesses` must be numbers",
        ),
    ],
)
def test_arguments_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- guesses ---------------------------------------------------------------------------------------------------------


def laplace_scores(generator, members, epsilon):
    return members + generator.laplace(scale=1 / epsilon, size=len(members))


def gaussian_scores(generator, members, sigma):
    return members + sigma * generator.normal(size=len(members))


@pytest.mark.parametrize(
    ("scores", "epsilon", "delta"),
    [
        (lambda g, members: laplace_scores(g, members, 1.0), 1.0, 1e-6),
        (lambda g, members: gaussian_scores(g, members, 1.0), 4.3769, 1e-5),  # ε of dp-accounting
        (
            lambda g, members: np.where(g.random(len(members)) < 0.75, members, ~members) * 1.0,
            math.log(3),
            1e-6,
        ),
        (lambda g, members: g.normal(size=len(members)), 0.0, 0.0),
    ],
    ids=["laplace", "gaussian", "response", "nothing"],
)
def test_audits_of_known_mechanisms_are_above_epsilon_no_more_often_than_stated(
    scores, epsilon, delta
):
    generator = np.random.default_rng(0)
    above = 0
    for _ in range(100):
        members = generator.random(300) < 0.5
        above += PrivacyAudit.of(
            scores(generator, members), members, epsilon, delta, confidence=0.8
        ).refuted
    assert above <= 20


def test_audits_show_a_good_part_of_epsilon():
    generator = np.random.default_rng(0)
    members = generator.random(5000) < 0.5
    shown = PrivacyAudit.of(
        laplace_scores(generator, members, 2.0), members, 2.0, 0.0
    ).epsilon_lower
    assert 1.0 < shown < 2.0


def test_the_surest_guesses_are_made_and_trials_share_the_confidence():
    members = np.array([True, False] * 50)
    scores = np.where(members, 1.0, -1.0) * np.arange(100, 0, -1)
    scores[40:] = -scores[40:]  # the unsure ones are wrong
    audit = PrivacyAudit.of(scores, members, 0.5, 1e-6, guesses=[20, 40, 100])
    assert [(trial.guesses, trial.correct) for trial in audit.trials] == [
        (20, 20),
        (40, 40),
        (100, 40),
    ]
    assert audit.best.guesses == 40
    assert audit.epsilon_lower == epsilon_lower_bound(100, 40, 40, 1e-6, 1 - 0.05 / 3)
    assert audit.included == 50


def test_result_in_words_and_as_a_picture(tmp_path, monkeypatch):
    members = np.array([True, False] * 100)
    scores = np.where(members, 1.0, -1.0) + np.random.default_rng(0).normal(size=200)
    refuted, standing, beyond = (
        PrivacyAudit.of(scores, members, epsilon, 1e-5) for epsilon in (0.1, 3.0, 30.0)
    )
    assert refuted.refuted
    assert not standing.refuted
    assert (
        f"ε_lower = {refuted.epsilon_lower:.2f} > ε = 0.10 at δ = 1e-05: the claim is REFUTED"
        in str(refuted)
    )
    assert "<= ε = 3.00" in str(standing)
    assert "cannot refute it, take more canaries" in str(beyond)
    assert "cannot refute" not in str(standing)
    needs("matplotlib").use("Agg")
    for audit in (refuted, PrivacyAudit.of(np.zeros(5), [True] * 5, math.inf, 1e-5)):
        figure = audit.plot()
        figure.savefig(tmp_path / "out.png")
        assert (tmp_path / "out.png").stat().st_size > 5_000
        assert len(audit.plot(figure.axes).axes) == 2
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        refuted.plot()


# --- gradient canaries -----------------------------------------------------------------------------------------------

N, RATE, STEPS = 120, 0.25, 20


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 20, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(160, 20),
        nn.Linear(20, 3),
    )


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 2, 8, generator=generator), torch.randint(3, (N,), generator=generator)


def private_step(optimizer, net, batch, canaries=None, drawn=()):
    X, y = data()
    optimizer.zero_grad()
    if len(batch):
        with curvature(*optimizer.extensions, batch_size=len(batch)):
            loss = F.cross_entropy(
                net(X[batch].to(net[0].weight.dtype)), y[batch], reduction=optimizer.loss_reduction
            )
            (loss * optimizer.loss_scale).backward()
    if canaries is not None:
        canaries.backward(drawn)
    optimizer.step()


def make(sigma, **settings):
    net = network()
    accountant = PrivacyAccountant(PoissonSampling(RATE))
    options = {
        "lr": 0.1,
        "noise_multiplier": sigma,
        "expected_batch_size": RATE * N,
        "accountant": accountant,
    }
    return net, DPSGD(net.parameters(), **{**options, **settings})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_a_canary_contributes_the_clip_norm_along_its_own_entries(clipping, reduction):
    net, optimizer = make(0.0, clip_norm=0.5, clipping=clipping, loss_reduction=reduction)
    net.double()
    optimizer.loss_scale = 0.25
    canaries = GradientCanaries(optimizer, count=400, seed=0)
    weight = net[3].weight  # the only one with 400 entries
    assert list(canaries._entries) == [weight]
    batch, drawn = torch.arange(30), np.arange(0, 400, 3)
    private_step(optimizer, net, batch, canaries, drawn)
    together = [p.grad.clone() for p in net.parameters()]
    other, alone = make(0.0, clip_norm=0.5, clipping=clipping, loss_reduction=reduction)
    other.double()
    alone.loss_scale = 0.25
    private_step(alone, other, batch)
    chosen = drawn[canaries.members[drawn]]
    assert 0 < len(chosen) < len(drawn)
    expected = torch.zeros_like(weight).flatten()
    expected[torch.from_numpy(canaries._entries[weight][chosen])] = {
        "flat": 0.5,
        "adaptive": 0.5,
        "automatic": 0.5 * 5 / 5.01,
        "per_layer": 0.5 / math.sqrt(6),
    }[clipping] / (RATE * N)
    for p, q, after in zip(net.parameters(), other.parameters(), together):
        difference = expected.view_as(weight) if p is weight else torch.zeros_like(p)
        torch.testing.assert_close(after - q.grad, difference, rtol=1e-8, atol=1e-10)


def test_canaries_in_several_parameters_have_one_norm():
    net, optimizer = make(0.0)
    canaries = GradientCanaries(optimizer, count=60, seed=0)
    assert [p.ndim for p in canaries._entries] == [3, 2, 2]
    canaries.backward(range(60))
    optimizer.step()
    total = torch.cat([p.grad.flatten() for p in net.parameters()]) * RATE * N
    assert float(total.norm()) == pytest.approx(math.sqrt(canaries.members.sum()), rel=1e-6)
    assert int((total != 0).sum()) == 3 * canaries.members.sum()


def test_scores_are_log_odds_whatever_the_other_samples_contribute():
    _, optimizer = make(1.5, noise_seed=3)
    canaries = GradientCanaries(optimizer, count=200, seed=0)
    net, twin = make(1.5, noise_seed=3)
    alone = GradientCanaries(twin, count=200, seed=0)
    private_step(twin, net, torch.arange(60), alone, np.arange(100))
    private_step(optimizer, network(), torch.arange(0), canaries, np.arange(100))
    np.testing.assert_allclose(alone.scores, canaries.scores, rtol=1e-4, atol=1e-5)
    released = [p.grad.flatten()[torch.from_numpy(e)] for p, e in canaries._entries.items()]
    z = torch.stack(released).sum(0) / math.sqrt(len(released)) * RATE * N
    expected = torch.log(1 - RATE + RATE * torch.exp((2 * z - 1) / (2 * 1.5**2)))
    np.testing.assert_allclose(canaries.scores, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def dropped_noise(optimizer):
    draw = optimizer._noise.rounded
    optimizer._noise.rounded = lambda sizes, deviation: draw(sizes, deviation / 10)


def skipped_clipping(optimizer):
    factors = optimizer.clipping.factors
    optimizer.clipping.factors = lambda *arguments: torch.ones_like(factors(*arguments))


def run(sigma, spoil=None, rate=RATE, count=1000, seed=0, **settings):
    """An audited run of a network with 3,300 parameters."""
    net, optimizer = make(sigma, noise_seed=seed, **settings)
    if spoil is not None:
        spoil(optimizer)
    canaries = GradientCanaries(optimizer, count=count, seed=seed)
    sampler = PoissonBatchSampler(N + count, rate, STEPS, seed=seed)
    for step in range(STEPS):
        drawn = sampler.batch(step)
        private_step(
            optimizer, net, torch.from_numpy(drawn[drawn < N]), canaries, drawn[drawn >= N] - N
        )
    return canaries.audit(delta=1e-5)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_private_runs_stay_below_their_claim(clipping):
    audit = run(2.5, clipping=clipping)
    assert audit.epsilon_lower < audit.epsilon < audit.largest
    assert (
        audit.epsilon_lower > 0 or clipping == "per_layer"
    )  # canaries in one of six parameters: C / √6 each


@pytest.mark.parametrize(
    ("sigma", "options"),
    [
        (2.5, {"spoil": dropped_noise}),
        (2.5, {"spoil": skipped_clipping}),
        (2.5, {"rate": 1.0, "accountant": PrivacyAccountant(PoissonSampling(0.05))}),
        (2.5, {"spoil": dropped_noise, "clipping": "per_layer"}),
        (2.5, {"spoil": skipped_clipping, "clipping": "automatic"}),
    ],
    ids=["noise", "clipping", "sampling", "noise-per-layer", "clipping-automatic"],
)
def test_broken_runs_are_refuted(sigma, options):
    audit = run(sigma, **options)
    assert audit.epsilon_lower > audit.epsilon
    assert "REFUTED" in str(audit)


def test_coins_are_fair_secret_and_repeatable():
    _, optimizer = make(1.0)
    first, second, third, fourth = (
        GradientCanaries(optimizer, 1000, seed=s) for s in (1, 1, None, None)
    )
    assert 400 < first.members.sum() < 600
    assert np.array_equal(first.members, second.members)
    assert not np.array_equal(third.members, fourth.members)


def test_a_step_without_the_canaries_is_an_error_until_they_are_closed():
    net, optimizer = make(1.0)
    canaries = GradientCanaries(optimizer, 100)
    with pytest.raises(
        RuntimeError, match=r"Expected `canaries.backward\(drawn\)` before every step"
    ):
        private_step(optimizer, net, torch.arange(3))
    canaries.close()
    private_step(optimizer, net, torch.arange(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "`count` must be"),
        ({"norm": 0.0}, "`norm` must be positive"),
        ({"count": 4000}, "4000 canaries need a trainable parameter .* more than 3200; take fewer"),
    ],
)
def test_canaries_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GradientCanaries(make(1.0)[1], **options)


def test_an_audit_needs_an_account():
    with pytest.raises(ValueError, match="found an optimizer without one"):
        GradientCanaries(make(1.0, accountant=None)[1])


# --- in Lightning ----------------------------------------------------------------------------------------------------


class Net(pl.LightningModule):
    """Learns its data by heart, if it may."""

    def __init__(self, spoil=None, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 100), nn.Tanh(), nn.Linear(100, 3))
        self.spoil, self.settings = spoil, {"noise_multiplier": 2.0, "noise_seed": 0, **settings}
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach())
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = DPSGD(self.parameters(), **{"lr": 0.5, **self.settings})
        if self.spoil is not None:
            self.spoil(optimizer)
        return optimizer


def samples(n, offset=0.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 12, generator=generator) + offset,
        torch.randint(3, (n,), generator=generator),
    )


def audited(module=None, callback=None, trainer=None, **options):
    callback = PrivacyCallback(seed=0) if callback is None else callback
    settings = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**{**settings, **quiet, "callbacks": [callback], **(trainer or {})})
    loader = DataLoader(samples(80), batch_size=20, shuffle=True)
    module = Net() if module is None else module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return privacy_audit(trainer, module, loader, **{"seed": 0, **options}), trainer, module


def test_a_private_run_stays_below_its_claim():
    audit, trainer, module = audited()
    accountant = PrivacyAccountant(PoissonSampling(0.25))
    accountant.release(2.0, times=16)
    assert trainer.global_step == 16
    assert audit.epsilon == accountant.epsilon(1e-5)
    assert 0 < audit.epsilon_lower < audit.epsilon < audit.largest
    assert not audit.refuted
    assert all(len(x) < 50 for x in module.seen)  # gradient canaries are never loaded
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["PrivacyCallback"]


class EveryStep(PrivacyCallback):
    """Draws every sample in every step, and accounts for one in four."""

    def on_train_start(self, trainer, pl_module):
        sampler = self._current.sampler
        sampler.batch = lambda step: np.arange(sampler.population)
        super().on_train_start(trainer, pl_module)


@pytest.mark.parametrize(
    ("options", "callback"),
    [
        ({"spoil": dropped_noise}, PrivacyCallback),
        ({"spoil": skipped_clipping}, PrivacyCallback),
        ({"noise_multiplier": 5.0}, EveryStep),
    ],
    ids=["noise", "clipping", "sampling"],
)
def test_broken_lightning_runs_are_refuted(options, callback):
    audit, _, _ = audited(Net(**options), callback(seed=0))
    assert audit.epsilon_lower > audit.epsilon


@pytest.mark.parametrize(
    "options", [{"sampling": "truncated_poisson", "max_batch_size": 300, "delta": 1e-4}, {}]
)
def test_parts_and_truncated_batches_are_audited_too(options):
    callback = PrivacyCallback(seed=0, **options)
    audit, trainer, _ = audited(
        callback=callback, trainer={"accumulate_grad_batches": 2, "max_epochs": 2}
    )
    assert trainer.global_step == 4
    assert audit.epsilon_lower < audit.epsilon
    sampling = callback.accountant.history[0][0]
    if options:
        assert (sampling.dataset_size, sampling.sampling_rate) == (1080, 0.5)


def test_input_canaries_are_loaded_if_their_coin_says_so():
    canaries = samples(60, offset=100.0)
    audit, _, module = audited(canaries=canaries, trainer={"max_epochs": 8})
    seen = torch.cat(module.seen)
    loaded = {float(x[0]) for x in seen if float(x.mean()) > 50}
    chosen = {float(canaries[i][0][0]) for i in range(60) if audit.members[i]}
    assert loaded == chosen
    assert 10 < len(chosen) < 50
    assert audit.epsilon_lower < audit.epsilon


def test_input_canaries_show_what_is_learnt_by_heart():
    settings = {"noise_multiplier": 0.0, "clip_norm": 20.0, "lr": 0.5}
    audit, _, _ = audited(Net(**settings), canaries=samples(60, seed=4), trainer={"max_epochs": 30})
    assert math.isinf(audit.epsilon)
    assert audit.epsilon_lower > 0.5


def test_auditing_changes_no_batch_of_the_data():
    batches = []
    for count in (1, 500):
        _, _, module = audited(canaries=count, trainer={"max_epochs": 1})
        batches.append([set(map(float, x[:, 0])) for x in module.seen[-4:]])  # of four steps
    assert batches[0] == batches[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"callbacks": []}}, "expects a Trainer with a `PrivacyCallback`"),
        ({"callback": PrivacyCallback(sampling="epoch")}, "found sampling='epoch' and 1 processes"),
        ({"canaries": 10**5}, "100000 canaries need a trainable parameter"),
    ],
)
def test_audits_that_cannot_be_made(options, message):
    with pytest.raises(Exception, match=message):
        audited(**options)


def test_the_tests_that_the_page_names_exist():
    page = (Path(__file__).parents[2] / "docs" / "privacy_audit.md").read_text()
    named = re.findall(r"`test_privacy_audit\.py::(test_\w+)`", page)
    assert len(named) >= 9
    assert all(callable(globals().get(name)) for name in named)

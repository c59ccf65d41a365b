"""What monitoring costs is said, and can be limited."""

import itertools
import warnings

import pytest
from kinds import Masked, Quantiles
from monitoring import Net, assert_same_parameters, fit

from lightning_curv import CurvatureCallback
from lightning_curv.callbacks import curvature
from lightning_curv.callbacks.monitoring import prices, schedule
from lightning_curv.callbacks.monitoring.prices import Budget, by_quantity, warning_of_price
from lightning_curv.callbacks.monitoring.quantities import QUANTITIES


def run(net, callback, batches=6):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, callback, epochs=1, loader=[net.batch(seed) for seed in range(batches)])
    return [str(w.message) for w in caught if "times as long" in str(w.message)]


def chosen(*names):
    return [QUANTITIES[name] for name in names]


def test_the_warning_names_the_prices_in_steps():
    seconds = {"ggn_trace_exact": 3.0, "hessian_max_eigenvalue": 1.0, "batch_l2": 0.01}
    quantities = chosen("grad_variance", "hessian_max_eigenvalue", "ggn_trace_exact")
    text = warning_of_price(quantities, seconds, total=4.01, rest=0.1)
    assert "took 40 times as long" in text
    assert "ggn_trace_exact 30.0, hessian_max_eigenvalue 10.0, " in text
    assert text.index("grad_variance 0.1") > text.index("hessian_max_eigenvalue 10.0")
    assert not warning_of_price(quantities, seconds, total=4.01, rest=1.0)


def test_the_defaults_say_nothing_of_prices():
    assert not warning_of_price(
        chosen("grad_norm", "ggn_trace"), {"ggn_trace_mc": 9.0}, total=9.0, rest=0.1
    )
    assert not run(Quantiles(), CurvatureCallback())


def test_what_several_share_is_in_the_price_of_each():
    found = by_quantity(
        chosen("grad_norm", "grad_variance", "mean_gsnr"),
        {"batch_l2": 1.0, "sum_grad_squared": 2.0},
    )
    assert found == {"grad_variance": 1.0, "mean_gsnr": 3.0}


def test_all_on_a_transformer_says_its_price_once(monkeypatch):
    # Whatever the first step of a run takes, and on whichever machine.
    monkeypatch.setattr(prices, "DEAR", 0)
    said = run(Masked(), CurvatureCallback("all"), batches=3)
    assert len(said) == 1
    assert "ggn_trace_exact" in said[0]
    assert not run(Masked(), CurvatureCallback("all", budget=0.5), batches=3)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_budget_is_kept(share):
    budget, spent, plain = Budget(share), 0.0, 0.0
    for step in range(1, 2000):
        logged = budget.allows(step)
        more = 5.0 if logged else 0.0
        budget.add(step, 1.0 + more, logged)
        spent, plain = spent + more, plain + 1.0
    assert 0.9 * share < spent / (spent + plain) < 1.1 * share


def test_all_batches_of_a_step_are_logged_together():
    budget, logged = Budget(0.1), []
    for step, _ in itertools.product(range(1, 60), range(3)):
        logged.append(budget.allows(step))
        budget.add(step, 4.0 if logged[-1] else 1.0, logged[-1])
    triples = zip(logged[::3], logged[1::3], logged[2::3])
    assert all(len({*triple}) == 1 for triple in triples)
    assert 2 < sum(logged) / 3 < 10


def test_a_run_with_a_budget_logs_more_rarely_and_ends_with_the_same_parameters(monkeypatch):
    now, logged = itertools.count(), []

    class Fake:
        @staticmethod
        def perf_counter():
            return next(now)

    def costly(self, module):
        logged.append(True)
        for _ in range(10):
            next(now)

    monkeypatch.setattr(schedule, "time", Fake)
    monkeypatch.setattr(curvature.Report, "follow_updates", costly)
    plain, watched = Net(), Net()
    fit(plain, epochs=15)
    fit(watched, CurvatureCallback(budget=0.5), epochs=15)
    assert_same_parameters(plain, watched)
    assert 5 <= len(logged) <= 9  # of 60 steps: a plain one takes 1, a logged one 11


def test_a_wrong_budget_is_refused():
    with pytest.raises(
        ValueError, match=r"`budget` must be None or a share of the time in \(0, 1\), found 2"
    ):
        CurvatureCallback(budget=2)

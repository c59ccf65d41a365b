"""Some of the samples: what a cap leaves is that of the chosen samples, at the price of these, for every op."""

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from columns import watched_columns
from routings import KNOWN, LOSSES, ROUTINGS, C
from torch import nn
from zoo import NAMES, ROW, assert_close

from lightning_curv import record
from lightning_curv.engine.backprop import Backprop
from lightning_curv.extensions import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNMC,
    SumGradSquared,
)
from lightning_curv.extensions.unevaluated import GradientSum
from lightning_curv.graph.joins import Join
from lightning_curv.passes.passes import Passes
from lightning_curv.passes.randomness import random_subset
from lightning_curv.rules.fallback import FallbackWarning

pytestmark = pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
PER_SAMPLE = {
    BatchGrad: 0,
    BatchL2Grad: 0,
    BatchDiagGGNExact: 0,
    SqrtGGNMC: 1,
}  # where the samples are in the results


def fixed(chosen, extensions):
    """A cap whose subset is known."""
    choose = lambda count: torch.tensor(chosen) if count > len(chosen) else None  # noqa: E731
    return SimpleNamespace(size=len(chosen), extensions=extensions, choose=choose)


def results(forward, extensions, chosen=None, capped=None, count=None, check=False):
    """By extension and parameter, after one backward pass."""
    with record():
        loss = forward()
    cap = None if chosen is None else fixed(chosen, extensions if capped is None else capped)
    generator = torch.Generator().manual_seed(0)
    backprop = Backprop(loss, extensions, generator, count, check, cap=cap)
    try:
        backprop.before()
        backprop.run()
        return backprop, backprop.finish()
    finally:
        backprop.abort()  # after an error, too: later private steps would give way to it


def subset(count):
    return list(range(0, count, 2)) if count > 2 else [count - 1]


def assert_those_of_the_chosen(forward, kinds, count):
    chosen = subset(count)
    _, every = results(forward, whole := [kind() for kind in kinds], count=count)
    backprop, found = results(forward, some := [kind() for kind in kinds], chosen, count=count)
    assert backprop.count == count
    assert backprop.counts == (dict.fromkeys(some, len(chosen)) if count > 1 else {})
    for kind, one, other in zip(kinds, whole, some, strict=True):
        assert every[one].keys() == found[other].keys() != set()
        for parameter, expected in every[one].items():
            axis = PER_SAMPLE[kind]
            rows = expected.index_select(axis, torch.tensor(chosen))
            assert_close(
                found[other][parameter], rows, 1e-6, f"{kind.__name__} of {tuple(parameter.shape)}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_quantities_of_every_op_are_those_of_the_chosen_samples(name):
    problem = ROW[name].make()
    assert_those_of_the_chosen(problem.compute_loss, [*PER_SAMPLE], len(problem.y))


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "loop"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_quantities_of_moved_rows_are_those_of_the_chosen_samples(name, loss):
    routing = ROUTINGS[name]
    torch.manual_seed(len(name))
    model, batch, y = routing.modules(), routing.draw(5), torch.arange(5) % C
    kinds = [*PER_SAMPLE] if loss in KNOWN else [BatchGrad, BatchL2Grad]
    assert_those_of_the_chosen(lambda: LOSSES[loss](routing.forward(model, batch), y), kinds, 5)


def of_routing(name, count, loss="cross_entropy"):
    routing = ROUTINGS[name]
    torch.manual_seed(0)
    model, batch, y = routing.modules(), routing.draw(count), torch.arange(count) % C
    return model, lambda: LOSSES[loss](routing.forward(model, batch), y)


@pytest.mark.parametrize("name", ["prompt", "packed_lstm"])
@pytest.mark.parametrize("kind", [SumGradSquared, GradientSum, DiagGGNExact])
def test_sums_are_those_of_the_chosen_samples(kind, name):
    model, forward = of_routing(name, 5)
    by_sample = BatchDiagGGNExact() if kind is DiagGGNExact else BatchGrad()
    _, every = results(forward, [by_sample])
    _, found = results(forward, [extension := kind()], [1, 4])
    for p in model.parameters():
        rows = every[by_sample][p][[1, 4]]
        expected = rows.square().sum(0) if kind is SumGradSquared else rows.sum(0)
        torch.testing.assert_close(found[extension][p], expected)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["filled_matrix", "custom_function", "written_in_place", "derivative"]
)
@pytest.mark.parametrize("kind", [BatchL2Grad, DiagGGNExact])
def test_a_join_takes_one_pass_per_chosen_sample(monkeypatch, name, kind):
    passes, original = [], Join._calls
    monkeypatch.setattr(
        Join,
        "_calls",
        lambda self, gs, shape: (passes.append(len(gs)), original(self, gs, shape))[1],
    )

    def count(chosen):
        passes.clear()
        results(of_routing(name, 6)[1], [kind()], chosen)
        return sum(passes)

    whole = count(None)
    assert whole > 0
    assert count([0, 4]) * 6 == whole * 2


@pytest.mark.parametrize("kind", [BatchL2Grad, DiagGGNExact])
def test_an_op_without_a_rule_is_differentiated_for_the_chosen_samples_alone(monkeypatch, kind):
    class Exotic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.p = nn.Linear(4, C).double(), nn.Parameter(torch.rand(C).double())

        def forward(self, x):
            return torch.atan2(self.body(x), self.p)

    torch.manual_seed(0)
    model, x, y, sizes = Exotic(), torch.rand(6, 4).double(), torch.arange(6) % C, []
    original = torch.func.vmap

    def counting(function, *arguments, **options):
        inner = original(function, *arguments, **options)
        return lambda *tensors: (
            sizes.append(tensors[0].shape[: tensors[0].ndim - 1]),
            inner(*tensors),
        )[1]

    monkeypatch.setattr(torch.func, "vmap", counting)

    def forward():
        return LOSSES["cross_entropy"](model(x), y)

    def samples(chosen):
        sizes.clear()
        results(forward, [kind()], chosen)
        return {size[1] for size in sizes if len(size) == 2}

    assert samples(None) == {6}
    assert samples([0, 3, 4]) == {3}


def test_exact_columns_of_other_samples_are_zero(monkeypatch):
    columns = watched_columns(monkeypatch)
    results(of_routing("prompt", 5)[1], [DiagGGNExact()], [1, 3])
    seeds = [column.seeds[0] for column in columns]
    assert seeds
    for seed in seeds:
        assert not seed[[0, 2, 4]].any()
    assert all(torch.stack(seeds)[:, n].any() for n in (1, 3))


def test_no_per_sample_gradient_of_another_sample_is_held():
    _, forward = of_routing("custom_function", 6)
    _, found = results(forward, [extension := BatchGrad()], [2, 5])
    assert {len(rows) for rows in found[extension].values()} == {2}


# --- who gets the whole batch -----------------------------------------------------------------------------------------


def test_who_shares_passes_with_what_needs_all_samples_gets_all():
    _, forward = of_routing("prompt", 5)
    mine, other, columns = BatchGrad(), BatchL2Grad(), DiagGGNExact()
    backprop, found = results(forward, [mine, other, columns], [0, 2], capped=[other, columns])
    assert (
        {len(rows) for rows in found[mine].values()}
        == {len(rows) for rows in found[other].values()}
        == {5}
    )
    assert backprop.counts == {columns: 2}


def test_quantities_with_columns_of_other_kinds_get_all_samples():
    _, forward = of_routing("prompt", 5, "mse")
    whole, some = DiagHessian(), DiagHessian()
    _, every = results(forward, [whole])
    backprop, found = results(forward, [some], [0, 2])
    assert not backprop.counts
    for one, other in zip(every[whole].values(), found[some].values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_that_is_no_larger_is_taken_as_it_is():
    _, forward = of_routing("prompt", 3)
    backprop, found = results(forward, [extension := BatchGrad()], [0, 1, 2])
    assert not backprop.counts
    assert {len(rows) for rows in found[extension].values()} == {3}


def test_the_self_check_is_off_where_some_samples_are_left_out(monkeypatch):
    """Their gradients do not add up to that of the batch; those of all samples are checked as before."""
    _, forward = of_routing("prompt", 4)
    results(forward, [BatchL2Grad()], [0, 1], check=True)
    original = Passes.terms

    def doubled(*arguments):
        return ((p, term.of(2 * term.g, term.x)) for p, term in original(*arguments))

    monkeypatch.setattr(Passes, "terms", doubled)
    with pytest.raises(RuntimeError, match="add up"):
        results(forward, [BatchL2Grad()], [0, 1, 2, 3], check=True)


def test_the_price_that_is_warned_of_is_that_of_the_chosen_samples():
    def message(chosen, capped=None):
        extensions = [BatchL2Grad(), DiagGGNExact()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results(of_routing("custom_function", 7)[1], extensions, chosen, capped, check=True)
        (found,) = {
            str(w.message)
            for w in caught
            if issubclass(w.category, FallbackWarning)
            if "Parameters" in str(w)
        }
        return found

    assert "for each of the 7 samples" in message(None)
    assert "for each of 2 of the 7 samples" in message([1, 5])
    assert "max_samples=" in message(None)
    assert "for each of the 7 samples" in message([1, 5], capped=[])


def test_the_price_is_named_once():
    _, forward = of_routing("custom_function", 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for count in (7, 7):
            results(forward, [BatchL2Grad()], count=count, check=True)
    assert len([w for w in caught if "Parameters" in str(w.message)]) == 1


# --- who is chosen ----------------------------------------------------------------------------------------------------


def test_all_subsets_are_equally_likely_and_in_order():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(random_subset(5, 2, generator).tolist()) for _ in range(5000))
    assert len(drawn) == 10
    assert all(a < b for a, b in drawn)
    assert (
        sum((times - 500) ** 2 / 500 for times in drawn.values()) < 27.9
    )  # χ² of 9 degrees, 0.1 %


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    random_subset(5, 2, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)

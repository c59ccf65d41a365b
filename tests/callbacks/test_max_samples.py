"""`CurvatureCallback(max_samples=)`: estimates from a random subset, unbiased for the whole batch, and nothing else.

Every unbiased estimate is tested by all subsets that there are: their mean is the value of the
whole batch.
"""

import itertools
import math

import pytest
import pytorch_lightning as pl
import torch
from monitoring import (
    CONSTANT,
    ManualNet,
    Net,
    adam,
    assert_nothing_left_behind,
    assert_same_parameters,
    data,
    kfac,
    per_sample_gradients,
)
from pytorch_lightning.loggers import Logger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import (
    BatchGrad,
    BatchL2Grad,
    CurvatureCallback,
    DiagGGNOptimizer,
    SumGradSquared,
)
from lightning_curv.callbacks.monitoring.observation import _subsets
from lightning_curv.callbacks.monitoring.quantities import QUANTITIES
from lightning_curv.graph.joins import Join
from lightning_curv.passes import randomness

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At step .* are too small:UserWarning"
    ),  # they are, for speed
    pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning"),
]


class Memory(Logger):
    """Values as they were given, in float64."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_hyperparams(self, *arguments, **named):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            if name.startswith("curvature"):
                self.values.setdefault(step, {})[name.removeprefix("curvature").lstrip("/")] = value


def batches(*sizes):
    """Batches of these sizes, of which no two samples are equal."""
    x, y = data(sum(sizes)).tensors
    return list(zip(x.split(sizes), y.split(sizes)))


def logged(callback, loader, net=None, **settings):
    """{step: {series: value}}; the network is as it was made in every run."""
    memory = Memory()
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "precision": "64-true",
        "log_every_n_steps": 1,
        **CONSTANT,
    }
    trainer = pl.Trainer(callbacks=[callback], logger=memory, **(options | settings))
    trainer.fit(Net() if net is None else net, DataLoader(loader, batch_size=None))
    return memory.values


def with_subsets(monkeypatch, subsets):
    """One subset after the other, instead of random ones."""
    given = iter(subsets)
    monkeypatch.setattr(
        randomness, "random_subset", lambda count, size, generator: torch.tensor(next(given))
    )


# what is unbiased, and of which function of it that is true
SQUARE = float(2).__rpow__
UNBIASED = {
    **dict.fromkeys(["grad_norm", "grad_variance", "grad_signal", "grad_diversity", "cabs"], float),
    **dict.fromkeys(["norm_test", "inner_product_test", "orthogonality_test"], SQUARE),
    **dict.fromkeys(["ggn_trace", "ggn_trace_exact"], float),
}
WHOLE = {
    "hessian_trace",
    "ggn_max_eigenvalue",
    "hessian_max_eigenvalue",
    "update_size",
    "distance",
    "sparsity",
}  # of all samples
NOT = {
    "mean_gsnr",
    "early_stopping",
    "tic_trace",
    "tic_diag",
    "noise_scale",
    "suggested_batch_size",
}  # ratios
NOT |= {"sample_norms", "alpha"}  # of the subset; of two steps
NOT |= {"noise_scale_norm_layers", "grad_hist_1d", "grad_hist_2d"}  # a ratio; of the subset
SEVERAL = {"gradient_stats"}  # series, of all samples


def test_every_quantity_says_what_a_subset_gives():
    assert QUANTITIES.keys() == UNBIASED.keys() | WHOLE | NOT | SEVERAL


@pytest.mark.parametrize(
    ("sizes", "most"),
    [((5,), 1), ((5,), 2), ((5,), 4), ((4, 3), 2), ((4, 2), 3), ((3, 4), 1)],
    ids=lambda value: str(value),
)
def test_the_mean_over_all_subsets_is_the_value_of_the_batch(monkeypatch, sizes, most):
    """With micro-batches too, of which some are not larger than the subset."""
    settings = {"accumulate_grad_batches": len(sizes), "max_steps": 1}
    names = [*UNBIASED, *WHOLE]
    expected = logged(CurvatureCallback(names, layers=True), batches(*sizes), **settings)[0]
    drawn = [list(itertools.combinations(range(size), most)) for size in sizes if size > most]
    found = []
    for subsets in itertools.product(*drawn):
        with_subsets(monkeypatch, subsets)
        callback = CurvatureCallback(names, layers=True, max_samples=most)
        found.append(logged(callback, batches(*sizes), **settings)[0])
    assert len(found) == math.prod(math.comb(size, most) for size in sizes if size > most)
    assert all(values.keys() == expected.keys() for values in found)
    assert sum(name.startswith("_layers/") for name in expected) >= 10
    for name, value in expected.items():
        quantity = next(part for part in name.split("/") if part in QUANTITIES)
        of = UNBIASED.get(quantity, float)
        values = [of(one[name]) for one in found]
        assert sum(values) / len(values) == pytest.approx(of(value), rel=1e-9), name
        if quantity in WHOLE | {"grad_norm"}:
            assert max(values) == min(values) == of(value)
        elif not name.startswith("_layers"):
            assert max(values) > min(values)


def test_second_moments_of_the_entries_are_unbiased(monkeypatch):
    """From which `mean_gsnr` and `early_stopping` take their variances, none of which is negative."""
    from lightning_curv.callbacks.monitoring.measurement import Measurement

    seen, original = [], Measurement.entry_moments

    def watched(self):
        moments = list(original(self))
        seen.append(torch.cat([variance.flatten() for _, variance in moments]))
        return iter(moments)

    monkeypatch.setattr(Measurement, "entry_moments", watched)
    loader, settings = batches(4, 3), {"accumulate_grad_batches": 2, "max_steps": 1}
    net = Net()
    logged(CurvatureCallback("mean_gsnr"), loader, net, **settings)
    (expected,) = seen
    gradients = per_sample_gradients(net, 0)
    weights = torch.tensor(
        [1 / 8] * 4 + [1 / 6] * 3, dtype=torch.float64
    )  # two micro-batches count the same
    mean = weights @ gradients
    variance = weights @ (gradients - mean).square() / (1 - weights.square().sum())
    torch.testing.assert_close(expected, variance)
    seen.clear()
    for subsets in itertools.product(
        itertools.combinations(range(4), 2), itertools.combinations(range(3), 2)
    ):
        with_subsets(monkeypatch, subsets)
        logged(CurvatureCallback("mean_gsnr", max_samples=2), loader, **settings)
        chosen = gradients[[*subsets[0], *(4 + n for n in subsets[1])]]
        estimate = (chosen - mean).square().mean(0) / (1 - weights.square().sum())
        torch.testing.assert_close(seen[-1], estimate)
        assert (estimate > 0).all()
    torch.testing.assert_close(torch.stack(seen).mean(0), expected, rtol=1e-9, atol=1e-15)


def test_the_curvature_of_a_hand_written_loss_is_unbiased(monkeypatch):
    """Its columns come from second derivatives at `output=`, those of several losses from each."""

    def loss(output, y):
        return -output.log_softmax(1)[torch.arange(len(y)), y].mean() + 0.1 * F.mse_loss(
            output, output.detach() + 1
        )

    options = {"quantities": ["ggn_trace_exact", "ggn_trace"], "output": "net"}
    expected = logged(CurvatureCallback(**options), batches(5), Net(loss=loss))[0]
    found = []
    for subset in itertools.combinations(range(5), 2):
        with_subsets(monkeypatch, [subset])
        found.append(
            logged(CurvatureCallback(**options, max_samples=2), batches(5), Net(loss=loss))[0]
        )
    for name, value in expected.items():
        assert sum(values[name] for values in found) / 10 == pytest.approx(value, rel=1e-9)


def test_norms_are_those_of_the_chosen_samples(monkeypatch):
    net = Net()
    with_subsets(monkeypatch, [[1, 2, 5]])
    values = logged(CurvatureCallback("sample_norms", max_samples=3), batches(6), net)[0]
    norms = per_sample_gradients(net, 0)[[1, 2, 5]].norm(dim=1)
    assert values["sample_norm_max"] == pytest.approx(norms.max().item())
    assert values["sample_norm_median"] == pytest.approx(norms.median().item())


def test_no_variance_is_negative():
    """Where the gradients of all samples are large and nearly equal, a difference of moments would be."""

    class Shifted(Net):
        def __init__(self):
            super().__init__(
                loss=lambda output, y: (100 * output.sum(1) + output.square().sum(1)).mean()
            )

    names = ["grad_variance", "norm_test", "inner_product_test", "orthogonality_test"]
    for seed in range(5):
        values = logged(
            CurvatureCallback(names, max_samples=2, seed=seed, mc_samples=0),
            batches(*[6] * 4),
            Shifted(),
        )
        assert len(values) == 4
        for found in values.values():
            assert found.keys() == {*names}
            assert min(found.values()) > 0


# --- what it costs ----------------------------------------------------------------------------------------------------


class Own(torch.autograd.Function):
    """An op of the user's own, which nobody can record."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        return g * p, (g * x).sum(0)


class WithOwnOp(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return Own.apply(self.net(x), self.gain)


@pytest.mark.parametrize(
    ("quantity", "columns"), [("sample_norms", 1), ("ggn_trace", 2), ("ggn_trace_exact", 2)]
)
def test_an_op_without_a_rule_costs_a_pass_per_chosen_sample(monkeypatch, quantity, columns):
    passes, original = [], Join._calls
    monkeypatch.setattr(
        Join,
        "_calls",
        lambda self, gs, shape: (passes.append(len(gs)), original(self, gs, shape))[1],
    )

    def count(most):
        passes.clear()
        callback = CurvatureCallback(quantity, max_samples=most, mc_samples=columns)
        logged(callback, batches(8), WithOwnOp())
        return sum(passes)

    assert count(None) == count(8) == 8 * columns
    assert count(3) == 3 * columns
    assert count(1) == columns


# --- what it leaves alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [6, 100])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 3)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_subset_of_all_samples_changes_no_value(most, sizes, accumulate):
    settings = {"accumulate_grad_batches": accumulate}
    expected = logged(CurvatureCallback("all", layers=True), batches(*sizes), **settings)
    assert len(expected) == 2 // accumulate
    assert (
        logged(CurvatureCallback("all", layers=True, max_samples=most), batches(*sizes), **settings)
        == expected
    )


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 2}),
        (Net, {"gradient_clip_val": 0.1}),
        (ManualNet, {}),
        (WithOwnOp, {}),
    ],
    ids=str,
)
def test_parameters_are_bit_identical_with_and_without(net, settings):
    """The dropout masks too, which are drawn from torch's own generator."""
    one, other = net(optimizer=adam, dropout=0.5), net(optimizer=adam, dropout=0.5)
    loader = batches(6, 6, 5, 6)
    torch.manual_seed(3)
    plain = logged(CurvatureCallback(every_n_steps=0), loader, one, **settings)
    torch.manual_seed(3)
    found = logged(CurvatureCallback("all", max_samples=2), loader, other, **settings)
    assert not plain
    assert found
    assert_same_parameters(one, other)
    assert_nothing_left_behind(other)


def diag_ggn(params):
    return DiagGGNOptimizer(params, lr=0.3, damping=0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", [kfac, diag_ggn])
def test_curvature_optimizers_get_the_whole_batch(optimizer, accumulate):
    one, other, settings = Net(optimizer), Net(optimizer), {"accumulate_grad_batches": accumulate}
    logged(CurvatureCallback(every_n_steps=0), batches(6, 6, 6, 6), one, **settings)
    logged(CurvatureCallback("all", max_samples=2), batches(6, 6, 6, 6), other, **settings)
    assert_same_parameters(one, other)


class Asks(torch.optim.SGD):
    """An optimizer that wants squares of gradients."""

    def required_extensions(self):
        return (SumGradSquared(),)


def test_what_is_supplied_is_of_the_whole_batch_and_then_so_is_what_shares_its_passes():
    class Supplied(Net):
        def on_before_optimizer_step(self, optimizer):
            found.append(
                [
                    (len(p.grad_batch), p.grad_batch.square().sum(0), p.sum_grad_squared)
                    for p in self.net.parameters()
                ]
            )

    found, names = [], ["grad_variance", "mean_gsnr", "ggn_trace_exact"]
    net = Supplied(optimizer=lambda params: Asks(params, lr=0.1))
    callback = CurvatureCallback(names, max_samples=2, extensions=[BatchGrad()])
    values = logged(callback, batches(6), net)[0]
    for size, squares, supplied in found[0]:
        assert size == 6
        torch.testing.assert_close(squares, supplied)
    expected = logged(CurvatureCallback(names), batches(6))[0]
    for name in names[:2]:
        assert values[name] == pytest.approx(expected[name], rel=1e-12)
    assert values["ggn_trace_exact"] != pytest.approx(expected["ggn_trace_exact"], rel=1e-3)


def test_first_order_extensions_of_others_alone_leave_the_columns_capped():
    net, values = Net(), {}
    for most in (None, 2):
        callback = CurvatureCallback(
            ["grad_variance", "ggn_trace_exact"], max_samples=most, extensions=[BatchL2Grad()]
        )
        values[most] = logged(callback, batches(6), Net() if most else net)[0]
    assert values[2]["grad_variance"] == pytest.approx(values[None]["grad_variance"], rel=1e-12)
    assert values[2]["ggn_trace_exact"] != pytest.approx(values[None]["ggn_trace_exact"], rel=1e-3)


def test_subsets_follow_the_seed_and_change_from_batch_to_batch(monkeypatch):
    drawn, original = [], randomness.random_subset

    def recorded(*arguments):
        drawn.append(original(*arguments).tolist())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(randomness, "random_subset", recorded)

    def run(seed):
        drawn.clear()
        values = logged(
            CurvatureCallback("grad_variance", max_samples=3, seed=seed), batches(*[8] * 6)
        )
        return [*drawn], values

    first, again, other = run(0), run(0), run(1)
    assert first == again
    assert first[0] != other[0]
    assert len({tuple(subset) for subset in first[0]}) > 3
    assert all(len(subset) == 3 for subset in first[0])


def test_who_is_chosen_is_independent_of_the_random_labels():
    """Numbers of one stream would be shared by both."""
    for seed in range(20):
        subset, labels = _subsets(seed), torch.Generator().manual_seed(seed)
        assert not torch.isin(
            torch.rand(9, generator=subset), torch.rand(9, generator=labels)
        ).any()


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "3"])
def test_a_number_of_samples_is_positive(most):
    with pytest.raises(
        ValueError, match=f"`max_samples` must be None or a positive number, found {most!r}"
    ):
        CurvatureCallback(max_samples=most)


def test_a_batch_of_none_and_of_one():
    x, y = data(6).tensors
    loader = [(x, y), (x[:1], y[:1]), (x[:0], y[:0]), (x, y)]
    net = Net(loss=lambda output, y: F.cross_entropy(output, y, reduction="sum"))
    values = logged(CurvatureCallback(max_samples=2), loader, net)
    assert {*values} >= {0, 1, 3}
    assert all(math.isfinite(value) for found in values.values() for value in found.values())

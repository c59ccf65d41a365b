"""Generalised Gauss-Newton quantities against brute force; Monte Carlo by convergence."""

import pytest
import torch
import torch.nn.functional as F
from columns import watched_columns
from estimates import RUNS, assert_unbiased
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import NAMES, ROW, assert_close, assert_fields, compute, reference

from lightning_curv import curvature, extensions
from lightning_curv.extensions import (
    KFAC,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    Variance,
)
from lightning_curv.passes import passes
from lightning_curv.passes.passes import Passes

DIAGONALS = [
    (DiagGGNExact, "diag_ggn_exact", "diag_ggn"),
    (BatchDiagGGNExact, "diag_ggn_exact_batch", "diag_ggn_batch"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("extension", "field", "quantity"), DIAGONALS, ids=[field for _, field, _ in DIAGONALS]
)
def test_diagonal_equals_brute_force(extension, field, quantity, name):
    problem = ROW[name].make()
    compute(problem, extension())
    assert_fields(problem, field, reference(quantity, name), ROW[name].rtol)


@pytest.mark.parametrize("name", NAMES)
def test_square_root_reproduces_the_block_of_every_sample(name):
    problem = ROW[name].make()
    output = problem.model(problem.X)
    compute(problem, SqrtGGNExact())
    for key, p in problem.parameters().items():
        if p.grad is None:
            continue
        V = p.sqrt_ggn_exact
        assert V.shape == (output[0].numel(), len(output), *p.shape), key
        V = V.reshape(*V.shape[:2], -1)
        blocks = torch.stack([V[:, n].T @ V[:, n] for n in range(V.shape[1])])
        assert_close(blocks, reference("ggn", name)[key], ROW[name].rtol, key)


@pytest.mark.parametrize("name", ["mlp_sigmoid", "vit", "segmentation_ce"])
def test_extensions_do_not_disturb_each_other(name):
    problem = ROW[name].make()
    compute(problem, SqrtGGNExact(), DiagGGNMC(), DiagGGNExact(), KFAC(), BatchDiagGGNExact())
    for _, field, quantity in DIAGONALS:
        assert_fields(problem, field, reference(quantity, name))


def test_square_root_of_chosen_samples():
    problem = ROW["cnn_inplace_groups"].make()
    compute(problem, SqrtGGNExact(subsampling=[2, 0]))
    for key, p in problem.parameters().items():
        V = p.sqrt_ggn_exact.reshape(3, 2, -1)
        for column, n in enumerate([2, 0]):
            block = reference("ggn", "cnn_inplace_groups")[key][n]
            assert_close(V[:, column].T @ V[:, column], block, label=key)


# --- Monte Carlo -----------------------------------------------------------------------------------------------------

SAMPLES = 8


@pytest.mark.parametrize(
    "name", ["mlp_sigmoid", "mlp_mse", "mlp_bce", "segmentation_ce", "segmentation_mse"]
)
def test_monte_carlo_is_unbiased(name):
    generator = torch.Generator().manual_seed(0)
    problem = ROW[name].make()
    runs = {key: [] for key in problem.parameters()}
    for _ in range(RUNS):
        compute(
            problem,
            DiagGGNMC(SAMPLES),
            BatchDiagGGNMC(SAMPLES),
            SqrtGGNMC(SAMPLES),
            generator=generator,
        )
        for key, p in problem.parameters().items():
            assert p.sqrt_ggn_mc.shape == (SAMPLES, len(problem.X), *p.shape)
            runs[key].append((p.diag_ggn_mc, p.diag_ggn_mc_batch, (p.sqrt_ggn_mc**2).sum(0)))
    for key, run in runs.items():
        diagonals, batches, roots = map(torch.stack, zip(*run))
        assert_unbiased(diagonals, reference("diag_ggn", name)[key], f"{key}.diag_ggn_mc")
        assert_unbiased(batches, reference("diag_ggn_batch", name)[key], f"{key}.diag_ggn_mc_batch")
        assert_unbiased(roots, reference("diag_ggn_batch", name)[key], f"{key}.sqrt_ggn_mc")


def test_more_samples_mean_less_noise():
    """The standard deviation falls as 1/√M: 16 times the samples, a quarter of the deviation (within a factor 1.5)."""
    generator = torch.Generator().manual_seed(0)
    problem = ROW["mlp_sigmoid"].make()
    p = problem.model[0].weight
    deviation = {}
    for mc_samples in (2, 32):
        estimates = []
        for _ in range(RUNS):
            compute(problem, DiagGGNMC(mc_samples), generator=generator)
            estimates.append(p.diag_ggn_mc.sum())
        deviation[mc_samples] = torch.stack(estimates).std().item()
    assert 4 / 1.5 < deviation[2] / deviation[32] < 4 * 1.5


MONTE_CARLO = [
    (DiagGGNMC, "diag_ggn_mc"),
    (BatchDiagGGNMC, "diag_ggn_mc_batch"),
    (SqrtGGNMC, "sqrt_ggn_mc"),
    (KFAC, "kfac"),
]


@pytest.mark.parametrize(
    ("extension", "field"), MONTE_CARLO, ids=[field for _, field in MONTE_CARLO]
)
def test_generator_decides_the_samples(extension, field):
    def run(seed):
        problem = ROW["mlp_sigmoid"].make()
        compute(problem, extension(mc_samples=3), generator=torch.Generator().manual_seed(seed))
        value = getattr(problem.model[0].weight, field)
        return value[0] if field == "kfac" else value

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("extension", [extension for extension, _ in MONTE_CARLO])
def test_global_random_state_is_untouched(extension):
    problem = ROW["mlp_sigmoid"].make()
    before = torch.get_rng_state()
    compute(problem, extension())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_complete_root_serves_all(monkeypatch):
    """With `SqrtGGNExact`, whose columns are one per class, `DiagGGNExact` makes no passes of its own."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    weight, X, y = model[2].weight, torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 0])
    found, columns = {}, watched_columns(monkeypatch)
    for wanted in [
        (DiagGGNExact(),),
        (DiagGGNExact(),),
        (DiagGGNExact(), SqrtGGNExact()),
    ]:  # the first one probes
        columns.clear()
        with curvature(*wanted, batch_size=5):
            F.cross_entropy(model(X), y).backward()
        found[len(wanted)] = weight.diag_ggn_exact, len(columns)
    assert_close(found[2][0], found[1][0])
    assert_close(weight.sqrt_ggn_exact.square().sum((0, 1)), found[1][0])
    assert found[2][1] - found[1][1] == 1  # four columns instead of three


@pytest.mark.parametrize(
    "extension",
    [
        DiagGGNExact(),
        BatchDiagGGNExact(),
        SqrtGGNExact(),
        DiagHessian(),
        BatchDiagHessian(),
        KFLR(),
    ],
)
def test_columns_one_at_a_time_are_those_at_once(monkeypatch, extension):
    """Products with and without shared positions, a normalisation, an embedding."""
    net = nn.Sequential(
        nn.Embedding(7, 4), nn.Conv1d(5, 3, 2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(9, 4)
    )
    net, X, y, found = net.double(), torch.randint(7, (6, 5)), torch.randint(4, (6,)), []
    for bytes_ in (passes.COLUMN_BYTES, 1):
        monkeypatch.setattr(passes, "COLUMN_BYTES", bytes_)
        with curvature(extension, batch_size=6):
            F.cross_entropy(net(X), y).backward()
        found.append(tree_leaves([getattr(p, extension.savefield) for p in net.parameters()]))
    for one_by_one, at_once in zip(found[1], found[0], strict=True):
        assert_close(one_by_one, at_once)


@pytest.mark.parametrize(
    ("old", "new"),
    [("Gradient", "LossGradient"), ("Exact", "ExactGGN"), ("Sampled", "MonteCarloGGN")],
)
def test_names_of_sources_in_version_0_1_work_with_a_warning(old, new):
    with pytest.warns(DeprecationWarning, match=f"`{old}` is called `{new}`"):
        assert getattr(extensions, old) is getattr(extensions, new)


@pytest.mark.parametrize("name", NAMES)
def test_columns_in_one_pass_are_those_of_a_pass_each(monkeypatch, name):
    found, passes_made, backward = {}, [], Passes.backward
    monkeypatch.setattr(
        Passes,
        "backward",
        lambda self, *given, **options: (
            passes_made.append(options) or backward(self, *given, **options)
        ),
    )
    for limit in (0, 2**40):
        monkeypatch.setattr(passes, "STACK_BYTES", limit)
        problem = ROW[name].make()
        passes_made.clear()
        compute(problem, DiagGGNExact(), SqrtGGNExact(), KFLR())
        found[limit] = problem, sum(bool(options.get("stacked")) for options in passes_made)
    assert not found[0][1]
    for one, other in zip(*(f[0].model.parameters() for f in found.values()), strict=True):
        for field in ("diag_ggn_exact", "sqrt_ggn_exact", "kflr"):
            made = [tree_leaves(getattr(parameter, field, [])) for parameter in (one, other)]
            for expected, tensor in zip(*made, strict=True):
                assert_close(tensor, expected)


# A column that is left alone takes a plain pass.
@pytest.mark.parametrize(("at_once", "expected"), [(100, [3]), (2, [2])])
def test_small_networks_take_one_pass_for_many_columns(monkeypatch, at_once, expected):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    X, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 0])
    bytes_of_column = 5 * (3 + 4) * 8
    backward, stacks, exact = Passes.backward, [], {}

    def watched(self, outputs, inputs, seeds, **options):
        if options.get("stacked"):
            stacks.append(len(seeds[0]))
        return backward(self, outputs, inputs, seeds, **options)

    monkeypatch.setattr(Passes, "backward", watched)
    for limit in (0, at_once * bytes_of_column):
        monkeypatch.setattr(passes, "STACK_BYTES", limit)
        with curvature(DiagGGNExact(), KFLR(), check=True):
            F.cross_entropy(model(X), y).backward()
        exact[limit] = [p.diag_ggn_exact for p in model.parameters()] + model[0].weight.kflr
    assert stacks == expected
    for one, other in zip(*exact.values(), strict=True):
        assert_close(other, one)


@pytest.mark.parametrize("anomalies", [False, True])
def test_hooks_and_retained_gradients_get_what_they_can_use(anomalies):
    """A value's hooks see our passes, too; what it retains is the gradient of the user's alone."""
    first, second, X = nn.Linear(3, 4), nn.Linear(4, 5), torch.randn(6, 3)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    sizes, kept, retained = [], [], []

    def loss():
        h = first(X).tanh()
        h.retain_grad()
        z = h * 2
        z.register_hook(lambda g: sizes.append(g.norm().item()))
        z.register_hook(kept.append)
        retained.append(h)
        return F.cross_entropy(second(z), y)

    loss().backward()
    with (
        torch.autograd.set_detect_anomaly(anomalies),
        curvature(DiagGGNExact(), DiagHessian(), Variance()),
    ):
        loss().backward()
    assert torch.equal(retained[0].grad, retained[1].grad)
    assert torch.equal(kept[0], kept[-1])
    assert torch.stack(kept).norm(dim=(1, 2)).tolist() == pytest.approx(sizes)


def test_columns_take_a_pass_each_where_anomalies_are_looked_for():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4))
    with torch.autograd.detect_anomaly(check_nan=True), curvature(DiagGGNExact()):
        F.cross_entropy(model(torch.randn(5, 3)), torch.tensor([0, 1, 2, 3, 0])).backward()
    assert model[0].weight.diag_ggn_exact.isfinite().all()


def test_columns_pass_through_dropout_below_a_checkpoint(monkeypatch):
    """It is drawn again in the pass: where that cannot be mapped, every column takes a pass of its own."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    X, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 0])
    exact = []
    for limit in (0, passes.STACK_BYTES):
        monkeypatch.setattr(passes, "STACK_BYTES", limit)
        torch.manual_seed(0)
        with curvature(DiagGGNExact()):
            h = checkpoint(model[:3], X, use_reentrant=False)
            F.cross_entropy(model[3](h), y).backward()
        exact.append([p.diag_ggn_exact for p in model.parameters()])
    for one, other in zip(*exact, strict=True):
        assert_close(other, one)

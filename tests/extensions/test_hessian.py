"""Hessian diagonals and products against brute force."""

import copy
import functools
import gc
import io
import pickle
import weakref
from dataclasses import replace

import hessian_oracle
import oracle
import pytest
import torch
from columns import watched_columns
from losses_table import LOSS
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm
from zoo import NAMES, ROW, Problem, assert_close, assert_fields, compute

from lightning_curv import curvature, extend
from lightning_curv.extensions import (
    GGNMP,
    HMP,
    PCHMP,
    BatchDiagHessian,
    DiagGGNExact,
    DiagHessian,
    block_products,
)
from lightning_curv.rules.fallback import FallbackWarning
from lightning_curv.second_derivatives import local_curvature

DIAGONALS = [
    (DiagHessian, "diag_h", "diag_hessian"),
    (BatchDiagHessian, "diag_h_batch", "diag_hessian_batch"),
]


@functools.cache
def blocks(quantity, name):
    with sdpa_kernel(SDPBackend.MATH):  # the oracle differentiates twice by torch alone
        return getattr({"hessian": hessian_oracle, "ggn": oracle}[quantity], quantity)(
            ROW[name].make()
        )


def diagonal(name, per_sample):
    params = dict(ROW[name].make().model.named_parameters())
    batch = {
        k: torch.stack([b.diagonal().reshape(params[k].shape) for b in v])
        for k, v in blocks("hessian", name).items()
    }
    return batch if per_sample else {k: v.sum(0) for k, v in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_diagonals_equal_brute_force(name):
    problem = ROW[name].make()
    compute(problem, DiagHessian(), BatchDiagHessian())
    assert_fields(problem, "diag_h", diagonal(name, per_sample=False), ROW[name].rtol)
    assert_fields(problem, "diag_h_batch", diagonal(name, per_sample=True), ROW[name].rtol)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("extension", "quantity"), [(HMP, "hessian"), (GGNMP, "ggn")], ids=["hmp", "ggnmp"]
)
def test_products_equal_brute_force(extension, quantity, name):
    problem = ROW[name].make()
    compute(problem, extension())
    generator = torch.Generator().manual_seed(0)
    for key, p in problem.parameters().items():
        if p.grad is None:
            continue
        V = torch.randn(3, *p.shape, dtype=p.dtype, generator=generator)
        block = blocks(quantity, name)[key].sum(0)
        product = getattr(p, extension().savefield)
        expected = (V.reshape(3, -1).double() @ block.double()).reshape(V.shape).to(p.dtype)
        assert_close(product(V), expected, ROW[name].rtol, key)
        assert_close(product(V[0]), product(V)[0], label=key)


# rows with parameters whose own ops have second derivatives, which are no part of the PCH
BENT = {
    *(
        "broadcast",
        "constant_branch",
        "constant_branch_batch_of_one",
        "encoder_decoder",
        "gru_sequence_first",
    ),
    *(
        "hypernetwork",
        "layer_reused",
        "lstm_tagger",
        "spectral_norm",
        "tied_embedding",
        "unusual_ops",
        "weight_norm",
    ),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BENT])
def test_ggn_and_residuals_add_up_to_the_hessian(name, monkeypatch):
    for kind in (local_curvature.DiagonalResidual, local_curvature.EigenResidual):
        monkeypatch.setattr(kind, "positive", lambda self, modify: self)
    problem = ROW[name].make()
    compute(problem, PCHMP())
    for key, p in problem.parameters().items():
        if p.grad is not None:
            V = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
            expected = blocks("hessian", name)[key].sum(0).double() @ V.flatten().double()
            assert_close(p.pchmp(V), expected.reshape(V.shape).to(p.dtype), ROW[name].rtol, key)


@pytest.mark.parametrize("first", [False, True])
def test_products_see_the_parameters_of_the_backward_pass(first):
    """Whether the first product is before the optimizer's step or after it."""
    problems = [ROW["mlp_sigmoid"].make() for _ in range(2)]
    for problem in problems:
        compute(problem, HMP(), GGNMP(), PCHMP())
    moved, kept = ([*problem.model.parameters()] for problem in problems)
    V = [torch.randn_like(p) for p in kept]
    if first:
        for p, v in zip(moved, V):
            assert_close(p.hmp(v), p.hmp(2 * v) / 2)
    torch.optim.SGD(moved, lr=1.0).step()
    for p, q, v in zip(moved, kept, V):
        now, version = p.detach().clone(), p._version
        for field in ("hmp", "ggnmp", "pchmp"):
            assert torch.equal(getattr(p, field)(v), getattr(q, field)(v))
        assert torch.equal(p, now)
        assert p._version == version


@pytest.mark.parametrize("extension", [HMP(), GGNMP(), PCHMP()], ids=lambda e: e.savefield)
def test_products_refuse_inputs_that_were_overwritten(extension):
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, extension)
    problem.X.zero_()
    weight = problem.model[0].weight
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        getattr(weight, extension.savefield)(torch.ones_like(weight))


def test_only_parameters_that_a_pass_reads_are_copied(monkeypatch):
    copied = []
    snapshot = block_products.Snapshot
    monkeypatch.setattr(
        block_products, "Snapshot", lambda found: copied.extend(found) or snapshot(found)
    )
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, GGNMP())
    first, second, third = (problem.model[i].weight for i in (0, 2, 4))
    assert {id(second), id(third)} <= {*map(id, copied)}
    assert id(first) not in {*map(id, copied)}


def test_of_linear_layers_no_weight_gradient_is_differentiated(monkeypatch):
    """Passes end at the ops, which are applied to vectors and transposed without autograd."""
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, HMP(), GGNMP(), PCHMP())
    grad = torch.autograd.grad

    def watched(outputs, inputs, *args, **kwargs):
        for found in inputs if isinstance(inputs, (list, tuple)) else [inputs]:
            assert not isinstance(found, nn.Parameter)
            assert not isinstance(found, GradientEdge) or "Accumulate" not in found.node.name()
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for p in problem.model.parameters():
        for field in ("hmp", "ggnmp", "pchmp"):
            assert getattr(p, field)(torch.randn_like(p)).any()


def test_products_free_their_graph():
    problem = ROW["mlp_sigmoid"].make()
    gc.disable()
    try:
        with curvature(HMP(), GGNMP(), PCHMP()):
            hidden = problem.model[0](problem.X)
            alive = weakref.ref(hidden)
            loss = F.cross_entropy(problem.model[1:](hidden), problem.y)
            loss.backward()
        del loss, hidden
        for p in problem.model.parameters():
            for field in ("hmp", "ggnmp", "pchmp"):
                if hasattr(p, field):
                    delattr(p, field)
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("extension", [HMP(), GGNMP(), PCHMP("curv")], ids=repr)
def test_a_model_with_products_is_saved_without_their_graph(extension):
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, extension)
    buffer = io.BytesIO()
    torch.save(problem.model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    twin = copy.deepcopy(problem.model)
    for p, q, r in zip(problem.model.parameters(), loaded.parameters(), twin.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert getattr(p, extension.savefield)(torch.ones_like(p)).shape == p.shape
        gone = getattr(q, extension.savefield)
        again = pickle.loads(pickle.dumps(gone))
        for stub in (gone, again, copy.deepcopy(getattr(p, extension.savefield))):
            with pytest.raises(RuntimeError, match=f"`{extension.savefield}` needs the graph"):
                stub(torch.ones_like(p))


def test_products_refuse_other_shapes():
    problem = ROW["mlp_sigmoid"].make()
    compute(problem, HMP("curv"))
    with pytest.raises(ValueError, match="Expected vectors of shape"):
        problem.model[0].weight.curv(torch.zeros(2))


def test_piecewise_linear_networks_have_as_many_columns_as_the_ggn(monkeypatch):
    columns = watched_columns(monkeypatch)
    counts = {}
    for extension in (DiagGGNExact(), DiagHessian()):
        problem = ROW["cnn_inplace_groups"].make()
        columns.clear()
        compute(problem, extension)
        counts[type(extension).__name__] = len(columns)
    assert counts["DiagHessian"] == counts["DiagGGNExact"] > 0


def hessian_diagonals(model, loss):
    """Entry by entry, by plain autograd."""
    found = {}
    for name, p in model.named_parameters():
        (g,) = torch.autograd.grad(loss(), p, create_graph=True)
        entries = []
        for i, entry in enumerate(g.flatten()):
            (row,) = torch.autograd.grad(entry, p, retain_graph=True)
            entries.append(row.flatten()[i])
        found[name] = torch.stack(entries).reshape(p.shape)
    return found


class Thrice(nn.Module):
    """The same layer below its own output: the columns of a nonlinearity meet in its parameters."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(2):
            x = torch.sigmoid(self.layer(x))
        return self.layer(x)


CURVED = {
    "one hidden layer": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "two": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)
        ),
        (4,),
    ),
    "tied": (Thrice, (3,)),
    "positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)),
        (2, 4),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        (1, 3, 3),
    ),
    "norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
        (4,),
    ),
    "frozen bias": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)),
        (4,),
    ),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", CURVED)
def test_diagonals_of_curved_networks_are_those_of_plain_autograd(name, count):
    """Whether or not the columns of a nonlinearity meet in an entry of a parameter."""
    torch.manual_seed(0)
    make, shape = CURVED[name]
    model = make().double()
    x, y = torch.randn(count, *shape).double(), torch.arange(count) % 3
    expected = hessian_diagonals(model, lambda: F.cross_entropy(model(x), y))
    with curvature(DiagHessian(), BatchDiagHessian()):
        F.cross_entropy(model(x), y).backward()
    for key, p in model.named_parameters():
        assert_close(p.diag_h, expected[key])
        assert_close(p.diag_h_batch.sum(0), expected[key])


def test_a_nonlinearity_upon_the_first_layer_costs_no_pass(monkeypatch):
    """However many units it has: their columns meet in no entry of the layer's parameters."""
    from lightning_curv.passes import passes as module
    from lightning_curv.passes.passes import Passes

    passes = []
    backward = Passes.backward
    monkeypatch.setattr(
        Passes, "backward", lambda self, *args: passes.append(args) or backward(self, *args)
    )
    monkeypatch.setattr(module, "STACK_BYTES", 0)  # columns are counted one by one
    counts = []
    for units in (2, 20):
        model = nn.Sequential(nn.Linear(4, units), nn.Tanh(), nn.Linear(units, 3))
        passes.clear()
        with curvature(DiagHessian()):
            F.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2])).backward()
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


class Gated(nn.Module):
    """Products whose factors depend on each other: hand-written SiLU, and a gate of a gate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        z = self.a(x)
        h = z * z.sigmoid()
        gate = self.b(h).tanh()
        return self.c(gate * (h + gate.exp() * z) / (1 + h * h))


def test_products_of_dependent_factors():
    torch.manual_seed(0)
    problem = replace(
        ROW["mlp_sigmoid"].make(),
        model=Gated().double(),
        X=torch.randn(6, 4).double(),
        y=torch.tensor([0, 1, 2, 2, 1, 0]),
    )
    compute(problem, DiagHessian(), BatchDiagHessian())
    assert_fields(problem, "diag_h", hessian_oracle.diag_hessian(problem))
    assert_fields(problem, "diag_h_batch", hessian_oracle.diag_hessian_batch(problem))


# --- positive-curvature Hessian --------------------------------------------------------------------------------------


class Net(nn.Module):
    """A residual net that shows its pre-activations; φ: sigmoid, cube and a functional softplus."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        self.z = [self.a(x)]
        self.h = [self.z[0].sigmoid()]
        self.z.append(self.b(self.h[0]))
        self.h.append(F.softplus(self.z[1]))
        self.z.append(self.h[0] + self.h[1])
        self.h.append(self.z[2] ** 3)
        return self.c(self.h[2])


def second_derivatives(z):
    s = z[0].sigmoid()
    t = z[1].sigmoid()
    return [s * (1 - s) * (1 - 2 * s), t * (1 - t), 6 * z[2]]


@pytest.mark.parametrize(
    ("modify", "function"), [("clip", lambda r: r.clamp(min=0)), ("abs", torch.abs)]
)
def test_positive_curvature_hessian_equals_its_dense_construction(modify, function):
    torch.manual_seed(0)
    model, X, y = Net().double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    expected = {}
    for name, p in model.named_parameters():
        total = torch.zeros(p.numel(), p.numel(), dtype=p.dtype)
        for n in range(6):
            output = model(X[n : n + 1])
            loss = F.cross_entropy(output, y[n : n + 1]) / 6
            g = torch.autograd.grad(loss, model.h, retain_graph=True)
            second = [d * g_k for d, g_k in zip(second_derivatives(model.z), g)]
            total += hessian_oracle.residual_part(loss, model.z, second, p, function)
            J = torch.stack([oracle.gradient(entry, [p])[0].flatten() for entry in output[0]])
            q = output[0].softmax(0)
            total += J.T @ ((q.diag() - q.outer(q)) / 6) @ J
        expected[name] = total.detach()
    with curvature(PCHMP(modify=modify), HMP()):
        F.cross_entropy(model(X), y).backward()
    for name, p in model.named_parameters():
        V = torch.randn(2, *p.shape, dtype=p.dtype)
        assert_close(p.pchmp(V), (V.flatten(1) @ expected[name]).reshape(V.shape), label=name)
    V = torch.randn(5, 4).double()
    assert not torch.allclose(model.a.weight.pchmp(V), model.a.weight.hmp(V))


def test_modify_is_checked():
    with pytest.raises(ValueError, match="`modify` must be 'clip' or 'abs', found 'square'"):
        PCHMP(modify="square")


@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_weight_norm_has_the_hessian_of_its_formula(dim):
    """torch's own second derivative takes the norm as given where the norm runs over leading or trailing axes."""
    torch.manual_seed(0)
    layer = weight_norm(nn.ConvTranspose1d(2, 2, 3, bias=False).double(), dim=dim)
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Flatten()), torch.randn(4, 2, 4).double()
    case = Problem(model, x, torch.tensor([0, 3, 2, 5]), LOSS["ce"])
    before = model(x)
    compute(case, DiagHessian(), HMP())
    assert torch.equal(before, model(x))
    for name, block in hessian_oracle.hessian(case).items():
        p, expected = case.parameters()[name], block.sum(0)
        assert_close(expected, expected.mT, label=name)
        units = torch.eye(p.numel()).to(p).reshape(-1, *p.shape)
        assert_close(p.hmp(units).reshape(expected.shape), expected, label=name)
        assert_close(p.diag_h, expected.diagonal().reshape(p.shape), label=name)


def test_extended_modules_keep_the_graph_for_products():
    model, lossfunc = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
    loss = lossfunc(model(torch.ones(4, 3)), torch.zeros(4, 2))
    with curvature(HMP()):
        loss.backward()
    assert_close(model.bias.hmp(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 0.0]))


def hessian_block(loss, weight):
    """The Hessian of ``loss(weight)``, by plain autograd."""
    found = torch.autograd.functional.hessian(loss, weight.detach().clone())
    return found.reshape(weight.numel(), weight.numel())


def assert_diagonals(loss, weight):
    """Both diagonals of ``loss(weight)`` equal brute force."""
    expected = hessian_block(loss, weight).diagonal().reshape(weight.shape)
    with curvature(DiagHessian()):
        loss(weight).backward()
    assert_close(weight.diag_h, expected)
    with curvature(BatchDiagHessian()):
        loss(weight).backward()
    assert_close(weight.diag_h_batch.sum(0), expected)


DIFFERENCES = {
    "mse": lambda h: F.mse_loss(h.sin(), h.cos(), reduction="none"),
    "smooth_l1": lambda h: F.smooth_l1_loss(h.sin(), h.cos(), reduction="none", beta=3.0),
    "huber": lambda h: F.huber_loss(h.sin(), h.cos(), reduction="none", delta=3.0),
    "logaddexp": lambda h: torch.logaddexp(h.sin(), h.cos()),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_function_of_the_difference_of_two_activations_is_curved(name):
    """Its second derivatives annihilate what is the same for both."""
    weight, X, y = nn.Parameter(torch.randn(3, 3).double()), *torch.randn(2, 4, 3).double()
    assert_diagonals(lambda w: F.mse_loss(DIFFERENCES[name](X @ w), y), weight)


TRANSFORMS = {
    "softmax": lambda p: p.softmax(1),
    "cubes": lambda p: (p - p.flip(1)).pow(3),
    "squares": lambda p: (p[:, :1] - p[:, 1:2]).square().expand(2, 3),
    "exponentials": lambda p: (p - p.roll(1, 1)).exp(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_parameter_behind_a_function_of_differences_is_curved(name):
    parameter, X = nn.Parameter(torch.randn(2, 3).double()), torch.randn(4, 3).double()
    y = torch.randn(4, 2).double()
    assert_diagonals(lambda p: F.mse_loss(F.linear(X, TRANSFORMS[name](p)), y), parameter)


def masked_with_infinity(op):
    """An op of entries of which some are -inf, and what it makes of them not taken."""

    def masked(h):
        mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 0, 1]]).bool()
        infinite = torch.full_like(h, -torch.inf)
        return torch.where(mask, op(h.where(mask, infinite), h.sin().where(mask, infinite)), 0 * h)

    return masked


MASKED = {
    "logaddexp": masked_with_infinity(torch.logaddexp),
    "softmax": masked_with_infinity(lambda h, _: h.softmax(1)),
    "logsumexp": masked_with_infinity(lambda h, _: h.logsumexp(1, keepdim=True).expand(4, 3)),
    "root": masked_with_infinity(lambda h, _: h.abs().nan_to_num(0, 0, 0).sqrt()),
}


@pytest.mark.parametrize("name", MASKED)
def test_entries_that_are_masked_after_they_were_infinite_have_no_curvature(name):
    weight, X, y = nn.Parameter(torch.randn(3, 3).double()), *torch.randn(2, 4, 3).double()

    def loss(w):
        return F.mse_loss(MASKED[name](X @ w), y)

    assert_diagonals(loss, weight)
    with curvature(PCHMP()):
        loss(weight).backward()
    assert weight.pchmp(torch.ones_like(weight)).isfinite().all()


def test_a_second_derivative_that_is_infinite_hides_no_other():
    """The root of zero bends without end; the entry beside it does not."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]).double())
    X = torch.tensor([[0.0], [3.0]]).double()
    with curvature(BatchDiagHessian()):
        (X @ weight).sqrt().square().sum().backward()
    assert not weight.diag_h_batch[0].isfinite().any()  # of the sample that is zero
    assert_close(weight.diag_h_batch[1], torch.zeros(1, 2).double())


class Solved(nn.Module):
    """The parameters are the matrix of a system of equations."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4).double())

    def forward(self, x):
        return torch.linalg.solve(self.matrix + 3 * torch.eye(4), x.T).T

    def summands(self, x):
        return self(x).tanh().square().sum(1)


class SolvedAndLinear(Solved):
    """Parameters of an op with a rule beside them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def summands(self, x):
        return self.layer(self(x)).tanh().square().sum(1)


class OneByOne(SolvedAndLinear):
    """Every sample is a forward pass of its own."""

    def forward(self, x):
        return x @ self.matrix

    def summands(self, x):
        return torch.stack([self.layer(self(row)).tanh().square().sum() for row in x])


class Slope(OneByOne):
    """A derivative of the network by its input is in the loss."""

    def summands(self, x):
        x = x.clone().requires_grad_()
        values = self.layer(self(x).tanh())[:, 0]
        (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        return slope.square().sum(1) + values.square()


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("kind", [Solved, SolvedAndLinear, OneByOne, Slope])
def test_diagonals_of_parameters_of_ops_without_a_rule(kind):
    model, X = kind(), torch.randn(3, 4).double()
    names, params = zip(*model.named_parameters())
    expected = {name: [] for name in names}
    for row in X.split(1):
        gradients = torch.autograd.grad(
            model.summands(row).sum(), params, create_graph=True, allow_unused=True
        )
        for name, p, g in zip(names, params, gradients):
            entries = [] if g is None or not g.requires_grad else g.flatten()
            rows = [oracle.gradient(entry, [p])[0].flatten() for entry in entries]
            diagonal = torch.stack(rows).diagonal() if rows else torch.zeros(p.numel())
            expected[name].append(diagonal.reshape(p.shape))
    with (
        curvature(DiagHessian(), BatchDiagHessian(), batch_size=3),
        pytest.warns(FallbackWarning, match=r"exact but slow, \d+ backward passes.*HessianTraceMC"),
    ):
        model.summands(X).sum().backward()
    for name, p in zip(names, params):
        rows = torch.stack(expected[name]).to(p)
        assert rows.any()
        assert_close(p.diag_h_batch, rows, label=name)
        assert_close(p.diag_h, rows.sum(0), label=name)

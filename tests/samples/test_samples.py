"""The samples: found from the graph, refused where they mix, verified once per structure."""

import pytest
import torch
from refused_ops import Once
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from trap_problems import assert_right, both, problem

from lightning_curv import curvature
from lightning_curv.extensions import KFAC, KFLR, BatchGrad
from lightning_curv.graph.heads import find_heads
from lightning_curv.graph.tape import walk
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.record import record
from lightning_curv.samples import finder
from lightning_curv.samples.batch import Batch
from lightning_curv.samples.rowwise import added_by_row
from lightning_curv.samples.verified import MEMORY
from lightning_curv.samples.weights import Code, Tolerance


class Mixing(nn.Module):
    """Two layers and an op between them that mixes the rows of the batch."""

    def __init__(self, mix):
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(5, 4), nn.Linear(4, 3), mix

    def forward(self, x):
        return self.b(self.mix(self.a(x).tanh()))


def neighbours(h):
    """A graph convolution on a ring of nodes."""
    return h + 0.3 * h.roll(1, 0)


MIXES = {
    "batch_mean": lambda h: h - h.mean(0),
    "graph": neighbours,
    "batch_softmax": lambda h: h.softmax(0),
    "attention_over_the_batch": lambda h: (h @ h.T).softmax(-1) @ h,
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXES)
def test_ops_that_mix_samples_are_refused(name):
    case = problem()
    case.model = Mixing(MIXES[name]).double()
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(NotImplementedError, match=r"mix|batch_norm"), curvature(*both()):
            case.compute_loss().backward()


def test_kronecker_factors_do_not_ask():
    case = problem()
    case.model = Mixing(MIXES["batch_mean"]).double()
    with curvature(KFAC(), KFLR()):
        case.compute_loss().backward()
    assert case.model.a.weight.kfac[0].shape == (4, 4)


def test_every_structure_is_verified_once(monkeypatch):
    passes = []
    backward = Passes.backward
    monkeypatch.setattr(
        Passes, "backward", lambda self, *args: passes.append(args) or backward(self, *args)
    )
    case = problem()
    case.model = Mixing(lambda h: h.sin() * 0.7391 + h.cos()).double()  # a structure of its own
    counts = []
    for _ in range(3):
        passes.clear()
        with curvature(BatchGrad()):
            case.compute_loss().backward()
        counts.append(len(passes))
    assert counts == [2, 0, 0]
    with curvature(BatchGrad(), check=True):
        case.compute_loss().backward()
    assert len(passes) == 2


@pytest.mark.parametrize("tensors", [True, False])
def test_a_size_that_is_given_is_looked_for_in_what_the_network_reads(tensors):
    """Tokens of sequences first, [T, N], flattened for the loss: rows of one sample are not next to each other."""
    model = Mixing(nn.Sequential()).double()
    x, y = torch.randn(3, 5, 5, dtype=torch.float64), torch.randint(3, (3, 5))

    def loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    with curvature(BatchGrad(), batch_size=Batch(5, tensors=[x, y] if tensors else None)):
        loss(x, y).backward()
    for n, found in enumerate(model.a.weight.grad_batch):
        (expected,) = torch.autograd.grad(
            loss(x[:, n : n + 1], y[:, n : n + 1]) / 5, model.a.weight
        )
        torch.testing.assert_close(found, expected)


def test_what_is_constant_belongs_to_what_is_remembered():
    """A table of constants and one of the batch make graphs of the same structure."""
    model = Mixing(nn.Sequential()).double()
    table, x = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    y = torch.randint(4, (4,))
    with curvature(BatchGrad(), batch_size=Batch(4, tensors=[x, y])):
        F.cross_entropy(model(x) @ model(table).T, y).backward()
    with (
        pytest.raises(NotImplementedError, match="samples mix"),
        curvature(BatchGrad(), batch_size=Batch(4, tensors=[x, y, table])),
    ):
        F.cross_entropy(model(x) @ model(table).T, y).backward()


ALONG = {
    "softmax": lambda h, axis: h.softmax(axis),
    "mean": lambda h, axis: h - h.mean(axis, keepdim=True),
    "roll": lambda h, axis: h.roll(1, axis),
    "flip": lambda h, axis: h.flip(axis),
    "cumsum": lambda h, axis: h.cumsum(axis),
}


@pytest.mark.parametrize("name", ALONG)
def test_an_op_along_another_axis_is_another_structure(name):
    case = problem()
    case.model = Mixing(lambda h: ALONG[name](h, 1)).double()
    with curvature(*both()):
        case.compute_loss().backward()
    assert_right(case)
    case.model.mix = lambda h: ALONG[name](h, 0)
    with pytest.raises(NotImplementedError, match="samples mix"), curvature(BatchGrad()):
        case.compute_loss().backward()


BY = {  # the same op with another number: its rows stay where they are, or meet others
    "rot90": (lambda h: h + torch.rot90(h, 4), lambda h: h + torch.rot90(h, 2)),
    "pad": (lambda h: h + F.pad(h, (0, 0, 0, 1))[:4], lambda h: h + F.pad(h, (0, 0, 1, 0))[:4]),
    "pool": (
        lambda h: F.avg_pool2d(h[None], (1, 1), (1, 1))[0, :3],
        lambda h: F.avg_pool2d(h[None], (2, 1), (1, 1))[0, :3],
    ),
}


@pytest.mark.parametrize("name", BY)
def test_an_op_by_another_number_is_another_structure(name):
    apart, mixing = BY[name]
    case = problem()
    case.X, case.y = case.X[:4], case.y[: len(apart(torch.ones(4, 4)))]
    case.model = Mixing(apart).double()

    def compute():
        with curvature(BatchGrad(), batch_size=len(case.y)):
            case.compute_loss().backward()

    compute()
    rows = F.cross_entropy(case.model(case.X), case.y, reduction="none") / len(case.y)
    found = case.model.a.weight.grad_batch
    for row, g in zip(rows, found):
        expected = torch.autograd.grad(row, case.model.a.weight, retain_graph=True)[0]
        torch.testing.assert_close(g, expected)
    case.model.mix = mixing
    with pytest.raises(NotImplementedError, match="samples mix"):
        compute()


def test_other_batch_sizes_are_other_structures():
    case = problem()
    for size in (6, 4, 1):
        case.X, case.y = case.X[:size], case.y[:size]
        with curvature(*both()):
            case.compute_loss().backward()
        assert_right(case)


LATER = {
    "index": lambda h, index: h + h[index].tanh(),
    "index_select": lambda h, index: h + h.index_select(0, index).tanh(),
    "gather": lambda h, index: h + h.gather(0, index[:, None].expand_as(h)).tanh(),
    "scatter": lambda h, index: h + torch.zeros_like(h).index_add(0, index, h.tanh()),
    "matrix": lambda h, index: h + torch.eye(4, dtype=h.dtype)[index] @ h.tanh(),
}


@pytest.mark.parametrize("name", LATER)
def test_indices_that_change_are_seen_at_once(name):
    """Every sample reads its own row first, that of its neighbour then."""
    case = problem()
    case.model = Mixing(lambda h: LATER[name](h, case.index)).double()
    case.index = torch.arange(4)
    for _ in range(2):
        with curvature(*both()):
            case.compute_loss().backward()
        assert_right(case)
    case.index = torch.arange(4).roll(1)
    with pytest.raises(NotImplementedError, match="samples mix"), curvature(BatchGrad()):
        case.compute_loss().backward()


# --- coupled in the loss ---------------------------------------------------------------------------------------------


def dice(h, t):
    p = h.sigmoid()
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def vicreg(h, t):
    h = h - h.mean(0)
    return (1 - h.std(0)).relu().mean() + (h.T @ h / 5).square().mean()


def ranknet(h, t):
    return F.softplus(h[:, 0] - h[:, :1])[t[:, :1] > t[:, 0]].mean()


def made_once(values, gradients, once=False):
    """A function of the user's whose gradient is computed together with its values."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(gradients(h))
            return values(h)

        @staticmethod
        def backward(ctx, g):
            (gradient,) = ctx.saved_tensors
            return gradient * g.reshape(-1, *[1] * (gradient.ndim - 1))

    if once:
        Made.backward = staticmethod(once_differentiable(Made.backward))
    return Made.apply


class OnceOfMean(torch.autograd.Function):
    """The squared mean over the samples, whose gradient is made from the input, but has no graph."""

    @staticmethod
    def forward(ctx, weight, h):
        ctx.save_for_backward(h)
        ctx.weight = weight
        return weight * h.mean(0).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return None, ctx.weight * g * of_squared_mean(ctx.saved_tensors[0])


def squared_mean(h):
    return h.mean(0).square().sum()


def of_squared_mean(h):
    return 2 * h.mean(0).expand_as(h) / len(h)


COUPLED = {
    "custom": lambda h, t: made_once(squared_mean, of_squared_mean)(h),
    "custom, once differentiable": lambda h, t: made_once(squared_mean, of_squared_mean, once=True)(
        h
    ),
    "custom, of the input": lambda h, t: OnceOfMean.apply(3, h),
    "custom, doubled": lambda h, t: 2 * made_once(squared_mean, of_squared_mean)(h.tanh()),
    "logarithm of margins": lambda h, t: F.multi_margin_loss(h, t.argmax(1)).log1p(),
    "dice": dice,
    "vicreg": vicreg,
    "ranknet": ranknet,
    "rmse": lambda h, t: F.mse_loss(h, t).sqrt(),
    "batch_penalty": lambda h, t: F.mse_loss(h, t) + h.mean(0).square().sum(),
    "contrastive": lambda h, t: F.cross_entropy(h @ h.T, torch.arange(len(h))),
    "sigmoid_pairs": lambda h, t: -F.logsigmoid(h @ (2 * h).T).sum(-1).mean(),
    "absolute_mean": lambda h, t: (h.mean() - 5).abs(),
    "maximum": lambda h, t: h.max(),
    "hinge_of_mean": lambda h, t: F.mse_loss(h, t) + F.relu(1 - h.mean(0)).sum(),
    "pairs_l1": lambda h, t: F.l1_loss(h[:2], h[2:]),
    "total_variation": lambda h, t: (h[1:] - h[:-1]).abs().sum(),
    "margin": lambda h, t: F.margin_ranking_loss(h[:2, 0], h[2:, 0], torch.ones(2, dtype=h.dtype)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples_are_refused(name):
    case = problem()
    target = torch.rand(4, 3, dtype=torch.float64)
    for check in (False, True):
        with (
            pytest.raises(NotImplementedError, match="sample"),
            curvature(BatchGrad(), check=check),
        ):
            COUPLED[name](case.model(case.X), target).backward()


# A number for every sample tells whose it is, also where the second derivative does not show.
APART = {
    "custom": lambda h, t: made_once(lambda h: h.square().sum(1), lambda h: 2 * h)(h).mean(),
    "custom, once differentiable": lambda h, t: made_once(
        lambda h: h.exp().sum(1), torch.exp, once=True
    )(h).mean(),
    "custom in a logarithm": lambda h, t: (
        made_once(lambda h: h.square().sum(1), lambda h: 2 * h)(h).log1p().mean()
    ),
    "custom, of the input": lambda h, t: Once.apply(h) / len(h),
    "margins": lambda h, t: F.multi_margin_loss(h, t.argmax(1)),
    "squared margins": lambda h, t: F.multi_margin_loss(h, t.argmax(1), p=2),
    "margins of labels": lambda h, t: F.multilabel_margin_loss(h, t.argsort(1)),
}


@pytest.mark.parametrize("name", APART)
def test_losses_without_second_derivatives_of_their_own_are_right(name):
    case = problem()
    target = torch.rand(4, 3, dtype=torch.float64)
    parameters = [*case.model.parameters()]
    with curvature(BatchGrad(), check=True):
        APART[name](case.model(case.X), target).backward()
    for n in range(4):
        alone = APART[name](case.model(case.X[n : n + 1]), target[n : n + 1])
        expected = torch.autograd.grad(alone / 4, parameters)
        for parameter, gradient in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)


SECOND = {
    "slices": (
        lambda h: torch.cat([h[0:3] * h[0:3].tanh(), h[3:]]),
        lambda h: torch.cat([h[0:3] * h[1:4].tanh(), h[3:]]),
    ),
    "matrices": (
        lambda h: h + torch.eye(4).double() @ h,
        lambda h: h + torch.ones(4, 4).double() @ h,
    ),
    "factors": (
        lambda h: torch.add(h, h.tanh(), alpha=2),
        lambda h: torch.add(h, h.flip(0).tanh(), alpha=2),
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_graph_that_looks_alike_is_verified_too(name):
    """Apart first, coupled then: slices and matrices without gradient are the same ops."""
    case = problem()
    case.model = Mixing(SECOND[name][0]).double()
    with curvature(*both()):
        case.compute_loss().backward()
    assert_right(case)
    case.model.mix = SECOND[name][1]
    with pytest.raises(NotImplementedError, match="samples mix"), curvature(BatchGrad()):
        case.compute_loss().backward()


MASKED = {
    "where": lambda h, together: torch.where(together.any(1, keepdim=True), h.mean(0), h),
    "masked_fill": lambda h, together: (
        (h @ h.T).masked_fill(~together & ~torch.eye(len(h)).bool(), -torch.inf).softmax(1) @ h
    ),
    "attention": lambda h, together: F.scaled_dot_product_attention(
        *[h[None]] * 3, attn_mask=together[None] | torch.eye(len(h)).bool()
    )[0],
    "fused attention": lambda h, together: F.scaled_dot_product_attention(
        *[h[None, None]] * 3, attn_mask=together[None, None] | torch.eye(len(h)).bool()
    )[0, 0],
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_that_change_are_seen_at_once(name):
    """Masks come with the batch: what they keep apart in one batch they may join in the next."""
    case = problem()
    together = torch.zeros(len(case.X), len(case.X), dtype=torch.bool)
    case.model = Mixing(lambda h: MASKED[name](h, together)).double()
    for _ in range(2):
        with curvature(*both()):
            case.compute_loss().backward()
        assert_right(case)
    together.fill_(True)
    with pytest.raises(NotImplementedError, match="samples mix"), curvature(BatchGrad()):
        case.compute_loss().backward()


def test_masks_within_samples_cost_no_verification(monkeypatch):
    """What keeps samples apart whatever the numbers are is verified once, and for good."""
    case = problem()
    mask = torch.ones(2, 2).tril().bool()

    def attend(h):
        return F.scaled_dot_product_attention(*[h.unflatten(1, (2, 2))] * 3, attn_mask=mask)

    case.model = Mixing(lambda h: attend(h).flatten(1)).double()
    passes = []
    backward = Passes.backward
    monkeypatch.setattr(
        Passes, "backward", lambda self, *args: passes.append(args) or backward(self, *args)
    )
    MEMORY.entries.clear()
    for _ in range(12):
        with curvature(BatchGrad()):
            case.compute_loss().backward()
    assert len(passes) == 2


def test_batch_statistics_cost_one_verification(monkeypatch):
    """Samples that influence each other are not looked at again: other numbers do not part them."""
    layers = [
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
    ]
    model, x, y = (
        nn.Sequential(*layers).double(),
        torch.randn(16, 1, 5, 5).double(),
        torch.arange(16) % 2,
    )
    searches = []
    attempt = finder._attempt
    monkeypatch.setattr(finder, "_attempt", lambda *args: searches.append(args) or attempt(*args))
    MEMORY.entries.clear()
    for _ in range(12):
        with curvature(KFAC()):
            F.cross_entropy(model(x), y).backward()
    assert len(searches) == 1
    assert model[0].weight.kfac[1].shape == (9, 9)


@pytest.mark.parametrize("wrong", [None, 0, 37, 99])
def test_rows_are_read_as_if_all_of_them_were_at_once(wrong):
    """Some rows are looked at first; what is wrong anywhere is found all the same."""
    count = 100
    code = Code.of(count, 1e-16)
    plain = torch.randn(count, 3, dtype=torch.float64)
    order = torch.randperm(count)
    columns = [plain * values[order][:, None] for values in code.values(count)]
    if wrong is not None:
        for column in columns:
            column[wrong] = column[wrong].roll(1)
    found = code.read(plain, columns, (0,), count, Tolerance.exact(1e-16))
    if wrong is None:
        assert torch.equal(found.index, order)
    else:
        assert found is None


def test_samples_at_which_nothing_arrives_are_not_taken_for_verified():
    """Saturated units hide what their inputs depend on: the next batch may not saturate them."""
    case = problem()

    def last_two_meet(h):
        return torch.cat([h[:-2], h[-2:] + h[-2:].mean(0)])

    case.model = Mixing(lambda h: (case.scale * last_two_meet(h)).tanh()).double()
    case.scale = torch.ones(len(case.X), 1).double()
    case.scale[-2:] = 1e9
    with curvature(BatchGrad()):
        case.compute_loss().backward()
    case.scale = torch.ones(len(case.X), 1).double()
    with pytest.raises(NotImplementedError, match="samples mix"), curvature(BatchGrad()):
        case.compute_loss().backward()


def test_a_gate_that_opens_is_found_at_the_tenth_graph():
    """What was verified is believed for a while, and verified again then; `check=True` believes nothing."""
    case = problem()
    case.model = Mixing(lambda h: h + (h - case.threshold).relu().mean(0)).double()
    case.threshold = 100.0

    def run(check=False):
        with curvature(BatchGrad(), check=check):
            case.compute_loss().backward()

    MEMORY.entries.clear()
    run()
    case.threshold = -1.0
    for _ in range(8):
        run()
    with pytest.raises(NotImplementedError, match="samples mix"):
        run()
    with pytest.raises(NotImplementedError, match="samples mix"):
        run()  # what failed is not believed again
    case.threshold = 100.0
    run()
    case.threshold = -1.0
    run()
    with pytest.raises(NotImplementedError, match="samples mix"):
        run(check=True)


# --- nothing but points that the step makes --------------------------------------------------------------------------

POINTS = {
    "linspace": lambda: torch.linspace(0, 1, 6, dtype=torch.float64)[:, None],
    "arange": lambda: torch.arange(6, dtype=torch.float64)[:, None] / 6,
    "grid": lambda: torch.cartesian_prod(*[torch.linspace(0, 1, k).double() for k in (3, 2)]).sum(
        1, keepdim=True
    ),
    "random": lambda: torch.rand(6, 1, dtype=torch.float64),
    "differentiated": lambda: torch.linspace(0, 1, 6, dtype=torch.float64)[
        :, None
    ].requires_grad_(),
}


def residual(model, t):
    t = t.detach().requires_grad_()
    u = model(t)
    (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    return (du + u).square().mean()


RESIDUALS = {
    "equation": residual,
    "by hand": lambda model, t: (model(t) - t.sin()).square().mean(),
    "target": lambda model, t: F.mse_loss(model(t), t.sin()),
    "sum": lambda model, t: F.mse_loss(model(t), t.sin()) + residual(model, t),
}


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("size", ["found", "given", "of the batch"])
@pytest.mark.parametrize("loss", RESIDUALS)
@pytest.mark.parametrize("name", POINTS)
def test_points_that_the_step_makes_are_samples_where_nothing_else_is_read(name, loss, size):
    """Also where the loader draws batches of another size, which the step does not look at."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    sizes = {
        "found": None,
        "given": 6,
        "of the batch": Batch(expected=4, tensors=[torch.zeros(4, 1)]),
    }
    with curvature(BatchGrad(), batch_size=sizes[size]):
        points = POINTS[name]()
        RESIDUALS[loss](model, points).backward()
    for p in model.parameters():
        alone = [
            torch.autograd.grad(RESIDUALS[loss](model, t[None]) / 6, p)[0] for t in points.detach()
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))


def test_points_of_another_number_than_the_batch_are_refused():
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x = torch.rand(4, 1, dtype=torch.float64)
    with (
        pytest.raises(NotImplementedError, match="4 samples"),
        curvature(BatchGrad(), batch_size=4),
    ):
        (F.mse_loss(model(x), x) + RESIDUALS["by hand"](model, POINTS["linspace"]())).backward()


# --- a parameter multiplies the loss ---------------------------------------------------------------------------------

SCALED = {
    "one": lambda s, z, y: (-s[0]).exp() * F.cross_entropy(z, y) + s[0],
    "without a summand": lambda s, z, y: (-s[0]).exp() * F.cross_entropy(z, y),
    "divided": lambda s, z, y: F.cross_entropy(z, y) / s[0].square() + s[0].square().log(),
    "by hand": lambda s, z, y: (-s[0]).exp() * z.square().mean() + s[0],
    "two": lambda s, z, y: (
        torch.stack([F.cross_entropy(z, y), z.square().mean()]) * (-s).exp() + s
    ).sum(),
}


@pytest.mark.parametrize("name", SCALED)
def test_parameters_that_multiply_an_averaged_loss_are_refused(name):
    case, s = problem(), nn.Parameter(torch.tensor([0.3, 0.5], dtype=torch.float64))
    with (
        pytest.raises(NotImplementedError, match="Multiply and add before averaging"),
        curvature(BatchGrad()),
    ):
        SCALED[name](s, case.model(case.X), case.y).backward()


def test_parameters_that_multiply_the_loss_of_every_sample_are_right():
    case, s = problem(), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def loss(x, y):
        return ((-s).exp() * F.cross_entropy(case.model(x), y, reduction="none") + s).mean()

    with curvature(BatchGrad()):
        loss(case.X, case.y).backward()
    n = len(case.X)
    for p in (s, *case.model.parameters()):
        alone = [
            torch.autograd.grad(loss(case.X[i : i + 1], case.y[i : i + 1]) / n, p)[0]
            for i in range(n)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))


# --- entries that the network chooses itself -------------------------------------------------------------------------


class Quantizing(nn.Module):
    """A codebook, whose nearest entry is taken for every sample (van den Oord et al., 2017)."""

    def __init__(self, depth):
        super().__init__()
        hidden = [nn.Linear(5, 4), nn.Tanh()] if depth > 1 else []
        self.encoder = nn.Sequential(*hidden, nn.Linear(4 if hidden else 5, 2))
        self.codebook, self.decoder = nn.Embedding(6, 2), nn.Linear(2, 5)

    def losses(self, x):
        code = self.encoder(x)
        nearest = torch.cdist(code, self.codebook.weight).argmin(1)
        entry = self.codebook.weight[nearest]
        image = self.decoder(code + (entry - code).detach())
        return [(image, x), (entry, code.detach()), (code, entry.detach())]


def by_sample(model, x):
    return sum((a - b).square().mean(1) for a, b in model.losses(x)).mean()


def by_calls(model, x):
    return sum(F.mse_loss(a, b) for a, b in model.losses(x))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("loss", [by_sample, by_calls])
def test_codebooks_are_read_by_the_samples_that_chose_the_entry(depth, loss):
    torch.manual_seed(0)
    model, x = Quantizing(depth).double(), torch.rand(4, 5).double()
    with curvature(BatchGrad(), batch_size=4):
        loss(model, x).backward()
    parameters = [*model.parameters()]
    for n in range(4):
        expected = torch.autograd.grad(loss(model, x[n : n + 1]) / 4, parameters)
        for parameter, gradient in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)


SUMS = {
    "rows": (lambda a, b: (a.square().mean(1) + b.square().mean(1)).mean(), 2),
    "rows and weights": (lambda a, b: (a.square().sum(1) - 3 * b.exp().mean(-1) / 2).sum(), 2),
    "rows and columns": (lambda a, b: (a.square().mean(1) + b.square().mean(0)).mean(), 0),
    "numbers": (lambda a, b: a.square().mean() + b.square().mean(), 0),
    "moved rows": (lambda a, b: (a.square().mean(1) + b.square().flip(0).mean(1)).mean(), 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_losses_per_sample_are_found_where_they_are_added_up(name):
    loss, expected = SUMS[name]
    first, second, x = nn.Linear(3, 4), nn.Linear(3, 4), torch.rand(4, 3)
    with record():
        value = loss(first(x), second(x))
    heads = find_heads(walk(value.grad_fn), value)
    assert len(heads) == 2
    assert [len(added) for added in added_by_row(value, heads, 4).values()] == [2] * (expected > 0)


# --- one sample after the other --------------------------------------------------------------------------------------

LENGTHS = (2, 5, 1, 3)


def cell_by_cell(model, x):
    """States of every sequence by a loop over its own steps."""
    states = []
    for row, length in zip(x, LENGTHS):
        state = x.new_zeros(1, 3)
        for step in range(length):
            state = model(row[step][None], state)
        states.append(state)
    return torch.cat(states)


def sequence_by_sequence(model, x):
    return torch.cat([model(row[None, :length])[1][0] for row, length in zip(x, LENGTHS)])


ONE_BY_ONE = {
    "gru cell": (lambda: nn.GRUCell(3, 3), cell_by_cell),
    "elman cell": (lambda: nn.RNNCell(3, 3), cell_by_cell),
    "gru": (lambda: nn.GRU(3, 3, batch_first=True), sequence_by_sequence),
    "elman": (lambda: nn.RNN(3, 3, batch_first=True), sequence_by_sequence),
}


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_recurrences_may_run_on_one_sample_after_the_other(name):
    build, run = ONE_BY_ONE[name]
    torch.manual_seed(0)
    model, x, y = build().double(), torch.randn(4, 5, 3).double(), torch.arange(4) % 3
    with curvature(BatchGrad(), batch_size=4):
        F.cross_entropy(run(model, x), y).backward()
    losses = F.cross_entropy(run(model, x), y, reduction="none") / 4
    for n, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        for parameter, gradient in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)


def test_bags_of_rows_belong_to_one_sample_each():
    """Multiple-instance learning: bags of other sizes, pooled by attention."""
    torch.manual_seed(0)
    weight, features = nn.Linear(3, 1).double(), nn.Linear(3, 3).double()
    bags, y = [torch.randn(size, 3).double() for size in (2, 5, 1, 3)], torch.arange(4) % 3

    def pooled(bag):
        return (weight(bag).softmax(0) * features(bag).tanh()).sum(0)

    def losses():
        return F.cross_entropy(torch.stack([*map(pooled, bags)]), y, reduction="none") / 4

    with curvature(BatchGrad(), batch_size=4):
        F.cross_entropy(torch.stack([*map(pooled, bags)]), y).backward()
    parameters = [*weight.parameters(), *features.parameters()]
    for n, loss in enumerate(losses()):
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)


# --- experts whose slots hold tokens of any samples ------------------------------------------------------------------


class DenseDispatch(nn.Module):
    """A mixture of experts that moves tokens into slots by products with zeros and ones (Lepikhin et al., 2020)."""

    def __init__(self, act):
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.experts, self.act = nn.Parameter(torch.randn(3, 5, 5)), act

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates = self.router(tokens).softmax(1)
        expert = F.one_hot(gates.argmax(1), 3)
        slot = F.one_hot(((expert.cumsum(0) * expert).sum(1) - 1), len(tokens))
        dispatch = (expert[:, :, None] * slot[:, None]).to(x.dtype)
        routed = torch.einsum("tec,td->ecd", dispatch, tokens)
        out = self.act(torch.einsum("ecd,edf->ecf", routed, self.experts))
        combined = torch.einsum("tec,ecf->tf", dispatch * gates[:, :, None], out)
        return combined.unflatten(0, x.shape[:2]).sum(1)


@pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("act", [torch.relu, torch.tanh])
def test_slots_of_experts_belong_to_the_samples_of_their_tokens(act, length):
    torch.manual_seed(1)
    model = DenseDispatch(act).double()
    x, y = torch.randn(4, length, 5).double(), torch.randint(5, (4,))
    with curvature(BatchGrad(), batch_size=4):
        F.cross_entropy(model(x), y).backward()
    losses = F.cross_entropy(model(x), y, reduction="none") / 4
    for n, loss in enumerate(losses):
        expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        for parameter, gradient in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)


# --- messages that fit -----------------------------------------------------------------------------------------------


def test_a_square_batch_is_told_which_axis_was_taken():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()  # steps first
    x = torch.randn(4, 4, 4, dtype=torch.float64)
    with (
        pytest.raises(NotImplementedError, match="4 entries along another axis too: the first"),
        curvature(BatchGrad(), batch_size=4),
    ):
        layer(x).mean(0).square().mean().backward()


def test_forces_per_atom_are_told_to_be_added_up_by_molecule():
    """Atoms of molecules of several sizes: a loss per atom does not say whose atom it is."""
    torch.manual_seed(0)
    energy = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    molecule = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    first, second = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([1, 3, 4, 4, 6])
    places, measured = torch.randn(7, 3).double(), torch.randn(7, 3).double()

    def errors():
        own = places.clone().requires_grad_()
        distances = (own[first] - own[second]).square().sum(1, keepdim=True)
        (forces,) = torch.autograd.grad(energy(distances).sum(), own, create_graph=True)
        return (forces - measured).square().sum(1)

    with (
        pytest.raises(NotImplementedError, match="add up what the loss has of each sample") as info,
        curvature(BatchGrad(), batch_size=3),
    ):
        errors().mean().backward()
    assert "`batch_size=`" not in str(info.value)
    by_molecule = torch.zeros(3).double().index_add(0, molecule, errors()) / 7
    with curvature(BatchGrad(), batch_size=3):
        (torch.zeros(3).double().index_add(0, molecule, errors()) / 7).sum().backward()
    used = [*energy.parameters()][:-1]  # forces know nothing of what is added to the energy
    for n, loss in enumerate(by_molecule):
        expected = torch.autograd.grad(loss, used, retain_graph=True)
        for parameter, gradient in zip(used, expected):
            torch.testing.assert_close(parameter.grad_batch[n], gradient)

"""KFACOptimizer on networks, its curvature computed by the engine."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFAC, DiagGGNOptimizer, KFACOptimizer, curvature
from lightning_curv.extensions import JacobianExact, JacobianMC
from lightning_curv.optimizers.step.schedule import Schedule

DOUBLE = torch.float64


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(
        *(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
        ),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )


def images(count=96):
    x = torch.randn(count, 1, 8, 8)
    return x, x.flatten(1)[:, :3].argmax(1)


def backward(optimizer, net, x, y, loss=F.cross_entropy):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(optimizer.steps)
    with curvature(*optimizer.required_extensions(), generator=generator):
        value = loss(net(x), y)
        value.backward()
    return value.item()


def fit(optimizer, net, x, y, steps=1, loss=F.cross_entropy, **kwargs):
    losses = []
    for _ in range(steps):
        losses.append(backward(optimizer, net, x, y, loss))
        optimizer.step(**kwargs)
    return losses


def bare(params, **settings):
    settings = {"safeguards": False, **settings}
    return KFACOptimizer(params, lr=1.0, damping=0.1, momentum=0.0, kl_clip=None, **settings)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# Directions


def damped_kronecker(B, A, lam):
    t_a, t_b = A.trace() / len(A), B.trace() / len(B)
    g_b, g_a = (lam * t_b / t_a) ** 0.5, (lam * t_a / t_b) ** 0.5
    return torch.kron(
        B + g_b * torch.eye(len(B), dtype=B.dtype), A + g_a * torch.eye(len(A), dtype=A.dtype)
    )


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_weight_and_bias_are_solved_as_one_dense_block(kind):
    if kind == "linear":
        layer, x, head = nn.Linear(4, 3), torch.randn(10, 4), nn.Identity()
        inputs = x
    else:
        layer, x, head = nn.Conv2d(2, 3, 2), torch.randn(10, 2, 4, 4), nn.Flatten()
        inputs = F.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    layer, x, inputs = layer.double(), x.double(), inputs.double()
    optimizer = bare(layer.parameters(), curvature="exact", positions=None)
    with curvature(*optimizer.extensions, JacobianExact()):
        output = head(layer(x))
        F.mse_loss(output, torch.randn_like(output)).backward()
    g = layer.bias.jacobian_exact.terms[0].canonical().g.flatten(0, 2)  # [V·N·S, o]
    ones = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=DOUBLE)], dim=1)
    block = damped_kronecker(g.T @ g, ones.T @ ones / len(ones), 0.1)
    grad = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], dim=1)
    expected = torch.linalg.solve(block, grad.flatten()).view_as(grad)
    before = flat([layer.weight.flatten(1), layer.bias])
    optimizer.step()
    moved = flat([layer.weight.flatten(1), layer.bias]) - before
    torch.testing.assert_close(moved, -flat([expected[:, :-1], expected[:, -1]]))
    assert optimizer.summary() == {
        "parameter 0 of group 0": "curvature",
        "parameter 1 of group 0": "curvature",
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"eigen": True}, {"max_factor_size": 2}, {"eigen": True, "max_factor_size": 2}]
)
def test_direction_of_a_transposed_convolution_is_that_of_a_convolution(groups, settings):
    """Kernels of one pixel: the same layer with the axes of its weight swapped, and factors that are equal."""
    torch.manual_seed(0)
    ours = nn.ConvTranspose1d(4, 6, 1, groups=groups, bias=False).double()
    peer = nn.Conv1d(4, 6, 1, groups=groups, bias=False).double()
    swapped = lambda w: w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # noqa: E731
    peer.weight.data = swapped(ours.weight.data).clone()
    x, y = torch.randn(5, 4, 3, dtype=DOUBLE), torch.randn(5, 6, 3, dtype=DOUBLE)
    optimizers = [
        bare(layer.parameters(), curvature="exact", positions=None, **settings)
        for layer in (ours, peer)
    ]
    for _ in range(3):
        for layer, optimizer in zip((ours, peer), optimizers):
            optimizer.zero_grad()
            with curvature(*optimizer.extensions):
                F.mse_loss(layer(x).tanh(), y).backward()
            optimizer.step()
        torch.testing.assert_close(swapped(ours.weight.data), peer.weight.data)
    state = io.BytesIO()
    torch.save(optimizers[0].state_dict(), state)
    state.seek(0)
    optimizers[0].load_state_dict(torch.load(state, weights_only=True))
    for layer, optimizer in zip((ours, peer), optimizers):
        optimizer.schedule = Schedule(measure=10**6)
        optimizer.step()
    torch.testing.assert_close(swapped(ours.weight.data), peer.weight.data)


def decoder():
    layers = (
        nn.ConvTranspose2d(1, 2, 2, stride=2, padding=5),
        nn.Tanh(),
        nn.ConvTranspose2d(2, 4, 2),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 7 * 7, 3))


@pytest.mark.parametrize("make", [mlp, cnn, decoder])
def test_ekfac_direction_is_its_definition(make):
    net = make().double()
    x = torch.randn(12, 4, dtype=DOUBLE) if make is mlp else images(12)[0].double()
    y = torch.randint(3, (12,))
    optimizer = bare(net.parameters(), eigen=True, positions=None, factor_decay=0.0)
    optimizer.schedule = Schedule(measure=1, invert=10**6, burn_in=3)
    for _ in range(
        5
    ):  # the last two keep the basis; without decay the moments are those of the last batch
        optimizer.zero_grad()
        with curvature(*optimizer.extensions):
            F.cross_entropy(net(x), y).backward()
        jacobians = {p: p.jacobian_mc for p in net.parameters()}
        before = {p: p.detach().clone() for p in net.parameters()}
        optimizer.step()
    for weight in net.parameters():
        state = optimizer.state[weight]
        if "basis" not in state or state["batched"]:
            continue
        bias = optimizer._parameters.all()[state["bias"]] if "bias" in state else None
        members = [weight] if bias is None else [weight, bias]
        J = [jacobians[p].per_sample() for p in members]
        J = torch.cat([J[0].flatten(3), J[1].unsqueeze(3)], dim=3) if bias is not None else J[0]
        turn = (
            "layout" in state
        )  # a transposed convolution: the axes of the basis are outputs, inputs
        J = J.transpose(2, 3) if turn else J
        grad = (
            weight.grad
            if bias is None
            else torch.cat([weight.grad.flatten(1), bias.grad[:, None]], dim=1)
        )
        grad = grad.transpose(0, 1) if turn else grad
        matrices = [torch.diag(q) if q.dim() == 1 else q for q in state["basis"]]
        Q = matrices[0] if len(matrices) == 1 else torch.kron(*(q.contiguous() for q in matrices))
        moments = (J.flatten(0, 1).flatten(1) @ Q).square().sum(0)
        expected = Q @ ((Q.T @ grad.flatten()) / (moments + 0.1))
        moved = [p.detach() - before[p] for p in members]
        moved = (
            torch.cat([moved[0].flatten(1), moved[1][:, None]], 1) if bias is not None else moved[0]
        )
        moved = moved.transpose(0, 1) if turn else moved
        torch.testing.assert_close(moved.flatten(), -expected)


def rotate(curvature, state):
    """A new eigenbasis."""
    (result,) = curvature.inverted([(state, 0, torch.tensor(0.1))])
    curvature.accept(state, 0, result)


def test_new_basis_inherits_the_diagonal():
    net, x, y = mlp().double(), torch.randn(12, 4, dtype=DOUBLE), torch.randint(3, (12,))
    optimizer = bare(net.parameters(), eigen=True, inverse_interval=1, factor_decay=0.9)
    fit(optimizer, net, x, y, 4)
    state = optimizer.state[net[0].weight]
    old, moments = torch.kron(*state["basis"]), state["moments"].clone()
    rotate(optimizer.curvature, state)  # same factors: same basis
    torch.testing.assert_close(state["moments"], moments)
    state["factors"] = [f + torch.diag(torch.rand(len(f))) for f in state["factors"]]
    rotate(optimizer.curvature, state)
    new = torch.kron(*state["basis"])
    expected = (new.T @ old @ torch.diag(moments.flatten()) @ old.T @ new).diagonal()
    torch.testing.assert_close(state["moments"].flatten(), expected)


def test_few_positions_give_the_factors_in_expectation():
    layer, x = nn.Conv2d(1, 2, 3, dtype=DOUBLE), torch.randn(16, 1, 9, 9, dtype=DOUBLE)
    optimizer = bare(layer.parameters(), positions=8)
    with curvature(JacobianMC(), KFAC()):
        F.mse_loss(layer(x).flatten(1), torch.zeros(16, 98, dtype=DOUBLE)).backward()
    jacobian = layer.weight.jacobian_mc
    sums = [torch.zeros_like(f) for f in layer.weight.kfac]
    block = optimizer._parameters.blocks([(optimizer.param_groups[0], layer.weight)])[0]
    for step in range(300):
        for total, factor in zip(sums, optimizer.curvature.measure({}, block, [jacobian], step)):
            total += factor / 300
    for total, factor in zip(sums, layer.weight.kfac):
        torch.testing.assert_close(total, factor, rtol=0.2, atol=0.05 * factor.abs().max().item())


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"lr": 1.0, "kl_clip": None, "momentum": 0.0}], ids=["auto", "fixed"]
)
def test_one_step_solves_a_quadratic_problem(settings, eigen):
    X, Y = torch.randn(20, 4, dtype=DOUBLE), torch.randn(20, 3, dtype=DOUBLE)
    layer = nn.Linear(4, 3, dtype=DOUBLE)
    optimizer = KFACOptimizer(
        layer.parameters(),
        damping=1e-14,
        curvature="exact",
        eigen=eigen,
        safeguards=False,
        **settings,
    )
    fit(optimizer, layer, X, Y, loss=F.mse_loss)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(20, 1, dtype=DOUBLE)], 1), Y).solution
    torch.testing.assert_close(layer.weight.detach(), solution[:-1].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.detach(), solution[-1], rtol=1e-5, atol=1e-5)


# Training

SETTINGS = {
    "auto": {},
    "eigen": {"eigen": True},
    "reduce": {"weight_sharing": "reduce"},
    "exact": {"curvature": "exact"},
    "empirical": {"curvature": "empirical"},
    "diagonal factors": {"max_factor_size": 8},
    "fixed": {"lr": 0.3, "damping": 0.03, "factor_interval": 2},
    "fixed, relative damping": {"lr": 0.3},
    "fixed, eigen": {"lr": 0.3, "damping": 0.03, "eigen": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_trains_a_network_untuned(name):
    net, (x, y) = cnn(), images()
    optimizer = KFACOptimizer(net.parameters(), **SETTINGS[name])
    losses = fit(optimizer, net, x, y, 30)
    assert losses[-1] < 0.15 * losses[0]
    assert set(optimizer.summary().values()) == {"curvature"}


def test_diagonal_trains_with_its_own_learning_rate():
    net, (x, y) = cnn(), images()
    losses = fit(DiagGGNOptimizer(net.parameters(), lr="auto", damping="auto"), net, x, y, 40)
    assert losses[-1] < 0.5 * losses[0]


def test_sequences_embeddings_and_norms_train():
    net = nn.Sequential(
        nn.Embedding(7, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 7)
    )
    tokens = torch.randint(7, (16, 5))

    def loss(out, y):
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    for eigen in (False, True):
        model = copy.deepcopy(net)
        losses = fit(
            KFACOptimizer(model.parameters(), eigen=eigen),
            model,
            tokens,
            (tokens + 1) % 7,
            30,
            loss,
        )
        assert losses[-1] < 0.2 * losses[0]


# State


def resumed(optimizer, twin):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    return twin


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(eigen, dtype):
    net, (x, y) = cnn(), images(32)
    net, x = net.to(dtype), x.to(dtype)
    optimizer = KFACOptimizer(net.parameters(), eigen=eigen, factor_interval=2, weight_decay=0.01)
    fit(optimizer, net, x, y, 7, loss_fn=lambda: F.cross_entropy(net(x), y))
    other = copy.deepcopy(net)
    twin = resumed(
        optimizer,
        KFACOptimizer(other.parameters(), eigen=eigen, factor_interval=2, weight_decay=0.01),
    )
    for model, opt in ((net, optimizer), (other, twin)):
        fit(opt, model, x, y, 6, loss_fn=lambda model=model: F.cross_entropy(model(x), y))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    assert twin.relative_damping == optimizer.relative_damping


# Traps


def test_jacobians_are_dropped_after_the_step():
    net, (x, y) = cnn(), images(8)
    optimizer = KFACOptimizer(net.parameters())
    backward(optimizer, net, x, y)
    optimizer.step()
    assert not any(hasattr(p, "jacobian_mc") or hasattr(p, "loss_limits") for p in net.parameters())
    with pytest.raises(
        RuntimeError,
        match=r"no parameter whose `.jacobian_mc` was written.*`CurvatureCallback\(\)`",
    ):
        optimizer.step()


def test_accumulation_takes_the_scale():
    """Two equal halves whose losses are divided by two, curvature from the last: the step on one half alone."""
    moves = []
    for parts in (1, 2):
        torch.manual_seed(0)
        net, (x, y) = mlp().double(), (torch.randn(6, 4, dtype=DOUBLE), torch.randint(3, (6,)))
        start = flat(net.parameters())
        optimizer = KFACOptimizer(net.parameters(), curvature="exact")
        optimizer.curvature_scale = parts
        for _ in range(parts):
            with curvature(*optimizer.extensions):
                (F.cross_entropy(net(x), y) / parts).backward()
        optimizer.step()
        moves.append(flat(net.parameters()) - start)
    torch.testing.assert_close(moves[0], moves[1])


def test_frozen_then_unfrozen_layers():
    net, (x, y) = mlp(), (torch.randn(20, 4), torch.randint(3, (20,)))
    optimizer = KFACOptimizer(net.parameters())
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    before = [p.detach().clone() for p in net.parameters()]
    fit(optimizer, net, x, y, 3)
    assert [torch.equal(p, q) for p, q in zip(net.parameters(), before)] == [
        True,
        True,
        False,
        True,
    ]
    assert list(optimizer.summary().values()) == ["frozen", "frozen", "curvature", "frozen"]
    net.requires_grad_(True)
    losses = fit(optimizer, net, x, y, 30)
    assert set(optimizer.summary().values()) == {"curvature"}
    assert losses[-1] < losses[0]
    net[2].bias.requires_grad_(False)
    bias = net[2].bias.detach().clone()
    fit(optimizer, net, x, y, 3)
    assert torch.equal(net[2].bias, bias)


def test_tied_weights_and_unused_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.unused = nn.Embedding(5, 4), nn.Linear(2, 2)
            self.inner = nn.Linear(4, 4)

        def forward(self, tokens):
            return F.linear(
                torch.tanh(self.inner(self.inner(self.embed(tokens)))), self.embed.weight
            )

    net, tokens = Tied(), torch.randint(5, (32, 1))
    unused = net.unused.weight.detach().clone()
    optimizer = KFACOptimizer(net.named_parameters())
    losses = fit(
        optimizer,
        net,
        tokens,
        (tokens + 1) % 5,
        30,
        lambda out, y: F.cross_entropy(out[:, 0], y[:, 0]),
    )
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(net.unused.weight, unused)
    assert optimizer.summary()["`unused.weight`"] == "not seen"
    assert optimizer.summary()["`embed.weight`"] == "curvature"


@pytest.mark.parametrize("eigen", [False, True])
def test_a_single_sample(eigen):
    net = mlp()
    losses = fit(
        KFACOptimizer(net.parameters(), eigen=eigen), net, torch.randn(1, 4), torch.tensor([1]), 10
    )
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in net.parameters())


def test_bfloat16_autocast_pairs_weight_and_bias():
    net, (x, y) = mlp(), (torch.randn(64, 4), torch.randint(3, (64,)))
    optimizer = KFACOptimizer(net.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            with torch.autocast("cpu", torch.bfloat16):
                output = net(x)
            loss = F.cross_entropy(output.float(), y)
            loss.backward()
        optimizer.step()
    assert {len(state.get("factors", [])) for state in optimizer.state.values()} == {0, 2}
    assert optimizer.state[net[0].weight]["factors"][1].shape == (5, 5)


def test_learning_rate_schedule_scales_the_automatic_step():
    moves = []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        net, (x, y) = mlp().double(), (torch.randn(9, 4, dtype=DOUBLE), torch.randint(3, (9,)))
        start = flat(net.parameters())
        optimizer = KFACOptimizer(net.parameters(), curvature="exact")
        assert optimizer.param_groups[0]["lr"] == 1.0
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
        fit(optimizer, net, x, y)
        moves.append(flat(net.parameters()) - start)
    torch.testing.assert_close(moves[1], 0.25 * moves[0])


def test_groups_of_weights_and_biases_keep_their_settings():
    net, (x, y) = mlp(), (torch.randn(9, 4), torch.randint(3, (9,)))
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    optimizer = KFACOptimizer(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 1e-9}]
    )
    before = [p.detach().clone() for p in biases]
    fit(optimizer, net, x, y)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(biases, before))
    assert len(optimizer.state[weights[0]]["factors"]) == 2


def test_copied_optimizer_goes_on():
    net, (x, y) = mlp(), (torch.randn(9, 4), torch.randint(3, (9,)))
    optimizer = KFACOptimizer(net.parameters())
    fit(optimizer, net, x, y, 2)
    both, twin = copy.deepcopy((net, optimizer))
    fit(twin, both, x, y, 2)
    assert twin.steps == 4
    assert optimizer.steps == 2


def test_stochastic_network_with_dropout_trains():
    net, (x, y) = (
        nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)),
        (torch.randn(64, 4), None),
    )
    y = x[:, :3].argmax(1)
    optimizer = KFACOptimizer(net.parameters())
    losses = fit(optimizer, net, x, y, 40, loss_fn=lambda: F.cross_entropy(net(x), y))
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.full_batch is False


@pytest.mark.parametrize("settings", [{}, {"lr": 0.1, "damping": 0.1}, {"eigen": True}])
def test_batch_norm_in_training_mode_takes_its_statistics_as_given(settings):
    x, y = images()
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    ).train()
    losses = fit(KFACOptimizer(net.parameters(), **settings), net, x, y, steps=20)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "settings", [{}, {"eigen": True}, {"lr": 1.0, "damping": 0.1}], ids=["auto", "eigen", "fixed"]
)
def test_micro_batches_make_the_step_of_the_whole_batch(settings, reduction):
    """Factors, least damping, bound on the promise and the quadratic model."""
    net, (x, y) = mlp().double(), (torch.randn(15, 4, dtype=DOUBLE), torch.randint(3, (15,)))
    twin, loss = copy.deepcopy(net), partial(F.cross_entropy, reduction=reduction)
    whole, parts = (
        KFACOptimizer(n.parameters(), curvature="exact", **settings) for n in (net, twin)
    )
    parts.curvature_scale = 3.0
    for _ in range(3):
        fit(whole, net, x, y, loss=loss)
        parts.zero_grad()
        for part in range(3):
            with curvature(*parts.accumulated_extensions()):
                (
                    loss(twin(x[5 * part :][:5]), y[5 * part :][:5])
                    / (3 if reduction == "mean" else 1)
                ).backward()
            if part < 2:
                parts.accumulate()
        parts.step()
        torch.testing.assert_close(flat(twin.parameters()), flat(net.parameters()))


def test_skipped_step_forgets_its_micro_batches():
    net, (x, y) = mlp().double(), (torch.randn(12, 4, dtype=DOUBLE), torch.randint(3, (12,)))
    twin = copy.deepcopy(net)
    plain, spoiled = (KFACOptimizer(n.parameters(), curvature="exact") for n in (net, twin))
    for number in range(2):
        with curvature(*spoiled.accumulated_extensions()):
            F.cross_entropy(twin(x * 3), y).backward()
        spoiled.accumulate() if number == 0 else None
    twin[0].weight.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="this step is skipped"):
        spoiled.step()
    fit(plain, net, x, y), fit(spoiled, twin, x, y)
    torch.testing.assert_close(flat(twin.parameters()), flat(net.parameters()))

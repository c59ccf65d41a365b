"""Large Kronecker factors in diagonal blocks, and many blocks of parameters in one product."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv import KFACOptimizer, curvature
from lightning_curv.optimizers.curvature import statistics
from lightning_curv.optimizers.curvature.second_moments import second_moments
from lightning_curv.optimizers.linear_algebra import factors
from lightning_curv.optimizers.linear_algebra.batching import kronecker_matmuls
from lightning_curv.optimizers.linear_algebra.factors import (
    diagonal,
    kronecker_matmul,
    part_size,
    parts_of,
    split_gram,
)

DOUBLE = torch.float64


def dense(factor):
    return torch.diag(factor) if factor.dim() == 1 else torch.block_diag(*parts_of(factor, False))


def randn(*shape):
    return torch.randn(*shape, dtype=DOUBLE)


def cnn():
    return nn.Sequential(
        *(
            nn.Conv2d(2, 6, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(96, 7),
            nn.Tanh(),
            nn.Linear(7, 3, bias=False),
        )
    ).double()


def step_of(net, x, y, **settings):
    """Gradients, updates and state of one undamped-schedule step."""
    optimizer = KFACOptimizer(
        net.parameters(),
        **{
            "lr": 1.0,
            "damping": 0.1,
            "momentum": 0.0,
            "kl_clip": None,
            "positions": None,
            "safeguards": False,
            **settings,
        },
    )
    with curvature(*optimizer.extensions, generator=torch.Generator().manual_seed(0)):
        F.cross_entropy(net(x), y).backward()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    return optimizer, [p.detach() - b for p, b in zip(net.parameters(), before)]


@pytest.mark.parametrize(
    ("rows", "size", "expected"), [(785, 256, 262), (300, 256, 300), (512, 256, 256), (5, 1, 1)]
)
def test_sizes_of_parts(rows, size, expected):
    assert part_size(rows, size) == expected


@pytest.mark.parametrize("size", [1, 3, 4, 6, 7])
def test_split_gram_is_the_block_diagonal(size):
    x = randn(20, 7)
    full, index = x.T @ x, torch.arange(7) // size
    expected = full * (index[:, None] == index)
    torch.testing.assert_close(dense(split_gram(x.T, size)), expected)
    torch.testing.assert_close(diagonal(split_gram(x.T, size), False), full.diagonal())


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (7, 10, 7)])
@pytest.mark.parametrize("sizes", [(3, 4), (7, 4), (3, 10), (1, 1)])
def test_products_with_split_factors_equal_dense_ones(shape, sizes):
    factors = {7: split_gram(randn(7, 20), sizes[0]), 10: split_gram(randn(10, 20), sizes[1])}
    v, chosen = randn(*shape), [factors[d] for d in shape]
    expected = dense(chosen[0])
    for factor in chosen[1:]:
        expected = torch.kron(expected, dense(factor))
    torch.testing.assert_close(
        kronecker_matmul(chosen, v, False), (expected @ v.flatten()).view(shape)
    )


def test_equal_shapes_are_multiplied_together():
    sets = [([split_gram(randn(7, 9), 3), randn(5, 5)], randn(7, 5), False) for _ in range(3)]
    sets += [([randn(2, 4, 4), randn(2, 5)], randn(8, 5), True) for _ in range(2)]
    sets += [([randn(7, 7), torch.rand(5, dtype=DOUBLE)], randn(7, 5), False)]
    for product, found in zip(sets, kronecker_matmuls(sets), strict=True):
        torch.testing.assert_close(found, kronecker_matmul(*product))


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_split_factors_are_the_diagonal_blocks(eigen, weight_sharing):
    x, y = randn(8, 2, 6, 6), torch.randint(3, (8,))
    net = cnn()
    settings = {"eigen": eigen, "weight_sharing": weight_sharing, "curvature": "exact"}
    whole, _ = step_of(copy.deepcopy(net), x, y, split_factors=None, **settings)
    split, updates = step_of(net, x, y, split_factors=5, **settings)
    split_sizes = set()
    for weight, bias, other in zip(
        net.parameters(), [*[*net.parameters()][1:], None], whole.param_groups[0]["params"]
    ):
        state, full = split.state[weight], whole.state[other]
        if "factors" not in state:
            continue
        assert len(state["factors"]) == 2
        factors, T = [], torch.eye(len(full["factors"][1]), dtype=DOUBLE)
        for part, factor in zip(state["factors"], full["factors"], strict=True):
            index = torch.arange(len(factor)) // part.shape[1]
            expected = factor * (index[:, None] == index)
            if part.shape[1] < len(part):
                split_sizes.add(len(part))
                (mean,) = state["mean"]
                torch.testing.assert_close(
                    mean, factor[-1, :-1]
                )  # the bias sees the mean of the inputs
                T[:-1, -1] = mean
                covariance = factor - torch.outer(factor[-1], factor[-1])
                covariance[-1, -1] = 1
                factors.append(covariance * (index[:, None] == index))
            else:
                factors.append(factor)
            torch.testing.assert_close(dense(part), expected)
        if not eigen:
            grad = weight.grad.flatten(1)
            if "bias" in state:
                grad = torch.cat([grad, bias.grad[:, None]], 1)
            means = [factor.diagonal().mean() for factor in full["factors"]]
            B, A = (
                factor
                + (0.1 * mean**2 / means[0] / means[1]).sqrt()
                * torch.eye(len(factor), dtype=DOUBLE)
                for factor, mean in zip(factors, means)
            )
            A = T @ A @ T.T
            expected = torch.linalg.solve(torch.kron(B, A), grad.flatten()).view_as(grad)
            number = [p is weight for p in net.parameters()].index(True)
            found = updates[number].flatten(1)
            torch.testing.assert_close(found, -expected[:, : found.shape[1]])
    assert split_sizes == {19, 97}


def test_ekfac_on_split_factors_is_its_definition():
    net, x, y = nn.Linear(11, 9).double(), randn(6, 11), torch.randint(9, (6,))
    optimizer, updates = step_of(net, x, y, split_factors=4, eigen=True)
    state = optimizer.state[net.weight]
    Q = torch.kron(*(dense(q) for q in state["basis"]))
    torch.testing.assert_close(Q.T @ Q, torch.eye(108, dtype=DOUBLE))
    T = torch.eye(12, dtype=DOUBLE)
    T[:-1, -1] = x.mean(0)
    centered = x - x.mean(0)
    index = torch.arange(12) // 4
    C = torch.block_diag(centered.T @ centered / 6, torch.ones(1, 1, dtype=DOUBLE)) * (
        index[:, None] == index
    )
    B = dense(state["factors"][0])
    torch.testing.assert_close((Q.T @ torch.kron(B, C) @ Q).diagonal(), state["moments"].flatten())
    grad = torch.cat([net.weight.grad, net.bias.grad[:, None]], 1).flatten()
    T = torch.kron(torch.eye(9, dtype=DOUBLE), T)
    expected = torch.linalg.solve(
        T @ (torch.kron(B, C) + 0.1 * torch.eye(108, dtype=DOUBLE)) @ T.T, grad
    ).view(9, 12)
    torch.testing.assert_close(updates[0], -expected[:, :-1])
    torch.testing.assert_close(updates[1], -expected[:, -1])


def test_ekfac_on_split_factors_of_groups_is_its_definition():
    net = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.Flatten()).double()
    weight, x, y = net[0].weight, randn(5, 6, 4, 4), torch.randint(16, (5,))
    optimizer, updates = step_of(net, x, y, split_factors=7, eigen=True, curvature="exact")
    state = optimizer.state[weight]
    assert state["factors"][1].shape == (2, 27, 7)  # blocks of 7, 7, 7 and 6 rows
    for g in range(2):
        B, A = (dense(factor[g]) for factor in state["factors"])
        Q = torch.kron(*(dense(q[g]) for q in state["basis"]))
        torch.testing.assert_close(Q.T @ Q, torch.eye(54, dtype=DOUBLE))
        moments = state["moments"][g].flatten()
        torch.testing.assert_close((Q.T @ torch.kron(B, A) @ Q).diagonal(), moments)
        update = Q @ ((Q.T @ weight.grad.view(2, 54)[g]) / (moments + 0.1))
        torch.testing.assert_close(updates[0].view(2, 54)[g], -update)

    with curvature(*optimizer.extensions):
        F.cross_entropy(net(x), y).backward()
    measured = second_moments([weight.jacobian_exact], state["basis"], batched=True)
    outputs = torch.func.jacrev(lambda w: F.conv2d(x, w, groups=2).flatten(1))(weight.detach())
    p = net(x).detach().softmax(1)
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]  # of the Hessian
    J = torch.einsum("nov,nop->vnp", root, outputs.flatten(2)) / 5**0.5
    for g in range(2):
        Q = torch.kron(*(dense(q[g]) for q in state["basis"]))
        expected = (J.view(-1, 5, 2, 54)[:, :, g] @ Q).square().sum((0, 1))
        torch.testing.assert_close(measured[g].flatten(), expected)


@pytest.mark.parametrize("eigen", [False, True])
def test_splitting_trains_and_resumes(eigen):
    net, x = cnn(), randn(48, 2, 6, 6)
    y = x.flatten(1)[:, :3].argmax(1)
    optimizer = KFACOptimizer(net.parameters(), split_factors=16, eigen=eigen)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        with curvature(*optimizer.extensions, generator=torch.Generator().manual_seed(step)):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 8:
            twin = copy.deepcopy(net)
            other = KFACOptimizer(twin.parameters(), split_factors=16, eigen=eigen)
            other.load_state_dict(optimizer.state_dict())
    assert losses[-1] < 0.3 * losses[0]
    for step in range(9, 12):
        other.zero_grad()
        with curvature(*other.extensions, generator=torch.Generator().manual_seed(step)):
            F.cross_entropy(twin(x), y).backward()
        other.step()
    for mine, its in zip(net.parameters(), twin.parameters()):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("split", [None, 4])
def test_automatic_damping_is_that_of_centered_inputs(split):
    net, x = nn.Linear(11, 3).double(), 2 + randn(20, 11)
    optimizer = KFACOptimizer(
        net.parameters(), lr=1.0, momentum=0.0, kl_clip=None, curvature="exact", split_factors=split
    )
    with curvature(*optimizer.extensions):
        F.mse_loss(net(x), randn(20, 3)).backward()
    before = torch.cat([net.weight, net.bias[:, None]], 1).detach()
    optimizer.step()
    B, size = torch.eye(3, dtype=DOUBLE) * 2 / 3, 12 if split is None else 4
    index, m = torch.arange(12) // size, x.mean(0)
    C = torch.block_diag((x - m).T @ (x - m) / 20, torch.ones(1, 1, dtype=DOUBLE)) * (
        index[:, None] == index
    )
    mean_A = (x.square().sum() / 20 + 1) / 12
    damping = 0.1 * mean_A * 2 / 3
    gamma_A, gamma_B = (damping * mean_A / (2 / 3)).sqrt(), (damping * (2 / 3) / mean_A).sqrt()
    T = torch.eye(12, dtype=DOUBLE)
    T[:-1, -1] = m
    A = T @ (C + gamma_A * torch.eye(12, dtype=DOUBLE)) @ T.T
    block = torch.kron(B + gamma_B * torch.eye(3, dtype=DOUBLE), A)
    grad = torch.cat([net.weight.grad, net.bias.grad[:, None]], 1)
    expected = torch.linalg.solve(block, grad.flatten()).view(3, 12)
    torch.testing.assert_close(torch.cat([net.weight, net.bias[:, None]], 1) - before, -expected)


@pytest.mark.parametrize("split", [4, None])
@pytest.mark.parametrize("bias", [True, False])
def test_large_factors_are_diagonals_that_are_never_formed_as_matrices(monkeypatch, split, bias):
    layer, x, y = nn.Linear(12, 9, bias=bias).double(), randn(20, 12), torch.arange(20) % 9
    twin = copy.deepcopy(layer)
    whole, _ = step_of(layer, x, y, curvature="exact", split_factors=None)

    def refuse(matrix):
        raise AssertionError(f"formed a matrix of {len(matrix)} rows")

    monkeypatch.setattr(statistics, "gram", refuse)
    monkeypatch.setattr(factors, "gram", refuse)
    found, _ = step_of(twin, x, y, curvature="exact", split_factors=split, max_factor_size=8)
    pairs = zip(
        found.state[twin.weight]["factors"], whole.state[layer.weight]["factors"], strict=True
    )
    for factor, matrix in pairs:
        torch.testing.assert_close(factor, matrix.diagonal())


@pytest.mark.parametrize("eigen", [False, True])
@pytest.mark.parametrize(("samples", "rows"), [(16, 301), (700, 601)])
def test_blocks_have_as_many_rows_as_the_first_batch_has_samples(eigen, samples, rows):
    """All of them in the first step, when nobody knows; later batches and restarts change nothing."""
    net = nn.Linear(600, 2)
    optimizer = KFACOptimizer(net.parameters(), eigen=eigen, factor_interval=1)
    shapes = []
    for count in (samples, samples, 8, 900):
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions()):
            F.cross_entropy(net(randn(count, 600).float()), torch.arange(count) % 2).backward()
        optimizer.step()
        shapes.append(tuple(optimizer.state[net.weight]["factors"][1].shape))
        restarted = KFACOptimizer(net.parameters(), eigen=eigen, factor_interval=1)
        restarted.load_state_dict(optimizer.state_dict())
        optimizer = restarted
    assert shapes == [(601, 601)] + [(601, rows)] * 3
    assert optimizer.state[net.weight]["weight"] > 2


@pytest.mark.parametrize("split", [None, 4])
def test_damping_of_classifiers_is_that_of_standardized_inputs(split):
    net, x = nn.Linear(11, 3).double(), 2 + randn(20, 11) * torch.logspace(-2, 1, 11, dtype=DOUBLE)
    optimizer = KFACOptimizer(
        net.parameters(), lr=1.0, momentum=0.0, kl_clip=None, curvature="exact", split_factors=split
    )
    with curvature(*optimizer.extensions):
        F.cross_entropy(net(x), torch.arange(20) % 3).backward()
    before = torch.cat([net.weight, net.bias[:, None]], 1).detach()
    p = net(x).softmax(1).detach()
    optimizer.step()
    B, size = p.mean(0).diag() - p.T @ p / 20, 12 if split is None else 4
    index, m = torch.arange(12) // size, x.mean(0)
    C = torch.block_diag((x - m).T @ (x - m) / 20, torch.ones(1, 1, dtype=DOUBLE)) * (
        index[:, None] == index
    )
    variances = C.diagonal()[:-1]
    # Inputs of a variance below three tenths of the mean one count as such.
    S = torch.cat([variances.clamp(min=0.3 * variances.mean()), torch.ones(1, dtype=DOUBLE)])
    mean_A = (torch.cat([x.square().mean(0), torch.ones(1, dtype=DOUBLE)]) / S).mean()
    mean_B = B.trace() / 3
    # The least damping of twenty predictions is a quarter of the weight of the loss.
    damping = 0.1 * mean_A * mean_B + 5 / 20
    gamma_A, gamma_B = (damping * mean_A / mean_B).sqrt(), (damping * mean_B / mean_A).sqrt()
    T = torch.eye(12, dtype=DOUBLE)
    T[:-1, -1] = m
    A = T @ (C + gamma_A * S.diag()) @ T.T
    block = torch.kron(B + gamma_B * torch.eye(3, dtype=DOUBLE), A)
    grad = torch.cat([net.weight.grad, net.bias.grad[:, None]], 1)
    expected = torch.linalg.solve(block, grad.flatten()).view(3, 12)
    torch.testing.assert_close(torch.cat([net.weight, net.bias[:, None]], 1) - before, -expected)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_steps_of_classifiers_do_not_depend_on_the_scale_of_inputs(scale):
    x, labels = 2 + randn(60, 4), torch.arange(60) % 3

    def losses(x):
        net = nn.Linear(4, 3).double()
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        # Where curvature is a mean over batches its unit is the length of a step.
        optimizer = KFACOptimizer(net.parameters(), curvature="exact", safeguards=False)
        for _ in range(6):
            optimizer.zero_grad()
            with curvature(*optimizer.required_extensions()):
                loss = F.cross_entropy(net(x), labels)
                loss.backward()
            optimizer.step()
            yield loss.item()

    torch.testing.assert_close([*losses(scale * x)], [*losses(x)])


def test_damping_of_classifiers_in_the_model_is_that_of_standardized_inputs():
    net, x = (
        nn.Linear(4, 3).double(),
        2 + randn(20, 4) * torch.tensor([1.0, 2.0, 3.0, 0.01], dtype=DOUBLE),
    )
    optimizer = KFACOptimizer(net.parameters(), curvature="exact", safeguards=False)
    with curvature(*optimizer.required_extensions()):
        F.cross_entropy(net(x), torch.arange(20) % 3).backward()
    optimizer.step()
    state = optimizer.state[net.weight]
    u, v = randn(2, 3, 4), randn(2, 3)
    weight, bias = optimizer.curvature.damped(state, u, v)
    variances = x.var(0, correction=0)
    scale = variances.clamp(min=0.3 * variances.mean()).sqrt()
    torch.testing.assert_close(weight, u * scale)
    torch.testing.assert_close(bias, v + u @ x.mean(0))

"""Every way of moving rows × every loss × several N: gradients and GGN diagonals are those of each sample alone."""

import pytest
import torch
from routings import KNOWN, LOSSES, ROUTINGS, C
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curv import curvature, record
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import (
    HMP,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagHessian,
    Variance,
)
from lightning_curv.recording import notes, provenance, row_numbers
from lightning_curv.recording.provenance import roots_of

IGNORED = "ignore::lightning_curv.rules.fallback.FallbackWarning"


def make(name, count):
    routing = ROUTINGS[name]
    torch.manual_seed(len(name))
    model, batch = routing.modules(), routing.draw(count)
    return routing, model, batch, torch.arange(count) % C


def alone(routing, model, batch, y, loss, n):
    """The n-th sample's share of the loss, by a forward pass of that sample alone; every loss is a mean."""
    return LOSSES[loss](routing.forward(model, routing.sample(batch, n)), y[n : n + 1]) / len(y)


def gradients(scalar, model):
    params = dict(model.named_parameters())
    found = torch.autograd.grad(
        scalar, list(params.values()), allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip(params, found))


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ROUTINGS)
def test_gradients_are_those_of_each_sample_alone(name, loss, count):
    routing, model, batch, y = make(name, count)
    with curvature(BatchGrad(), BatchL2Grad(), Variance(), batch_size=count):
        LOSSES[loss](routing.forward(model, batch), y).backward()
    expected = [gradients(alone(routing, model, batch, y, loss, n), model) for n in range(count)]
    for key, p in model.named_parameters():
        rows = torch.stack([row[key] for row in expected])
        torch.testing.assert_close(p.grad_batch, rows, msg=lambda text, key=key: f"{key}: {text}")
        torch.testing.assert_close(p.batch_l2, rows.reshape(count, -1).square().sum(1))
        torch.testing.assert_close(p.variance, rows.var(0, correction=0))


def hessian_of(loss, output, y):
    return torch.autograd.functional.hessian(lambda o: LOSSES[loss](o, y), output.detach()).reshape(
        C, C
    )


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("loss", KNOWN)
@pytest.mark.parametrize("name", ROUTINGS)
def test_ggn_diagonals_are_those_of_each_sample_alone(name, loss):
    count = 4
    routing, model, batch, y = make(name, count)
    with curvature(BatchDiagGGNExact(), batch_size=count):
        LOSSES[loss](routing.forward(model, batch), y).backward()
    for n in range(count):
        output = routing.forward(model, routing.sample(batch, n))
        H = hessian_of(loss, output, y[n : n + 1]) / count
        rows = [gradients(entry, model) for entry in output[0]]
        for key, p in model.named_parameters():
            J = torch.stack([row[key].flatten() for row in rows])
            expected = torch.einsum("cp,cd,dp->p", J, H, J).reshape(p.shape)
            torch.testing.assert_close(
                p.diag_ggn_exact_batch[n], expected, msg=lambda text, key=key: f"{key}: {text}"
            )


def hessian_times(loss, p, vector):
    (gradient,) = torch.autograd.grad(loss, p, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like(p)
    (product,) = torch.autograd.grad(gradient, p, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(p) if product is None else product


def reference_loss(name):
    routing, model, batch, y = make(name, 3)
    with sdpa_kernel(SDPBackend.MATH):
        return model, LOSSES["cross_entropy"](routing.forward(model, batch), y)


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("name", ROUTINGS)
def test_hessian_diagonals_are_right_or_refused(name):
    routing, model, batch, y = make(name, 3)
    try:
        with curvature(DiagHessian(), batch_size=3):
            LOSSES["cross_entropy"](routing.forward(model, batch), y).backward()
    except UnsupportedError:
        return
    other, loss = reference_loss(name)
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        columns = [
            hessian_times(loss, q, unit.reshape(q.shape)) for unit in torch.eye(q.numel()).to(q)
        ]
        expected = torch.stack(columns).reshape(q.numel(), q.numel()).diagonal().reshape(q.shape)
        torch.testing.assert_close(p.diag_h, expected, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("name", [name for name in ROUTINGS if not name.startswith("packed")])
def test_hessian_products_need_no_samples(name):
    routing, model, batch, y = make(name, 3)
    with curvature(HMP()):
        LOSSES["cross_entropy"](routing.forward(model, batch), y).backward()
    other, loss = reference_loss(name)
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        vector = torch.linspace(-1, 2, q.numel()).to(q).reshape(q.shape)
        expected = hessian_times(loss, q, vector)
        torch.testing.assert_close(
            p.hmp(vector), expected, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_numbers_of_moved_rows_are_found_once_for_a_structure(monkeypatch):
    """Later calls of the same kind have the numbers that the first one found; calls of other kinds their own."""
    looks = []
    narrowed = row_numbers.narrowed
    monkeypatch.setattr(
        row_numbers, "narrowed", lambda numbers: looks.append(numbers) or narrowed(numbers)
    )
    monkeypatch.setattr(notes, "_TOLD", {})
    calls = [
        (lambda x: x.transpose(0, 1), [[[0], [1], [2], [3]]]),
        (lambda x: x.flatten(), [n for n in range(4) for _ in range(6)]),
        (lambda x: x.narrow(0, 1, 2), [[[1]], [[2]]]),
        (lambda x: x.narrow(0, 0, 2), [[[0]], [[1]]]),
        (lambda x: x.reshape(4, -1), [[0], [1], [2], [3]]),
        (lambda x: x.narrow(0, 1, 2).flatten(), [n for n in (1, 2) for _ in range(6)]),
        (lambda x: x.index_select(0, torch.tensor([2, 1])), [[[2]], [[1]]]),
        (lambda x: x.index_select(0, torch.tensor([0, 3])), [[[0]], [[3]]]),
    ]
    seen = []
    for _ in range(2):
        with record():
            batch = torch.randn(4, 3, 2)
            moved = [call(batch) for call, _ in calls]
        for tensor, (_, expected) in zip(moved, calls):
            assert roots_of(tensor).numbers[4].tolist() == expected
        seen.append(len(looks))
    readings = 2  # the samples may be on the first axis of three, or on the second
    # what moves rows by a tensor, or rows that are not in their order, is followed anew
    assert seen == [readings * 8, readings * (8 + 3)]


def test_calls_whose_options_differ_in_type_only_are_of_different_kinds():
    """``x[1]`` is a row, ``x[True]`` all of them; ``1 == True``."""
    for _ in range(2):
        with record():
            batch = torch.randn(4, 3)
            row, rows = batch[1], batch[True]
        assert roots_of(row).numbers[4].tolist() == [1]
        assert roots_of(rows).numbers[4].tolist() == [[[0], [1], [2], [3]]]


def test_what_is_noted_of_a_tensor_goes_with_it():
    with record():
        flat = torch.randn(4, 3).flatten()
    place = id(flat)
    assert place in provenance._KNOWN
    del flat
    assert place not in provenance._KNOWN

"""`curvature(..., extension_hook=)`: quantities are handed over during the backward pass, and can be freed there."""

import copy
import gc
import weakref

import pytest
import torch
from packages import needs
from torch import nn
from torch.nn import functional as F
from zoo import NAMES, ROW, assert_close

from lightning_curv import curvature, extend, record
from lightning_curv.extensions import (
    HMP,
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    SumGradSquared,
    Variance,
)
from lightning_curv.terms.jacobian import Jacobian

FIRST = (BatchGrad, BatchL2Grad, SumGradSquared, Variance)
FIELDS = [extension.savefield for extension in FIRST]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


def batch():
    return torch.randn(6, 4), torch.arange(6) % 3


def extended(model):
    return extend(model), extend(nn.CrossEntropyLoss())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_handed_over_once_with_all_its_quantities(name):
    """What the hook sees is what is there without one; nothing is set again, nothing is forgotten."""
    usual, problem, found = ROW[name].make(), ROW[name].make(), {}

    def hook(p):
        assert id(p) not in found
        found[id(p)] = [getattr(p, field) for field in FIELDS]
        for field in FIELDS:
            delattr(p, field)

    for case, options in ((usual, {}), (problem, {"extension_hook": hook})):
        torch.manual_seed(0)
        with curvature(*(make() for make in FIRST), **options):
            case.compute_loss().backward()
    for p, q in zip(usual.model.parameters(), problem.model.parameters()):
        assert hasattr(p, FIELDS[0]) == (id(q) in found)
        assert not any(hasattr(q, field) for field in FIELDS)
        for field, value in zip(FIELDS, found.get(id(q), ())):
            assert torch.equal(getattr(p, field), value)


def test_last_layers_come_first_and_have_their_gradient():
    model, (X, y), order = net(), batch(), []

    def hook(p):
        assert_close(p.grad, p.grad_batch.sum(0), rtol=1e-4)
        order.append(p)

    with curvature(BatchGrad(), extension_hook=hook):
        F.cross_entropy(model(X), y).backward()
    layers = [
        next(i for i, layer in enumerate(model) if any(p is own for own in layer.parameters()))
        for p in order
    ]
    assert layers == sorted(layers, reverse=True)


def test_what_the_hook_frees_is_freed_during_the_pass():
    """Of three layers, the per-sample gradients of one are in memory at a time."""
    model, (X, y), alive = net(), batch(), []

    def hook(p):
        gc.disable()
        alive.append(weakref.ref(p.grad_batch))
        del p.grad_batch
        assert not any(found() is not None for found in alive)

    try:
        for check in (False, True):
            with curvature(
                BatchGrad(), BatchL2Grad(), Variance(), check=check, extension_hook=hook
            ):
                F.cross_entropy(model(X), y).backward()
    finally:
        gc.enable()
    assert len(alive) == 10
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    assert all(hasattr(p, "variance") for p in model.parameters())


def test_code_written_for_backpack_sees_the_modules_it_expects():
    ours, (X, y) = net(), batch()
    backpack = needs("backpack")
    theirs = copy.deepcopy(ours)
    found = {}

    def hook_of(library):
        def hook(module):
            parameters = list(module.parameters())
            if parameters:
                norms = [p.grad_batch.flatten(1).square().sum(1) for p in parameters]
                found.setdefault(library, []).append((repr(module), sum(norms)))
            for p in parameters:
                del p.grad_batch

        return hook

    lossfunc = nn.CrossEntropyLoss()
    with backpack.backpack(backpack.extensions.BatchGrad(), extension_hook=hook_of("theirs")):
        backpack.extend(lossfunc)(backpack.extend(theirs)(X), y).backward()
    model, lossfunc = extended(ours)
    loss = lossfunc(model(X), y)
    with curvature(BatchGrad(), extension_hook=hook_of("ours")):
        loss.backward()
    assert [name for name, _ in found["ours"]] == [name for name, _ in found["theirs"]]
    for (_, norms), (_, expected) in zip(found["ours"], found["theirs"]):
        assert_close(norms, expected, rtol=1e-5)


def test_modules_of_an_extended_part_and_parameters_of_the_rest():
    model, (X, y), found = net(), batch(), []
    extend(model[2:])  # a Sequential of its own, with the same layers
    extend(model[4])
    with curvature(BatchL2Grad(), extension_hook=found.append):
        F.cross_entropy(model(X), y).backward()
    assert [*map(id, found)][:1] == [id(model[4])]
    assert {*map(id, found)} == {*map(id, [model[4], model[2].weight, *model[0].parameters()])}


@pytest.mark.parametrize("transfer", [copy.deepcopy, lambda model: model], ids=["copy", "itself"])
def test_extended_models_and_their_copies_hand_over_modules(transfer):
    model, lossfunc = extended(net())
    model, (X, y), found = transfer(model), batch(), []
    with curvature(Variance(), extension_hook=found.append):
        lossfunc(model(X), y).backward()
    assert [*map(id, found)] == [id(model[i]) for i in (4, 2, 0)]


def test_a_module_waits_for_all_parameters_that_the_loss_reaches():
    """Not for frozen ones, nor for those that it does not use."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
            self.unused = nn.Parameter(torch.zeros(4))
            self.layer = nn.Linear(4, 3)
            self.layer.weight.requires_grad_(False)

        def forward(self, x):
            return self.layer(x * self.scale + self.shift)

    (model, lossfunc), (X, y), found = extended(Partly()), batch(), []

    def hook(module):
        found.append(module)
        for p in module.parameters(recurse=False):
            assert hasattr(p, "batch_l2") == (p.requires_grad and p is not model.unused)

    with curvature(BatchL2Grad(), extension_hook=hook):
        lossfunc(model(X), y).backward()
    assert [*map(id, found)] == [id(model.layer), id(model)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = (
            nn.Linear(4, 4),
            nn.Linear(4, 4, bias=False),
            nn.Linear(4, 3),
        )
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x).tanh()).tanh())


@pytest.mark.parametrize("extends", [False, True])
def test_a_tied_parameter_is_handed_over_once_when_all_its_uses_are_through(extends):
    model, (X, y), found = Tied(), batch(), []
    usual = copy.deepcopy(model)
    with curvature(BatchGrad()):
        F.cross_entropy(usual(X), y).backward()
    expected = dict(usual.named_parameters())

    def hook(handed):
        found.append(handed)
        for p in handed.parameters() if isinstance(handed, nn.Module) else [handed]:
            name = next(name for name, own in model.named_parameters() if own is p)
            assert torch.equal(p.grad_batch, expected[name].grad_batch)
            del p.grad_batch

    if extends:
        extend(model)
    with curvature(BatchGrad(), extension_hook=hook):
        F.cross_entropy(model(X), y).backward()
    if extends:
        assert [*map(id, found)] == [id(model.head), id(model.encoder)]
    else:
        assert {*map(id, found)} == {*map(id, model.parameters())}
        assert len(found) == 4


@pytest.mark.parametrize("extensions", [[], [BatchGrad()]], ids=["alone", "with first order"])
def test_second_order_quantities_are_handed_over_too(extensions):
    model, (X, y), found = net(), batch(), []
    fields = ["diag_ggn_exact", "kfac", "hmp", *(e.savefield for e in extensions)]

    def hook(p):
        assert p.grad is not None
        assert p.hmp(torch.ones_like(p)).shape == p.shape
        found.append(p)
        for field in fields:
            delattr(p, field)

    with curvature(DiagGGNExact(), *extensions, KFAC(), HMP(), extension_hook=hook):
        F.cross_entropy(model(X), y).backward()
    assert {*map(id, found)} == {*map(id, model.parameters())}
    assert not any(hasattr(p, field) for p in model.parameters() for field in fields)


def test_every_backward_pass_hands_over():
    """With a kept graph, with an accumulated gradient, and in two contexts at once."""
    model, (X, y), found = net(), batch(), []
    count = len([*model.parameters()])
    with curvature(BatchGrad(), extension_hook=lambda p: found.append(p.grad_batch)) as context:
        loss = F.cross_entropy(model(X), y)
        loss.backward(retain_graph=True)
        loss.backward()
        F.cross_entropy(model(X), y).backward()
    assert len(found) == 3 * count
    for first, second, third in zip(found, found[count:], found[2 * count :]):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    with context, record():
        pass
    F.cross_entropy(model(X), y).backward()
    assert len(found) == 3 * count


def test_parameters_whose_own_gradient_was_not_asked_for_are_handed_over_at_the_end():
    model, (X, y), found = net(), batch(), []
    inputs = [*model[4].parameters()]
    with curvature(
        BatchGrad(), DiagGGNExact(), extension_hook=lambda p: found.append((p, p.grad is None))
    ):
        F.cross_entropy(model(X), y).backward(inputs=inputs)
    assert {id(p) for p, late in found if not late} == {*map(id, inputs)}
    assert {id(p) for p, _ in found} == {*map(id, model.parameters())}
    assert [late for _, late in found] == sorted(late for _, late in found)


@pytest.mark.parametrize("extension", [BatchGrad(), DiagGGNExact()], ids=repr)
def test_an_error_in_the_hook_ends_the_pass_and_leaves_nothing_behind(extension):
    model, (X, y), found = net(), batch(), []

    def hook(p):
        found.append(p)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), curvature(extension, extension_hook=hook):
        F.cross_entropy(model(X), y).backward()
    with curvature(extension):
        F.cross_entropy(model(X), y).backward()
    assert len(found) == 1


def test_a_quantity_that_fails_the_check_is_not_handed_over(monkeypatch):
    model, (X, y), found = net(), batch(), []
    with curvature(SumGradSquared(), check=True, extension_hook=found.append):
        F.cross_entropy(model(X), y).backward()
    assert len(found) == len([*model.parameters()])
    total = Jacobian.total
    monkeypatch.setattr(Jacobian, "total", lambda jacobian: 2 * total(jacobian))
    with (
        pytest.raises(RuntimeError, match="add up to a tensor"),
        curvature(SumGradSquared(), check=True, extension_hook=found.append),
    ):
        F.cross_entropy(model(X), y).backward()
    assert len(found) == len([*model.parameters()])


def test_without_extensions_nothing_is_handed_over():
    model, (X, y), found = net(), batch(), []
    with curvature(extension_hook=found.append):
        F.cross_entropy(model(X), y).backward()
    assert not found


def test_the_hook_must_be_callable():
    with pytest.raises(TypeError, match=r"`extension_hook` must be a function .* found 3"):
        curvature(BatchGrad(), extension_hook=3)

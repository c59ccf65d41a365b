"""What is alive after the loss is gone, and how large the largest tensor becomes."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_curv import curvature, extend, record
from lightning_curv.differentiation.internal_pass import internal_pass
from lightning_curv.extensions import (
    KFAC,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from lightning_curv.graph.tape import walk


@pytest.fixture
def no_gc():
    """Reference counting alone must free everything: a cycle keeps a batch alive until the collector comes by."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(inplace=True),
        nn.GroupNorm(1, 3),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


class Witness:
    """Weak references to the storage of every activation (and input) of a network."""

    def __init__(self, model):
        self.references = {}
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _module, _inputs, out, name=name: self.watch(name, out)
            )

    def watch(self, name, tensor):
        self.references[name] = StorageWeakRef(tensor.untyped_storage())

    def alive(self):
        return [name for name, reference in self.references.items() if not reference.expired()]


def batch(witness):
    X, y = torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 1, 0])
    witness.watch("input", X)
    return X, y


EVERYTHING = [BatchGrad, BatchL2Grad, Variance, DiagGGNExact, DiagGGNMC, KFAC]


def by_hand(output, target):
    return -output.log_softmax(1).gather(1, target[:, None]).mean()


@pytest.mark.parametrize("criterion", [F.cross_entropy, by_hand])
@pytest.mark.parametrize("extension", EVERYTHING)
def test_nothing_recorded_survives_the_loss(extension, criterion, no_gc):
    model = network()
    witness = Witness(model)
    with curvature(extension()):
        X, y = batch(witness)
        loss = criterion(model(X), y)
        assert witness.alive()
        loss.backward()
        del loss, X
        assert witness.alive() == []
    assert hasattr(model[0].weight, extension().savefield)


def test_nothing_recorded_survives_an_extended_forward(no_gc):
    model = extend(network())
    criterion = extend(nn.CrossEntropyLoss())
    witness = Witness(model)
    X, y = batch(witness)
    loss = criterion(model(X), y)
    with curvature(DiagGGNExact(), BatchGrad()):
        loss.backward()
    del loss, X
    assert witness.alive() == []


@pytest.mark.parametrize("inside", [True, False], ids=["curvature", "record"])
def test_graph_dropped_without_backward_leaves_nothing(inside, no_gc):
    model = network()
    witness = Witness(model)
    with curvature(DiagGGNExact()) if inside else record():
        X, y = batch(witness)
        loss = F.cross_entropy(model(X), y)
        assert witness.alive()
        del loss, X
        assert witness.alive() == []


def test_nothing_is_kept_of_a_forward_without_gradient(no_gc):
    model = network()
    witness = Witness(model)
    with record(), torch.no_grad():
        X, _ = batch(witness)
        out = model(X)
        del X
        assert witness.alive() == ["6", ""]  # the output itself
        del out
        assert witness.alive() == []


def test_failing_backward_leaves_nothing(no_gc):
    model = network()
    witness = Witness(model)

    def explode(_gradient):
        raise ArithmeticError("in the middle of the backward pass")

    def fails():
        X, y = batch(witness)
        output = model(X)
        output.register_hook(explode)
        F.cross_entropy(output, y).backward()

    with curvature(DiagGGNExact(), BatchGrad()), pytest.raises(ArithmeticError):
        fails()
    gc.collect()  # the traceback holds the frame
    assert witness.alive() == []


# --- the size of the largest tensor ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Keeps the number of entries of the largest storage that any op returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


N, D = 64, 512


def shared_linear():
    """Three positions: no closed form for squares, and Gram matrices pay for norms."""
    return nn.Sequential(
        nn.Linear(D, D, bias=False), nn.Flatten(), nn.Linear(3 * D, 2)
    ), torch.randn(N, 3, D)


def vectors():
    return nn.Sequential(nn.Linear(D, D), nn.Linear(D, 2)), torch.randn(N, D)


def convolution():
    return nn.Sequential(nn.Conv2d(128, 128, 4), nn.Flatten(), nn.Linear(512, 2)), torch.randn(
        N, 128, 5, 5
    )


BOUNDED = [BatchL2Grad, SumGradSquared, Variance, DiagGGNExact, DiagGGNMC, KFAC]


@pytest.mark.parametrize("case", [vectors, shared_linear, convolution])
@pytest.mark.parametrize("extension", BOUNDED)
def test_no_tensor_as_large_as_all_per_sample_gradients(extension, case):
    torch.manual_seed(0)
    model, X = case()
    y = torch.randint(2, (N,))
    P = model[0].weight.numel()
    with Largest() as largest, curvature(extension()):
        F.cross_entropy(model(X), y).backward()
    assert hasattr(model[0].weight, extension().savefield)
    assert largest.numel < N * P / 2


def test_the_measure_finds_per_sample_gradients():
    model, X = vectors()
    with Largest() as largest, curvature(BatchGrad()):
        F.cross_entropy(model(X), torch.randint(2, (N,))).backward()
    assert largest.numel >= N * D * D


def test_recorded_inputs_are_freed_by_the_backward_pass():
    x, net = torch.randn(4, 3), nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with record():
        loss = net(x).square().sum()
    uses = list(walk(loss.grad_fn).uses.values())
    loss.backward(retain_graph=True)
    assert all(use.arguments for use in uses)
    loss.backward()
    assert not any(use.arguments for use in uses)


def test_own_passes_free_nothing():
    x, net = torch.randn(4, 3), nn.Linear(3, 2)
    with record():
        loss = net(x).square().sum()
    (use,) = walk(loss.grad_fn).uses.values()
    with internal_pass():
        torch.autograd.grad(loss, net.weight)
    assert use.arguments

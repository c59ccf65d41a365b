"""What models do inside a Trainer: compiled, checkpointed, in place, frozen, unused, tied."""

import pytest
import torch
from monitoring import (
    Net,
    assert_logged_values_are_true,
    assert_nothing_left_behind,
    assert_same_parameters,
    fit,
    kfac,
    series,
    sgd,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_curv import CurvatureCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:At step .* are too small:UserWarning"
)  # they are, for speed


class InPlace(Net):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[1] = nn.ReLU(inplace=True)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        if self._trainer is None or not self.trainer.training:  # brute force
            return self.net(x)
        hidden = checkpoint(
            self.net[:3], x.requires_grad_(self.reentrant), use_reentrant=self.reentrant
        )
        return self.net[3](hidden)


class Reentrant(Checkpointed):
    reentrant = True


class Frozen(Net):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[0].weight.requires_grad_(False)


class Unused(Net):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.unused = nn.Linear(4, 3)


class Tied(Net):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.net.insert(1, nn.Linear(6, 6))
        self.net.insert(2, nn.Tanh())
        self.net.insert(3, nn.Linear(6, 6))
        self.net[3].weight = self.net[1].weight


MODELS = {
    "in place": InPlace,
    "checkpoint": Checkpointed,
    "frozen": Frozen,
    "unused": Unused,
    "tied": Tied,
}


@pytest.mark.parametrize("optimizer", [sgd, kfac])
@pytest.mark.parametrize("model", MODELS)
def test_values_are_true_and_parameters_as_without(tmp_path, model, optimizer):
    nets = [MODELS[model](optimizer=optimizer) for _ in range(2)]
    fit(nets[0], CurvatureCallback(every_n_steps=0))
    fit(nets[1], CurvatureCallback(), tmp_path=tmp_path)
    assert_same_parameters(*nets)
    assert_nothing_left_behind(nets[1])
    trained = {
        name
        for name, p in nets[1].named_parameters()
        if p.requires_grad and not name.startswith("unused")
    }
    for i, (step, params, batch) in enumerate(nets[1].seen):
        nets[1].seen[i] = step, {name: p for name, p in params.items() if name in trained}, batch
    assert_logged_values_are_true(nets[1], tmp_path, range(8))


def test_reentrant_checkpoints_are_refused():
    net = Reentrant()
    with pytest.raises(
        NotImplementedError, match=r"CheckpointFunctionBackward.*use_reentrant=False"
    ):
        fit(net, CurvatureCallback(["grad_variance"]))
    assert_nothing_left_behind(net)
    with pytest.warns(UserWarning, match="leaves out .*CheckpointFunctionBackward"):
        fit(net, CurvatureCallback())


class Inner(nn.Module):
    """Not a Sequential, whose `compile` does nothing in torch."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def compiled_net(where, backend):
    net = Forgetful()
    if where == "module":
        return torch.compile(net, backend=backend)
    if where == "submodule":
        net.net = torch.compile(net.net, backend=backend)
    else:
        net.net = Inner(net.net)
        net.net.compile(backend=backend)
    return net


class Forgetful(Net):
    """Remembers nothing: that would be part of the graph."""

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("where", ["module", "submodule", "in place"])
def test_compiled_steps_stay_compiled_and_are_not_compiled_again(tmp_path, where):
    """Every third step is monitored, eagerly; those in between run the code that was compiled in the first."""
    compilations, runs = [], []

    def backend(graph, inputs):
        compilations.append(None)

        def run(*args):
            runs.append(None)
            return graph(*args)

        return run

    plain = Forgetful()
    fit(plain, epochs=3)
    found = {}
    for monitored in (False, True):
        torch._dynamo.reset()
        compilations.clear()
        runs.clear()
        net = compiled_net(where, backend)
        fit(
            net,
            CurvatureCallback(every_n_steps=3 * monitored),
            tmp_path=tmp_path / str(monitored),
            epochs=3,
        )
        found[monitored] = len(compilations), len(runs)
        assert_same_parameters(plain, net)
    (graphs, runs_without), (graphs_monitored, runs_monitored) = found[False], found[True]
    assert graphs > 0
    assert graphs_monitored == graphs
    assert runs_monitored == runs_without * 8 // 12
    assert list(series(tmp_path / "True", "grad_norm")) == [2, 5, 8, 11]

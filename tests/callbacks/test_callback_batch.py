"""What a sample is comes from the batch of the training step: the size that Lightning extracts, or `batch_size=`."""

import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from monitoring import CONSTANT, assert_nothing_left_behind, expected, series
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_curv import BatchL2Grad, CurvatureCallback
from lightning_curv.callbacks import PrivacyCallback
from lightning_curv.callbacks.user_batch import describe_batch
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers import DPOptimizer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At step .* are too small:UserWarning"
    ),  # they are, for speed
    pytest.mark.filterwarnings("ignore:Parameters .* are used by ops without a rule"),
    pytest.mark.filterwarnings("ignore:.*deprecated in v4"),
    pytest.mark.filterwarnings("ignore:(?s).*does not have a deterministic"),
]
TIMES, FEATURES, CLASSES = 3, 4, 5


class Step(pl.LightningModule):
    """A network whose loss is the mean of `loss` over samples; it remembers parameters and batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.seen = []

    def training_step(self, batch, batch_idx):
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.seen.append(
            (step, {name: p.detach().clone() for name, p in self.named_parameters()}, batch)
        )
        return self.loss(batch)

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x).flatten(0, -2), y.flatten())

    def forward(self, batch):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SequenceFirst(Step):
    """Batches `([T, N, F], [T, N])`, token by token."""


class Model(Step):
    """Tokens `[N, T]`: the next one is predicted, the loss is flattened to `[N·T, V]`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(CLASSES, FEATURES), self.net)

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Tables(Step):
    """Scores against embeddings of a table of constants, which lies where no module is asked for it."""

    def __init__(self):
        super().__init__()
        table = torch.randn(
            6, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        self.tables = SimpleNamespace(classes=table)  # as many rows as a batch has samples
        self.embed = nn.Sequential(
            nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, CLASSES, bias=False)
        )

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]) @ self.embed(self.tables.classes).T, batch[1])


def random(*shape, classes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if classes is None:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)
    return torch.randint(classes, shape, generator=generator)


def fit(net, callback, batches, tmp_path=None, **options):
    settings = {
        "accelerator": "cpu",
        "precision": "64-true",
        "max_epochs": 1,
        "log_every_n_steps": 1,
        **CONSTANT,
    }
    settings["logger"] = (
        TensorBoardLogger(tmp_path, name="", version="") if tmp_path is not None else False
    )
    if isinstance(batches, list):
        batches = DataLoader(batches, batch_size=None)
    pl.Trainer(callbacks=[callback], **(settings | options)).fit(net, batches)
    assert_nothing_left_behind(net)


def assert_true(net, tmp_path, samples, steps=None):
    """Logged values are those of the gradients of each sample alone.

    Args:
        samples: from a batch to batches of one sample each.
        steps: that are compared.
    """
    for step in sorted({step for step, *_ in net.seen}) if steps is None else steps:
        rows = []
        for _, params, batch in (seen for seen in net.seen if seen[0] == step):
            for sample in samples(batch):
                leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
                gradient = torch.autograd.grad(
                    torch.func.functional_call(net, leaves, (sample,)), leaves.values()
                )
                rows.append(torch.cat([g.flatten() for g in gradient]))
        values = expected(torch.stack(rows))
        for name, value in values.items():
            if len(rows) > 1 or name not in ("grad_variance", "grad_signal"):
                assert series(tmp_path, name)[step] == pytest.approx(value, rel=1e-5), (name, step)
            else:
                assert step not in series(tmp_path, name)


def along(axis):
    """Samples of a pair."""
    return lambda batch: zip(*(part.split(1, axis) for part in batch), strict=True)


# --- what a batch says -----------------------------------------------------------------------------------------------


@dataclass
class Item:
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """As torch_geometric keeps them: a store that knows its owner by a weak reference."""

    def __init__(self, **tensors):
        self._store = SimpleNamespace(_mapping=tensors, _parent=weakref.ref(self))
        self.num_graphs, self.follow = 2, len

    def __call__(self):
        raise AssertionError("not to be called")


X, Y = random(6, 4), random(6, classes=3)
PACKED = nn.utils.rnn.pack_sequence([random(3, 2), random(2, 2)])
CYCLE = {"x": X}
CYCLE["self"] = CYCLE


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, [Y]],
        {"x": X, "more": {"y": (Y,)}},
        Item(X, Y),
        [Item(X, Y)],
        X[:1],
        (X[:0], Y[:0]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_the_size_is_the_one_that_lightning_extracts(batch):
    assert describe_batch(batch).expected == extract_batch_size(batch)


@pytest.mark.parametrize(
    "batch",
    [None, 3, (), (X, Y[:2]), {"a": (X, Y), "b": (X[:3], Y[:3])}, torch.tensor(1.0), PACKED],
    ids=["none", "number", "empty", "other sizes", "two loaders", "scalar", "packed"],
)
def test_a_size_is_unknown_where_there_are_none_or_several(batch):
    known = describe_batch(batch)
    assert known.expected is known.size is None


@pytest.mark.parametrize(
    ("batch", "tensors"),
    [
        ((X, {"y": Y}), [X, Y]),
        (Item(X, Y), [X, Y]),
        (SimpleNamespace(store=SimpleNamespace(x=X), y=[Y], n=3, name="a", size=X.shape), [X, Y]),
        (CYCLE, [X]),
        (Graphs(x=X, y=Y), [X, Y]),
        ((X, X), [X]),
        (PACKED, [PACKED.data, PACKED.batch_sizes]),
        ((X, ["some", "texts"]), None),
        ((X, Y.tolist()), None),
        ((X, np.ones(6)), None),
        (5, None),
    ],
)
def test_tensors_are_known_unless_there_is_other_data(batch, tensors):
    found = describe_batch(batch).tensors
    assert (found is None) == (tensors is None)
    if tensors is not None:
        assert [id(tensor) for tensor in found] == [id(tensor) for tensor in tensors]


def test_a_size_of_the_user_is_taken_as_it_is():
    assert describe_batch((X, Y), 3).size == 3
    assert describe_batch((X, Y), lambda batch: batch[0].shape[1]).size == 4
    assert describe_batch((X, Y), lambda batch: torch.tensor(2)).size == 2
    assert describe_batch((X, Y), 3).expected is None


@pytest.mark.parametrize("size", [0, -1, 2.5, "six", True])
def test_a_size_must_be_a_number_or_a_function(size):
    with pytest.raises(
        ValueError, match=f"`batch_size` must be None, a positive number or a function.*{size!r}"
    ):
        CurvatureCallback(batch_size=size)
    with pytest.raises(ValueError, match="`batch_size` must give the number of samples"):
        describe_batch((X, Y), lambda batch: 2.5)


# --- in a Trainer ----------------------------------------------------------------------------------------------------


def sequences_first(n=5):
    return [
        (random(TIMES, n, FEATURES, seed=s), random(TIMES, n, classes=CLASSES, seed=s))
        for s in range(3)
    ]


@pytest.mark.parametrize("n", [5, 2])
def test_sequences_first_with_a_function_for_the_size(tmp_path, n):
    net = SequenceFirst()
    fit(
        net,
        CurvatureCallback(batch_size=lambda batch: batch[0].shape[1]),
        sequences_first(n),
        tmp_path,
    )
    assert_true(net, tmp_path, along(1))


@pytest.mark.parametrize("size", [5, None])
def test_sequences_first_with_a_number_or_without(tmp_path, size):
    """Without, the leading axis holds the samples, and a network that works token by token cannot tell."""
    net = SequenceFirst()
    fit(net, CurvatureCallback(batch_size=size), sequences_first(), tmp_path)
    assert_true(net, tmp_path, along(0 if size is None else 1))


@pytest.mark.parametrize("times", [2, 4, 7])
def test_networks_that_work_token_by_token(tmp_path, times):
    batches = [
        (random(4, times, FEATURES, seed=s), random(4, times, classes=CLASSES, seed=s))
        for s in range(2)
    ]
    net = Step()
    fit(net, CurvatureCallback(), batches, tmp_path)
    assert_true(net, tmp_path, along(0))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_last_batch_of_one_sequence(tmp_path, accumulate):
    net = Model()
    loader = DataLoader(random(9 if accumulate == 3 else 7, 4, classes=CLASSES), batch_size=3)
    fit(net, CurvatureCallback(), loader, tmp_path, accumulate_grad_batches=accumulate)
    assert_true(net, tmp_path, lambda batch: batch.split(1))
    if accumulate == 1:
        assert set(series(tmp_path, "grad_norm")) == {0, 1, 2}


def test_accumulation_with_a_smaller_last_batch(tmp_path):
    """Micro-batches have equal weights, so their samples have different ones."""
    net = Model()
    loader = DataLoader(random(4, 4, classes=CLASSES), batch_size=3)
    fit(net, CurvatureCallback(), loader, tmp_path, accumulate_grad_batches=2)
    (_, params, first), (_, _, last) = net.seen
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss = sum(torch.func.functional_call(net, leaves, (batch,)) for batch in (first, last)) / 2
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves.values())])
    assert series(tmp_path, "grad_norm")[0] == pytest.approx(gradient.norm().item())
    assert series(tmp_path, "sample_norm_max")[0] > 0


def test_nested_dicts(tmp_path):
    class Nested(Step):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch["views"]["x"]), batch["y"])

    def samples(batch):
        return [
            {"views": {"x": batch["views"]["x"][n : n + 1]}, "y": batch["y"][n : n + 1]}
            for n in range(6)
        ]

    net, y = Nested(), random(6, classes=CLASSES)
    fit(
        net,
        CurvatureCallback(),
        [{"views": {"x": random(6, FEATURES)}, "y": y, "epoch": 3, "name": "a"}],
        tmp_path,
    )
    assert_true(net, tmp_path, samples)


def test_two_loaders_of_which_one_is_used(tmp_path):
    class Second(Step):
        def loss(self, batch):
            return F.cross_entropy(self.net(batch["second"][0]), batch["second"][1])

    def loader(n):
        return DataLoader(
            [(random(n, FEATURES, seed=s), random(n, classes=CLASSES, seed=s)) for s in range(2)],
            None,
        )

    net = Second()
    fit(
        net,
        CurvatureCallback(),
        CombinedLoader({"first": loader(4), "second": loader(6)}),
        tmp_path,
    )
    assert_true(net, tmp_path, lambda b: [{"second": (x, y)} for x, y in along(0)(b["second"])])


@pytest.mark.parametrize("size", [None, 6])
def test_an_iterator_of_batches(tmp_path, size):
    class Iterating(Step):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    batches = [(random(6, FEATURES, seed=s), random(6, classes=CLASSES, seed=s)) for s in range(3)]
    net = Iterating()
    fit(net, CurvatureCallback(batch_size=size), batches, tmp_path)
    assert_true(net, tmp_path, along(0))
    with pytest.raises(
        ValueError, match="a number where `training_step` takes a `dataloader_iter`"
    ):
        fit(Iterating(), CurvatureCallback(batch_size=len), batches)


def pairs(n=6):
    return [(random(n, FEATURES, seed=s), random(n, classes=6, seed=s)) for s in range(2)]


def test_constants_are_told_from_data(tmp_path):
    net = Tables()
    fit(net, CurvatureCallback(), pairs(), tmp_path)
    assert_true(net, tmp_path, along(0))


def test_the_tensors_are_those_that_the_training_step_gets(tmp_path):
    class Moved(Tables):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return tuple(part.clone() for part in batch)

        def on_train_batch_start(self, batch, batch_idx):
            batch[0].data = batch[0].clone()

    net = Moved()
    fit(net, CurvatureCallback(), pairs(), tmp_path)
    assert_true(net, tmp_path, along(0))


def test_a_table_of_the_batch_is_data():
    """The same network and shapes as one with a table of constants, which was verified before."""

    class Given(Tables):
        def loss(self, batch):
            self.tables.classes = batch[2]
            return super().loss(batch[:2])

    fit(Tables(), CurvatureCallback(), pairs())
    with pytest.raises(UnsupportedError, match="samples mix"):
        fit(
            Given(),
            CurvatureCallback(["grad_variance"]),
            [(*batch, random(6, FEATURES)) for batch in pairs()],
        )


def test_a_batch_that_is_not_read_says_nothing(tmp_path):
    """Data from a replay buffer, say."""

    class Replay(Step):
        def training_step(self, batch, batch_idx):
            return super().training_step(
                (self.replay[0].clone(), self.replay[1].clone()), batch_idx
            )

    net = Replay()
    net.replay = pairs()[0][0], pairs()[0][1] % CLASSES
    fit(net, CurvatureCallback(), [torch.zeros(1)], tmp_path)
    assert_true(net, tmp_path, along(0))


def test_several_losses_in_manual_optimization(tmp_path):
    class Manual(Step):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss / 2)
            self.manual_backward(self.loss(batch) / 2)
            optimizer.step()

    net = Manual()
    callback = CurvatureCallback(
        ["grad_norm", "sample_norms"], batch_size=lambda batch: batch[0].shape[1]
    )
    fit(net, callback, sequences_first(), tmp_path)
    for step, params, batch in net.seen:
        norms = []
        for sample in along(1)(batch):
            leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
            gradient = torch.autograd.grad(
                torch.func.functional_call(net, leaves, (sample,)), leaves.values()
            )
            norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
        assert series(tmp_path, "sample_norm_max")[step] == pytest.approx(max(norms))


def test_a_wrong_size_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="`batch_size` says 4 samples"):
        fit(SequenceFirst(), CurvatureCallback(batch_size=4), sequences_first())


def test_a_number_does_not_fit_a_smaller_last_batch():
    with pytest.raises(UnsupportedError, match="`batch_size` says 3 samples"):
        fit(
            Model(),
            CurvatureCallback(batch_size=3),
            DataLoader(random(5, 5, classes=CLASSES), batch_size=3),
        )


def test_optimizers_get_the_quantities_of_these_samples():
    class Supplied(SequenceFirst):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.required_extensions = lambda: [BatchL2Grad()]
            return optimizer

        def on_before_optimizer_step(self, optimizer):
            sizes.extend(len(p.batch_l2) for p in self.parameters())

    sizes = []
    fit(
        Supplied(), CurvatureCallback(batch_size=lambda batch: batch[0].shape[1]), sequences_first()
    )
    assert sizes == [5] * 12


def test_private_steps_know_the_batch():
    class Private(Tables):
        def configure_optimizers(self):
            return DPOptimizer(
                torch.optim.SGD(self.parameters(), lr=0.1), clip_norm=0.5, noise_multiplier=0.0
            )

    net = Private().double()
    loader = DataLoader(
        list(zip(random(12, FEATURES), random(12, classes=6))), batch_size=6, shuffle=True
    )
    fit(net, PrivacyCallback(sampling="epoch"), loader)
    (*_, (_, params, batch)) = net.seen
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    for sample in along(0)(batch):
        gradient = torch.autograd.grad(
            torch.func.functional_call(net, leaves, (sample,)), leaves.values()
        )
        norm = torch.stack([g.norm() for g in gradient]).norm()
        for p, g in zip(params.values(), gradient):
            p -= 0.1 / 6 * g * (0.5 / norm).clamp(max=1)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), params[name])

"""Prompts of a frozen network: its samples must not mix, though it has no trainable parameter of its own."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curv import curvature
from lightning_curv.extensions import BatchGrad
from lightning_curv.samples.batch import Batch

N, T, D, C = 4, 3, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore::lightning_curv.rules.fallback.FallbackWarning")


class Prompted(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.prompt, self.a, self.head, self.mix = (
            nn.Parameter(torch.randn(2, D)),
            nn.Linear(D, D),
            nn.Linear(D, C),
            mix,
        )
        for frozen in (self.a, self.head):
            frozen.requires_grad_(False)

    def forward(self, x):
        z = self.a(torch.cat([self.prompt.expand(len(x), -1, -1), self.a(x)], 1))
        return self.head(self.mix(z.tanh()))


def by_hand(z, y):
    return -z.log_softmax(-1).gather(-1, y[..., None]).mean()


LOSSES: dict[str, Callable] = {
    "cross entropy": lambda z, y: F.cross_entropy(z.mean(1), y),
    "by hand": lambda z, y: by_hand(z.mean(1), y),
    "of every token": lambda z, y: F.cross_entropy(
        z.flatten(0, 1), y.repeat_interleave(z.shape[1])
    ),
    "of every token, by hand": lambda z, y: by_hand(
        z.flatten(0, 1), y.repeat_interleave(z.shape[1])
    ),
}
MIXES: dict[str, Callable] = {
    "mean": lambda z: z - z.mean(0),
    "neighbours": lambda z: z + z.roll(1, 0),
    "attention": lambda z: torch.einsum(
        "nm,mtd->ntd", (z.flatten(1) @ z.flatten(1).T).softmax(-1), z
    ),
}


def draw(mix):
    torch.manual_seed(0)
    return (
        Prompted(mix).double(),
        torch.randn(N, T, D, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0]),
    )


def sizes(x, y):
    return {"given": N, "found": None, "of the batch": Batch(expected=N, tensors=[x, y])}


@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
@pytest.mark.parametrize("loss", LOSSES)
def test_prompts_have_the_gradient_of_each_sample(loss, size):
    model, x, y = draw(lambda z: z)
    with curvature(BatchGrad(), batch_size=sizes(x, y)[size]):
        LOSSES[loss](model(x), y).backward()
    alone = [
        torch.autograd.grad(LOSSES[loss](model(x[n : n + 1]), y[n : n + 1]) / N, model.prompt)[0]
        for n in range(N)
    ]
    torch.testing.assert_close(model.prompt.grad_batch, torch.stack(alone))


@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mix", MIXES)
def test_a_frozen_network_that_mixes_samples_is_refused(mix, loss, size):
    model, x, y = draw(MIXES[mix])
    with (
        pytest.raises(NotImplementedError, match="sample"),
        curvature(BatchGrad(), batch_size=sizes(x, y)[size]),
    ):
        LOSSES[loss](model(x), y).backward()


class Labelled(Prompted):
    """A prompt whose tokens are looked up, and have labels beside those of the batch."""

    def __init__(self, tokens):
        super().__init__(lambda z: z)
        del self.prompt
        self.prompt = nn.Embedding(tokens, D)
        self.kept = {"numbers": torch.arange(tokens)}

    def forward(self, x):
        prompt = self.prompt(self.kept["numbers"][None]).repeat(len(x), 1, 1)
        return self.head(torch.cat([prompt, self.a(x)], 1).tanh())

    def loss(self, x, y):
        labels = torch.Tensor([1] * len(self.kept["numbers"])).long().repeat(len(x), 1)
        labels = torch.cat([labels, y[:, None].repeat(1, T)], 1)
        return F.cross_entropy(self(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
def test_the_tokens_of_a_prompt_are_no_samples(tokens, size):
    _, x, y = draw(lambda z: z)
    model = Labelled(tokens).double()
    with curvature(BatchGrad(), batch_size=sizes(x, y)[size]):
        model.loss(x, y).backward()
    alone = [
        torch.autograd.grad(model.loss(x[n : n + 1], y[n : n + 1]) / N, model.prompt.weight)[0]
        for n in range(N)
    ]
    torch.testing.assert_close(model.prompt.weight.grad_batch, torch.stack(alone))


def test_as_many_tokens_as_samples_need_a_batch_that_is_known():
    """What a module holds of N rows may be a batch that it remembers: right or refused, never the rows of the table."""
    _, x, y = draw(lambda z: z)
    model = Labelled(N).double()
    for size in (N, None):
        with (
            pytest.raises(NotImplementedError, match="belong to other samples"),
            curvature(BatchGrad(), batch_size=size),
        ):
            model.loss(x, y).backward()
    test_the_tokens_of_a_prompt_are_no_samples(N, "of the batch")


class Replaced(nn.Module):
    """Some rows of a frozen table are trained; their numbers are a list of Python's."""

    def __init__(self, write):
        super().__init__()
        self.register_buffer("table", torch.randn(7, D))
        self.rows, self.head = nn.Parameter(torch.randn(N, D)), nn.Linear(D, C)
        self.write = write

    def forward(self, tokens):
        table = self.write(self.table, torch.tensor([1, 2, 4, 6]), self.rows)
        return self.head(F.embedding(tokens, table).mean(1).tanh())


def written(table, index, rows):
    table = table.clone()
    table[index] = rows
    return table


WRITES: dict[str, Callable] = {
    "copied": lambda table, index, rows: table.index_copy(0, index, rows),
    "added": lambda table, index, rows: table.index_add(0, index, rows),
    "put": lambda table, index, rows: table.index_put((index,), rows),
    "written": written,
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
def test_as_many_rows_of_a_table_as_samples_may_be_trained(write, size):
    _, _, y = draw(lambda z: z)
    model = Replaced(WRITES[write]).double()
    tokens = torch.tensor([[1, 2, 3], [4, 4, 0], [6, 5, 1], [2, 6, 4]])
    with curvature(BatchGrad(), batch_size=sizes(tokens, y)[size]):
        F.cross_entropy(model(tokens), y).backward()
    for p in model.parameters():
        alone = [
            torch.autograd.grad(F.cross_entropy(model(tokens[n : n + 1]), y[n : n + 1]) / N, p)[0]
            for n in range(N)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))


@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
def test_rows_that_the_batch_puts_into_a_table_for_all_are_refused(size):
    _, _, y = draw(lambda z: z)
    tokens = torch.tensor([[1, 2, 3], [4, 4, 0], [6, 5, 1], [2, 6, 4]])
    model = Replaced(lambda table, _, rows: table.index_copy(0, tokens[:, 0], rows)).double()
    with (
        pytest.raises(NotImplementedError, match="samples mix"),
        curvature(BatchGrad(), batch_size=sizes(tokens, y)[size]),
    ):
        F.cross_entropy(model(tokens), y).backward()


class Streams(nn.Module):
    """Labels shifted in place are what the network reads; every sequence is predicted by two streams."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(C + 1, D), nn.Linear(D, C)
        self.first = nn.Linear(D, D)

    def loss(self, x, y):
        shifted = torch.full_like(y, C)
        shifted[..., 1:] = y[..., :-1].clone()
        shifted.masked_fill_(shifted == -100, 0)
        h = (self.embedding(shifted) + self.first(x)) * x[:, :, :1]
        h = torch.softmax(h @ h.mT, -1) @ h
        targets = y.new_zeros(2, *y.shape)
        for stream in range(2):
            targets[stream] = y
        z = torch.stack([self.head(h), self.head(h.tanh())])
        return F.cross_entropy(z.flatten(0, 2), targets.flatten())


@pytest.mark.parametrize("size", ["given", "found", "of the batch"])
def test_rows_between_ops_witness_whose_the_moved_ones_are(size):
    _, x, _ = draw(lambda z: z)
    model, y = Streams().double(), torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 2, 1]])
    with curvature(BatchGrad(), batch_size=sizes(x, y)[size]):
        model.loss(x, y).backward()
    for p in model.parameters():
        alone = [
            torch.autograd.grad(model.loss(x[n : n + 1], y[n : n + 1]) / N, p)[0] for n in range(N)
        ]
        torch.testing.assert_close(p.grad_batch, torch.stack(alone))

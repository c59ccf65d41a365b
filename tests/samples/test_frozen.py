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

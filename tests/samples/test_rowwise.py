"""What keeps samples apart whatever the numbers are: every op that is known to, beside what it must not be taken for.

The oracle is the derivative of the whole: does some row of an op's output depend on other rows of its input?
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_curv.graph.heads import find_heads
from lightning_curv.graph.tape import walk
from lightning_curv.passes.owned import Samples
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.record import record
from lightning_curv.samples.batch import Batch
from lightning_curv.samples.finder import _demote
from lightning_curv.samples.rowwise import samples_cannot_meet
from lightning_curv.terms.owners import BatchAxis

N, D = 4, 6
FROZEN = torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double()
SQUARE = torch.randn(N, N, generator=torch.Generator().manual_seed(4)).double()
KERNEL = torch.randn(2, 2, 1, generator=torch.Generator().manual_seed(5)).double()


def images(h):
    """Rows as images of two channels."""
    return h.reshape(N, 2, 3)


APART = {
    "cat": lambda h: torch.cat([h, h.tanh()], 1),
    "stack": lambda h: torch.stack([h, h.tanh()], 1),
    "stack last": lambda h: torch.stack([h, h.tanh()], -1),
    "split": lambda h: h.split(2, 1)[1],
    "split with sizes": lambda h: h.split([2, 4], 1)[1],
    "unbind": lambda h: images(h).unbind(1)[0],
    "expand": lambda h: h[:, None].expand(N, 3, D).sin(),
    "padding": lambda h: F.pad(h, (1, -2)),
    "roll": lambda h: h.roll(1, 1),
    "flip": lambda h: h.flip(1),
    "cumsum": lambda h: h.cumsum(1),
    "cumprod": lambda h: h.cumprod(1),
    "matrix without gradient": lambda h: h @ FROZEN,
    "bias without gradient": lambda h: torch.addmm(FROZEN[0], h, FROZEN),
    "transposed twice": lambda h: h.t().t(),
    "convolution without gradient": lambda h: F.conv1d(images(h), KERNEL),
    "layer norm": lambda h: F.layer_norm(h, (D,)),
    "group norm": lambda h: F.group_norm(images(h), 2),
    "running statistics": lambda h: F.batch_norm(h, FROZEN[0], FROZEN[1].abs()),
    "variance": lambda h: h.var(1),
    "standard deviation": lambda h: h.std(1, keepdim=True),
    "norm": lambda h: torch.linalg.vector_norm(h, dim=1),
    "largest": lambda h: h.max(1)[0],
    "amax": lambda h: images(h).amax((1, 2)),
    "logsumexp": lambda h: h.logsumexp(1),
    "maximum": lambda h: torch.maximum(h, h.sin()),
    "mask": lambda h: torch.where(FROZEN[:N] > 0, h, h.sin()),
    "masked fill": lambda h: h.masked_fill(FROZEN[:N] > 0, 0.0),
    "attention with a mask": lambda h: F.scaled_dot_product_attention(
        *[images(h)] * 3, attn_mask=torch.ones(2, 2).tril().bool()
    ),
    "products of matrices": lambda h: torch.baddbmm(
        images(h), images(h), images(h).transpose(1, 2) @ images(h)
    ),
}
TOGETHER = {
    "cat": lambda h: torch.cat([h[1:], h[:1].tanh()], 0),
    "stack": lambda h: torch.stack([h, h.tanh()], 0).reshape(-1, D)[:N],
    "split": lambda h: h.split(2, 0)[1].repeat(2, 1),
    "split with sizes": lambda h: torch.cat(h.split([1, 3], 0)[::-1]),
    "unbind": lambda h: torch.stack(h.unbind(0)[::-1]),
    "expand": lambda h: h[:1].expand(N, D) + h,
    "padding": lambda h: h + F.pad(h, (0, 0, -1, 1)),
    "roll": lambda h: h.roll(1),
    "flip": lambda h: h + h.flip(0, 1),
    "cumsum": lambda h: h.cumsum(0),
    "cumprod": lambda h: h.cumprod(0),
    "matrix without gradient": lambda h: SQUARE @ h,
    "matrices added up": lambda h: torch.addmm(h, SQUARE, h),
    "matrix of all rows": lambda h: h @ (h.t() @ h),
    "transposed": lambda h: (h @ FROZEN[:, :N]).t(),
    "samples as channels": lambda h: F.conv1d(h[None], SQUARE[:, :, None])[0],
    "kernel of all rows": lambda h: F.conv1d(images(h), images(h)[:, :, :1]),
    "layer norm": lambda h: F.layer_norm(h, (N, D)),
    "statistics of the batch": lambda h: F.batch_norm(h, None, None, training=True),
    "variance": lambda h: h - h.var(0),
    "standard deviation": lambda h: h - h.std(),
    "norm": lambda h: h / torch.linalg.vector_norm(h, dim=0),
    "norm of all": lambda h: h / torch.linalg.vector_norm(h),
    "largest": lambda h: h - h.max(0)[0],
    "largest of all": lambda h: h - h.max(),
    "amax": lambda h: h - h.amax((0, 1), keepdim=True),
    "logsumexp": lambda h: h - h.logsumexp(0),
    "maximum": lambda h: torch.maximum(h, h[0]),
    "mask": lambda h: torch.where(FROZEN[:N] > 0, h, h.mean(0)),
    "attention": lambda h: F.scaled_dot_product_attention(*[h[None]] * 3)[0],
    "attention with a mask": lambda h: F.scaled_dot_product_attention(
        *[h[None]] * 3, attn_mask=torch.eye(N).bool()[None]
    )[0],
}


def is_proven(op, count=N):
    """Whether the structure of a graph with this op between two layers shows that samples are apart."""
    torch.manual_seed(0)
    below, above = nn.Linear(3, D).double(), nn.LazyLinear(2).double()
    x = torch.randn(N, 3).double()
    above(op(below(x)).reshape(N, -1))
    with record():
        loss = F.cross_entropy(above(op(below(x)).reshape(N, -1)), torch.arange(N) % 2)
    tape = walk(loss.grad_fn)
    passes = Passes(loss, torch.ones_like(loss), tape, Samples(0, {}, {}), None, None)
    _demote(passes, Batch(count, tape=tape))  # what is computed from the batch is no parameter
    heads = [(head, BatchAxis(count)) for head in find_heads(tape, loss)]
    return samples_cannot_meet(tape, heads, dict.fromkeys(tape.uses, BatchAxis(count)))


def couples(op):
    """Whether the gradient that arrives at a row depends on other rows, by the Hessian."""
    h = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).double()
    weights = torch.randn(N, 100, generator=torch.Generator().manual_seed(2)).double()

    def loss(h):
        out = op(h).reshape(N, -1)
        return (out.tanh() * weights[:, : out.shape[1]]).sum()

    hessian = torch.autograd.functional.hessian(loss, h)
    across = hessian * (1 - torch.eye(N).double())[:, None, :, None]
    return bool(across.abs().max() > 1e-12)


@pytest.mark.parametrize("name", APART)
def test_ops_that_keep_samples_apart_are_known(name):
    assert not couples(APART[name])
    assert is_proven(APART[name])


# what moves rows, or picks some, does not couple them in these numbers, but cannot be told by axes
MOVED = {"cat", "stack", "split", "split with sizes", "unbind", "roll", "transposed", "maximum"}
MOVED |= {"attention with a mask"}


@pytest.mark.parametrize("name", TOGETHER)
def test_the_same_ops_along_the_samples_are_not_taken_for_apart(name):
    assert couples(TOGETHER[name]) is (name not in MOVED)
    assert not is_proven(TOGETHER[name])

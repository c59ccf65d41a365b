"""No sample changes the clipped sum by more than C and the stated rounding: a search for one that does."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from private_sums import clipped_sum
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_curv import record
from lightning_curv.engine import backprop, truncated_backward
from lightning_curv.errors import UnsupportedError
from lightning_curv.graph.heads import find_heads
from lightning_curv.graph.tape import walk
from lightning_curv.optimizers.privacy.clipped_sum import ClippedSum
from lightning_curv.passes.passes import Column
from lightning_curv.samples import finder
from lightning_curv.samples.rowwise import samples_cannot_meet
from lightning_curv.terms import ghost_norms, safe_norms, term
from lightning_curv.terms.owners import BatchAxis


@pytest.fixture
def sensitivity(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import sensitivity

    return sensitivity


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_sample_changes_the_sum_by_more_than_the_norm(sensitivity):
    found = [sensitivity.search(case, climbs=4) for case in sensitivity.cases(200, seed=3)]
    violations = [sensitivity.describe(case) for case in found if case.violated]
    assert not violations
    assert not any(case.refused for case in found)


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16-true"])
def test_no_ordinary_batch_is_refused(sensitivity, precision):
    for i, model in enumerate(sensitivity.MODELS):
        loss = [*sensitivity.LOSSES][i % len(sensitivity.LOSSES)]
        case = sensitivity.Case(model, loss, precision, "flat", 1.0, 6, seed=0)
        evaluate = sensitivity.Sum(case)
        assert evaluate(evaluate.draw(6)).isfinite().all()


def scaled(monkeypatch):
    """The pass carries 1/N, which is undone afterwards."""
    end = ClippedSum.end

    def with_division(passes, mean, loss_scale):
        return Column([GradientEdge(passes.loss.grad_fn, 0)], [passes.seed])

    def undone(self):
        for jacobian in [*self._jacobians, *self._formed]:
            jacobian.terms = [term.of(term.g * self._samples, term.x) for term in jacobian.terms]
        self._norms = [norm * self._samples for norm in self._norms]
        end(self)

    monkeypatch.setattr(truncated_backward, "unscaled", with_division)
    monkeypatch.setattr(ClippedSum, "end", undone)


def float32_norms(monkeypatch):
    """Squares in the type of the gradient."""

    def row_norms(tensor, start):
        return tensor[..., None].flatten(start).square().sum(start).sqrt().double()

    for module in (term, ghost_norms):
        monkeypatch.setattr(module, "row_norms", row_norms)
    monkeypatch.setattr(safe_norms, "limit", lambda dtype: math.inf)
    monkeypatch.setattr(ghost_norms, "RANGE", dict.fromkeys(ghost_norms.RANGE, (-1.0, math.inf)))


def regrouped(monkeypatch):
    """Rows of several positions are taken for rows of several samples, the other way round."""
    find = backprop.find_samples

    def other_way_round(passes, *arguments):
        samples = find(passes, *arguments)
        uses = {
            node: dataclasses.replace(owners, inner=not owners.inner)
            if isinstance(owners, BatchAxis)
            and passes.tape.uses[node].shape[owners.axis] != owners.count
            else owners
            for node, owners in samples.uses.items()
        }
        return dataclasses.replace(samples, uses=uses)

    monkeypatch.setattr(backprop, "find_samples", other_way_round)


@pytest.mark.parametrize(
    ("mutant", "model", "precision", "C"),
    [
        (scaled, "mlp", "bf16-mixed", 1e-2),
        (float32_norms, "gate", "float32", 1e-8),
        (regrouped, "views major", "float64", 1.0),
        (regrouped, "views minor", "bf16-mixed", 1.0),
    ],
)
def test_the_search_finds_what_is_broken(sensitivity, monkeypatch, mutant, model, precision, C):
    def violated(number):
        # What N does to rounding is seen where N changes.
        chosen = sensitivity.cases(number, seed=5, only=model, shrinks=mutant is scaled)
        found = (dataclasses.replace(case, precision=precision, clip_norm=C) for case in chosen)
        return any(sensitivity.search(case, climbs=12).violated for case in found)

    assert not violated(8)
    mutant(monkeypatch)
    assert violated(60)


# --- what is verified, and how often ----------------------------------------------------------------------------------


class Between(nn.Module):
    """A layer, something between, and another."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def block(h, sizes):
    """Attention among the rows of a block; blocks are told by a mask."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scores = (h @ h.T).masked_fill(owner[:, None] != owner, -math.inf)
    return scores.softmax(1) @ h


GATES = {
    "threshold": (lambda h: h + (h - 100).relu().mean(0), lambda h: h + (h + 100).relu().mean(0)),
    "factor": (lambda h: h + 0.0 * h.mean(0), lambda h: h + 1.0 * h.mean(0)),
    "mask": (lambda h: block(h, [1, 1, 1, 1]), lambda h: block(h, [1, 2, 1])),
    "matrix": (lambda h: torch.eye(4).double() @ h, lambda h: torch.ones(4, 4).double() @ h),
    "routes": (lambda h: h[torch.arange(4)], lambda h: h[torch.tensor([0, 0, 1, 1])] + h),
}


@pytest.mark.parametrize("name", GATES)
def test_a_private_step_finds_a_gate_that_opens_at_once(name):
    torch.manual_seed(0)
    finder.MEMORY.entries.clear()
    closed, opened = GATES[name]
    X, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    for _ in range(2):
        model = Between(closed).double()
        clipped_sum(model, lambda m, x, y: F.cross_entropy(m(x), y), [X, y], 1.0)
    model.between = opened
    with pytest.raises(UnsupportedError, match="samples mix"):
        clipped_sum(model, lambda m, x, y: F.cross_entropy(m(x), y), [X, y], 1.0)


def verifications(monkeypatch, model, compute_loss, batch):
    """How often samples were searched for in three private steps."""
    searched, search = [], finder._first_that_agrees
    monkeypatch.setattr(
        finder, "_first_that_agrees", lambda *arguments: searched.append(1) or search(*arguments)
    )
    finder.MEMORY.entries.clear()
    for _ in range(3):
        clipped_sum(model, compute_loss, batch, 1.0)
    return len(searched)


ONCE = "mlp norm cnn positions wide centred attention transformer".split()  # noqa: SIM905
ALWAYS = ["ragged", "no rule", "views major"]


@pytest.mark.parametrize("name", [*ONCE, "time first", *ALWAYS])
def test_what_cannot_mix_samples_is_verified_once(sensitivity, monkeypatch, name):
    evaluate = sensitivity.Sum(
        sensitivity.Case(name, "cross-entropy", "float64", "flat", 1.0, 6, seed=0)
    )
    found = verifications(
        monkeypatch, evaluate.model, lambda m, x, y: F.cross_entropy(m(x), y), evaluate.draw(6)
    )
    assert found == (3 if name in ALWAYS else 1)


ALONG = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "cumsum": lambda h: h.cumsum(0),
    "softmax": lambda h: h.softmax(0),
    "mean": lambda h: h - h.mean(0),
    "sum": lambda h: h + h.sum(0, keepdim=True),
    "transposed": lambda h: h.t() + h,
    "view": lambda h: h.t().reshape(4, 4),
    "padded": lambda h: F.pad(h, (0, 0, 1, -1)),
    "slice": lambda h: h + h[:1],
    "select": lambda h: h + h[0],
    "permuted": lambda h: h.unflatten(1, (2, 2)).permute(1, 0, 2).reshape(4, 4),
    "pairs": lambda h: (h @ h.T) @ h,
    "attention": lambda h: F.scaled_dot_product_attention(
        h[None, None], h[None, None], h[None, None]
    )[0, 0],
    "strided": lambda h: h.as_strided((4, 4), (1, 4)),
}


@pytest.mark.parametrize("name", ALONG)
def test_what_works_along_the_samples_is_not_taken_for_apart(name):
    """Of the structure alone, without the weights: with the owners that the outputs have."""
    torch.manual_seed(0)
    model = Between(ALONG[name]).double()
    X, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    with record():
        loss = F.cross_entropy(model(X), y)
    tape = walk(loss.grad_fn)
    heads = [(head, BatchAxis(4)) for head in find_heads(tape, loss)]
    assert not samples_cannot_meet(tape, heads, dict.fromkeys(tape.uses, BatchAxis(4)))

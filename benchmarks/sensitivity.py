"""Search for a sample that changes the clipped sum of a private step by more than it may.

    OMP_NUM_THREADS=1 python benchmarks/sensitivity.py --cases 2000 [--seed 0] [--only lstm] [--shrinks]

A case is a model, a loss, a precision, a clipping rule and a batch S; ‖Σ(S ∪ {x}) - Σ(S)‖ is
compared with what `docs/privacy.md` states, C (1 + ρ N), while a search by hill climbing changes x
and the rest of the batch to enlarge it. Both sums are of batches of one shape: without x another
sample stands in. `--shrinks` leaves x's row out instead, and shows what torch's other kernels for
batches of another shape make of the other samples. Prints how far it is, every violation, and the
largest changes; ends with an error if there was a violation.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_curv import curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers import DPOptimizer

Batch = list[Tensor]  # one row per sample each; inputs first, targets last
CLASSES, WIDTH = 5, 8
RULES = ("flat", "per_layer", "automatic", "adaptive")
PRECISIONS = ("float64", "float32", "bf16-mixed", "bf16-true", "fp16-mixed")
SCALES = (0.0, 1e-30, 1e-12, 1e-4, 0.1, 10.0, 1e4, 1e12, 1e18, 1e30, 1e160, math.inf, math.nan)


def rounding(count: int, precision: str) -> float:
    """The stated bound on what rounding adds to a sample's share, relative to C, with N samples.

    Sixteen units of the type of the sum, which is float32 in half precision too.
    """
    return count * (2.0**-49 if precision == "float64" else 2.0**-20)


# --- models: modules that give [N, CLASSES] ---------------------------------------------------------------------------


class Last(nn.Module):
    """A recurrent network and a layer on its last state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(WIDTH, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Pooled(nn.Module):
    """Layers on positions, and the mean of what they give."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention`, with time first or the batch first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1 if self.batch_first else 0))


class Tied(nn.Module):
    """An embedding that is the output layer too, and a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.block(self.embedding(x)).tanh())
        return h.mean(1) @ self.embedding.weight.t()


class Centred(nn.Module):
    """What positions have in common is subtracted: their shares of the first gradient cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = (
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, CLASSES, bias=False),
        )
        self.register_buffer("place", torch.randn(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(((h - h.mean(1, keepdim=True)) * self.place).sum(1))


class Gate(nn.Module):
    """Saturated units behind large inputs: tiny cotangents times huge activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)
        self.head.requires_grad_(False)
        with torch.no_grad():
            self.first.weight.zero_()[:, 1] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).sigmoid())


class Ragged(nn.Module):
    """Rows of samples of different lengths in one matrix, added up per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        kept = (
            torch.arange(4)
            < 1 + (x[:, 0, 0].nan_to_num().abs().clamp(max=30) * 7).long()[:, None] % 4
        )
        rows = self.layers(x[kept])
        owner = torch.arange(len(x))[:, None].expand(-1, 4)[kept]
        return rows.new_zeros(len(x), CLASSES).index_add(0, owner, rows)


class Views(nn.Module):
    """Two views of every sample in one batch, `kind` after `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = (
            kind,
            nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "major":
            first, second = self.layers(torch.cat([x, 0.9 * x])).chunk(2)
            return first + second
        if self.kind == "minor":
            return (
                self.layers(torch.stack([x, 0.9 * x], 1).flatten(0, 1)).unflatten(0, (-1, 2)).sum(1)
            )
        return self.layers(x.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).sum(1)


class Distances(nn.Module):
    """An op without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, WIDTH))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x[:, None], self.centres[None]).squeeze(1))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)


FLAT, SEQUENCE, IMAGE, TOKENS = (WIDTH,), (4, WIDTH), (2, 4, 4), ()
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, CLASSES)), FLAT),
    "norm": (
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES)
        ),
        FLAT,
    ),
    "gate": (Gate, FLAT),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        ),
        IMAGE,
    ),
    "positions": (lambda: Pooled(nn.Linear(WIDTH, WIDTH), nn.ReLU()), SEQUENCE),
    "wide": (lambda: Pooled(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH)), SEQUENCE),
    "centred": (Centred, SEQUENCE),
    "attention": (lambda: SelfAttention(True), SEQUENCE),
    "time first": (lambda: SelfAttention(False), SEQUENCE),
    "transformer": (lambda: Pooled(transformer()), SEQUENCE),
    "lstm": (lambda: Last(nn.LSTM), SEQUENCE),
    "gru": (lambda: Last(nn.GRU), SEQUENCE),
    "tied": (Tied, TOKENS),
    "ragged": (Ragged, SEQUENCE),
    "views major": (lambda: Views("major"), FLAT),
    "views minor": (lambda: Views("minor"), FLAT),
    "copies": (lambda: Views("copies"), FLAT),
    "no rule": (Distances, FLAT),
}


HARD = {"gate": "pair", "centred": "level"}  # the changes of a batch that these are made for


# --- losses: of outputs [N, CLASSES] and targets [N] ------------------------------------------------------------------


def rows_of(y: Tensor) -> Tensor:
    return F.one_hot(y, CLASSES).float()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda h, y: F.cross_entropy(h, y, label_smoothing=0.1),
    "squares": lambda h, y: F.mse_loss(h, rows_of(y).to(h.dtype)),
    "binary": lambda h, y: F.binary_cross_entropy_with_logits(h, rows_of(y).to(h.dtype)),
    "huber": lambda h, y: F.smooth_l1_loss(h, rows_of(y).to(h.dtype)),
    "gathered": lambda h, y: -h.log_softmax(1).gather(1, y[:, None]).mean(),
    "cubes": lambda h, y: (h**3).sum(1).mean(),
    "quotient": lambda h, y: F.cross_entropy(h, y, reduction="sum") / len(h),
    "factor": lambda h, y: 0.1 * F.cross_entropy(h, y) + 0.3 * (h.tanh() ** 2).mean(),
    "times": lambda h, y: F.cross_entropy(h, y, reduction="none").sum() * (1 / len(h)),
}


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A private step, and the largest change that was found.

    Attributes:
        model: its name.
        loss: its name.
        precision: as Lightning names it, and fp16-mixed.
        rule: of clipping.
        clip_norm: C.
        count: N, with x.
        seed: of the weights, the batch and the search.
        change: ‖Σ(S ∪ {x}) - Σ(S)‖ / C at its largest.
        evaluations: how many were compared.
        refused: why none was.
        shrinks: whether the batch has a row less without x, instead of one that stands in.
    """

    model: str
    loss: str
    precision: str
    rule: str
    clip_norm: float
    count: int
    seed: int
    change: float = 0.0
    evaluations: int = 0
    refused: str = ""
    shrinks: bool = False
    batch: Batch = field(default_factory=list, repr=False)

    @property
    def allowed(self) -> float:
        """The largest change that is allowed."""
        return 1 + rounding(self.count, self.precision)

    @property
    def violated(self) -> bool:
        return not self.change <= self.allowed


def cases(number: int, seed: int = 0, only: str = "", shrinks: bool = False) -> Iterator[Case]:
    """Random cases; models take turns."""
    source = random.Random(seed)
    names = [name for name in MODELS if only in name]
    for i in range(number):
        yield Case(
            names[i % len(names)],
            source.choice([*LOSSES]),
            source.choice(PRECISIONS),
            source.choice(RULES),
            10 ** source.uniform(-6, 1),
            source.choice([2, 3, 4, 5, 7, 9, 17, 40]),
            source.randrange(2**30),
            shrinks=shrinks,
        )


class Sum:
    """The clipped sum of a case as a function of the batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        make, self.shape = MODELS[case.model]
        self.model = make().to(self.dtype)
        self.loss = LOSSES[case.loss]
        if not self.possible():
            case.precision, self.model = "float32", self.model.float()
        self.stand_in = self.draw(1)

    def possible(self) -> bool:
        """Whether torch can compute this model and loss in this precision at all."""
        try:
            self.forward(self.draw(2)).backward()
        except RuntimeError:
            return False
        return True

    @property
    def dtype(self) -> torch.dtype:
        return {"float64": torch.float64, "bf16-true": torch.bfloat16}.get(
            self.case.precision, torch.float32
        )

    def draw(self, count: int) -> Batch:
        """A batch."""
        y = torch.randint(CLASSES, (count,))
        if self.shape == TOKENS:
            return [torch.randint(CLASSES, (count, 6)), y]
        return [torch.randn(count, *self.shape, dtype=torch.float64), y]

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        *inputs, y = (t.to(self.dtype) if t.is_floating_point() else t for t in batch)
        half = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}.get(self.case.precision)
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            return self.loss(self.model(*inputs), y)

    def __call__(self, batch: Batch, counted: Tensor | None = None) -> Tensor:
        """The sum over all parameters and the samples that count, flat, in float64."""
        inner = torch.optim.SGD(self.model.parameters(), lr=0.0)
        case = self.case
        optimizer = DPOptimizer(inner, case.clip_norm, 0.0, 1.0, case.rule)
        optimizer.counted = counted
        with curvature(*optimizer.extensions, batch_size=len(batch[0])):
            self.forward(batch).backward()
        totals = optimizer.statistics.totals()
        return torch.cat([total.flatten().double() for total in totals])

    def change(self, batch: Batch, place: int) -> float:
        """‖Σ(S ∪ {x}) - Σ(S)‖ / C with x at a place of the batch."""
        change = float((self(batch) - self.without(batch, place)).norm()) / self.case.clip_norm
        self.case.evaluations += 1
        return change

    def without(self, batch: Batch, place: int) -> Tensor:
        """Σ(S): the sum without the sample at a place."""
        if self.case.shrinks:
            return self([torch.cat([t[:place], t[place + 1 :]]) for t in batch])
        rest = [t.clone() for t in batch]
        for tensor, stand_in in zip(rest, self.stand_in, strict=True):
            tensor[place] = stand_in[0]
        return self(rest, torch.arange(len(batch[0])) != place)


def search(case: Case, climbs: int = 8) -> Case:
    """Look for the batch with the largest change."""
    evaluate = Sum(case)
    source = random.Random(case.seed)
    batch, place = evaluate.draw(case.count), source.randrange(case.count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(climbs):
            trial = _moved(batch, place, source, HARD.get(case.model, ""))
            try:
                change = evaluate.change(trial, place)
            except UnsupportedError as error:
                case.refused = str(error)  # this batch; the climb goes on from the last one
                continue
            if not change <= case.change:
                case.change, batch = change, trial
            if case.violated:
                break
    if case.evaluations:
        case.refused = ""
    case.batch = batch
    return case


def _moved(batch: Batch, place: int, source: random.Random, hard: str = "") -> Batch:
    """A neighbour of a batch: x or all others changed in size or direction, or made equal; `hard` often."""
    moved = [t.clone() for t in batch]
    x, count = moved[0], len(batch[0])
    others = [i for i in range(count) if i != place]
    rows = source.choice([[place], [place], others])
    kind = source.choice(
        ["scale", "scale", "direction", "entry", "pair", "equal", "target", "same", "level"]
    )
    kind = source.choice([kind, hard]) if hard else kind
    if kind == "target" or not x.is_floating_point():
        moved[-1][rows] = source.randrange(CLASSES)
        if not x.is_floating_point():
            x[rows] = (
                torch.randint(CLASSES, x[rows].shape)
                if kind != "same"
                else source.randrange(CLASSES)
            )
    elif kind == "scale":
        x[rows] *= source.choice(SCALES)
    elif kind == "direction":
        x[rows] += source.choice((1e-3, 1.0, 1e3)) * torch.randn_like(x[rows])
    elif kind == "entry":
        spot = source.randrange(x[0].numel())
        x.view(count, -1)[rows, spot] = source.choice((-1, 1)) * source.choice(SCALES)
    elif kind == "pair":  # a huge input beside one that saturates
        huge = source.randrange(2, x[0].numel())
        x.view(count, -1)[rows, huge] = 10 ** source.choice(
            (source.uniform(0, 36), source.uniform(17, 19))
        )
        x.view(count, -1)[rows, 1] = source.choice((source.uniform(0, 50), -source.uniform(45, 90)))
    elif kind == "level":
        x[rows] = source.choice(SCALES) + 0.1 * torch.randn_like(x[rows])
    elif kind == "equal":
        x[rows], moved[-1][rows] = x[others[0]].clone(), moved[-1][others[0]].clone()
    return moved


def describe(case: Case) -> str:
    excess = (case.change - 1) / rounding(case.count, case.precision)
    return (
        f"{case.change:.9g} C, {excess:.2g} of what rounding may add: {case.model}, {case.loss}, {case.precision}, "
        f"{case.rule}, C={case.clip_norm:.3g}, N={case.count}, seed {case.seed}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--climbs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the name of a model")
    parser.add_argument("--skip", type=int, default=0, help="cases before the first one")
    parser.add_argument("--shrinks", action="store_true", help="without x a row less")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    outcomes, start = [], time.time()
    chosen = cases(
        arguments.skip + arguments.cases, arguments.seed, arguments.only, arguments.shrinks
    )
    for i, case in enumerate(islice(chosen, arguments.skip, None), 1):
        outcomes.append(search(case, arguments.climbs))
        if case.violated:
            print("VIOLATION", describe(case), flush=True)
        if i % 100 == 0 or i == arguments.cases:
            violations, refused = (
                sum(c.violated for c in outcomes),
                sum(bool(c.refused) for c in outcomes),
            )
            seconds = time.time() - start
            print(
                f"{i} cases, {seconds:.0f} s: {violations} violations, {refused} refused",
                flush=True,
            )
    print("The largest:")
    compared = [case for case in outcomes if case.evaluations and not case.refused]
    for case in sorted(compared, key=lambda c: (c.change - 1) / rounding(c.count, c.precision))[
        -10:
    ]:
        print("   ", describe(case))
    for (model, reason), number in Counter(
        (c.model, c.refused[:150]) for c in outcomes if c.refused
    ).most_common(12):
        print(f"    refused {number} times: {model}: {reason}")
    sys.exit(any(case.violated for case in outcomes))


if __name__ == "__main__":
    main()

"""Step sizes from curvature against the best learning rate of a grid, for the same directions.

    OMP_NUM_THREADS=1 python benchmarks/step_lengths.py

Every task trains with the directions of AdamW, Muon and SGD with momentum: once with each rate of a
grid, which grows until its best rate is not at its edge, and once with `CurvatureStepSize`, which
is given none. All have the same cosine schedule. Prints the table of `docs/optimizers.md`: final
training losses and their ratio, means over seeds, the rates chosen on the first one; and what a
step costs, in steps of AdamW with a given rate.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from workloads import (
    Attention,
    Batch,
    Characters,
    FeedForward,
    autoencoder,
    mnist_labels,
    pixel_loss,
    python_text,
    shuffled,
    small_digits,
    token_loss,
)

from lightning_curv import CurvatureStepSize, curvature

STEP = 10**0.5  # from a rate of the grid to the next one
MOST_RATES = 8


@dataclass(frozen=True)
class Task:
    """A training problem: data, network, loss, batch size, steps."""

    data: Callable[[], Batch]
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    steps: int


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    found = [m for sizes in pairwise(sizes) for m in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*found[:-1])


def convolutions(size: int, classes: int) -> nn.Sequential:
    """Two convolutions and two linear layers, for square images of a size."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(size**2, 64), nn.ReLU(), nn.Linear(64, classes)),
    )


class Recurrent(nn.Module):
    """LSTM on characters."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.token(tokens))[0])


class VisionTransformer(nn.Module):
    """Two blocks on the sixteen 2 × 2 patches of an 8 × 8 image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(4, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(
            *(m for _ in range(2) for m in (Attention(width, causal=False), FeedForward(width)))
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        positions = torch.arange(16).expand(len(images), 16)
        return self.head(self.blocks(self.patch(patches) + self.position(positions)).mean(1))


def digits() -> Batch:
    """The digits of scikit-learn in a fixed random order."""
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    (images, _), _ = small_digits(0)
    return images[order], torch.tensor(load_digits().target)[order]


def noisy_digits() -> Batch:
    """The same, every fifth label drawn at random."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(10, labels.shape, generator=generator)
    return images, torch.where(torch.rand(labels.shape, generator=generator) < 0.2, drawn, labels)


def late_digits() -> Batch:
    """The digits from 5 to 9, as images and classes from 0 on."""
    images, labels = digits()
    chosen = labels >= 5
    return images[chosen].view(-1, 1, 8, 8), labels[chosen] - 5


def tuned() -> nn.Module:
    """A network trained on the digits from 0 to 4, with a new last layer."""
    images, labels = digits()
    chosen = labels < 5
    images, labels = images[chosen].view(-1, 1, 8, 8), labels[chosen]
    net, new = convolutions(8, 5), nn.Linear(64, 5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(150):
        rows = torch.arange(64 * step, 64 * (step + 1)) % len(images)
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    net[-1] = new
    return net


def friedman() -> Batch:
    """Friedman's first regression problem with noise, targets of variance one."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(2000, 10, noise=0.5, random_state=0)
    inputs = torch.tensor(x, dtype=torch.float32) - 0.5
    targets = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)
    return inputs, targets[:, None]


def text() -> Batch:
    """Sequences of 48 characters and the characters behind each."""
    characters, _ = python_text()
    rows = characters[: len(characters) // 49 * 49].view(-1, 49)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:6000]
    return rows[order, :-1].contiguous(), rows[order, 1:].contiguous()


def vocabulary() -> int:
    return python_text()[1]


TASKS = {
    "MLP, noisy digits, batch 64": Task(
        noisy_digits, lambda: layers(64, 128, 128, 10), F.cross_entropy, 64, 150
    ),
    "MLP, noisy digits, batch 16": Task(
        noisy_digits, lambda: layers(64, 64, 64, 10), F.cross_entropy, 16, 400
    ),
    "CNN, MNIST-5k, batch 64": Task(
        lambda: mnist_labels(0)[0], lambda: convolutions(28, 10), F.cross_entropy, 64, 120
    ),
    "fine-tuned CNN, digits, batch 32": Task(late_digits, tuned, F.cross_entropy, 32, 120),
    "vision transformer, digits, batch 64": Task(
        digits, VisionTransformer, F.cross_entropy, 64, 200
    ),
    "GPT, 2 layers, text, batch 16 × 48": Task(
        text, lambda: Characters(vocabulary(), 48, 2, 48), token_loss, 16, 200
    ),
    "LSTM, text, batch 16 × 48": Task(text, lambda: Recurrent(vocabulary()), token_loss, 16, 200),
    "regression, Friedman 1, batch 16": Task(
        friedman, lambda: layers(10, 64, 64, 1), F.mse_loss, 16, 500
    ),
    "autoencoder, digits, batch 128": Task(
        lambda: (digits()[0],) * 2,
        lambda: autoencoder([64, 128, 64, 32, 8]),
        pixel_loss,
        128,
        400,
    ),
}


def adamw(net: nn.Module, lr: float) -> Sequence[Optimizer]:
    return [torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)]


def muon(net: nn.Module, lr: float) -> Sequence[Optimizer]:
    """Muon for the matrices of layers, AdamW for the rest, at equal root mean squares."""
    tables = {m.weight for m in net.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in net.parameters() if p.ndim == 2 and p not in tables]
    rest = [p for p in net.parameters() if p.ndim != 2 or p in tables]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.0),
    ]


def sgd(net: nn.Module, lr: float) -> Sequence[Optimizer]:
    return [torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)]


DIRECTIONS = {"AdamW": (adamw, 1e-2), "Muon": (muon, 1e-2), "SGD with momentum": (sgd, 3e-2)}


def train(task: Task, direction: str, lr: float | None, seed: int) -> tuple[float, float]:
    """Final training loss, infinite if training diverged, and the CPU seconds per step."""
    torch.manual_seed(seed)
    net = task.net()
    make, start = DIRECTIONS[direction]
    optimizers = make(net, start if lr is None else lr)
    if lr is None:
        optimizers = [CurvatureStepSize(optimizers)]
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(seed)
    batches = shuffled(task.data(), task.batch, seed)
    seconds = 0.0
    for _, (inputs, targets) in zip(range(task.steps), batches, strict=False):
        start = time.process_time()
        for optimizer in optimizers:
            optimizer.zero_grad()
        needed = [] if lr is not None else optimizers[0].required_extensions()
        if needed:
            with curvature(*needed, generator=generator):
                loss = task.loss(net(inputs), targets)
                loss.backward()
        else:
            loss = task.loss(net(inputs), targets)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step(**({"loss": loss} if lr is None else {}))
        for schedule in schedules:
            schedule.step()
        seconds += time.process_time() - start
    inputs, targets = (tensor[:2048] for tensor in task.data())
    with torch.no_grad():
        final = float(task.loss(net(inputs), targets))
    return final if math.isfinite(final) else math.inf, seconds / task.steps


def best_rate(task: Task, direction: str) -> float:
    """The rate of a grid that ends lowest; the grid grows until that is not at its edge."""
    _, middle = DIRECTIONS[direction]
    finals = {lr: train(task, direction, lr, 0)[0] for lr in (middle / STEP, middle, middle * STEP)}
    while True:
        best = min(finals, key=lambda lr: finals[lr])
        if min(finals) < best < max(finals) or len(finals) == MOST_RATES:
            return best
        further = best * STEP if best == max(finals) else best / STEP
        finals[further] = train(task, direction, further, 0)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    ratios = []
    for name in arguments.tasks:
        task = TASKS[name]
        plain = train(task, "AdamW", 1e-3, 0)[1]
        for direction in DIRECTIONS:
            rate = best_rate(task, direction)
            tuned_runs, own_runs = (
                [train(task, direction, lr, seed) for seed in range(arguments.seeds)]
                for lr in (rate, None)
            )
            tuned_loss, own_loss = (
                sum(final for final, _ in runs) / len(runs) for runs in (tuned_runs, own_runs)
            )
            cost = sorted(seconds for _, seconds in own_runs)[len(own_runs) // 2] / plain
            ratios.append(own_loss / tuned_loss)
            print(
                f"| {name} | {direction} | {tuned_loss:.3g} at {rate:.2g} | {own_loss:.3g} "
                f"| {ratios[-1]:.2f} | {cost:.2f} |",
                flush=True,
            )
    for most in (1.02, 1.1, 1.5):
        within = sum(ratio <= most for ratio in ratios)
        print(f"at most {most} times the tuned loss: {within} of {len(ratios)}")


if __name__ == "__main__":
    main()

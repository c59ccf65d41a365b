"""Everything once on a second device, beside the processor, in a process of its own: devices are for a whole process.

python second_device_runs.py FILE   # JSON: what went wrong per cell, or "right", and counts of launches
"""

import copy
import json
import math
import sys
import traceback
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from launches import LOOPS, TRAINERS, Model, steps
from pytorch_lightning.strategies import SingleDeviceStrategy
from second_device import SecondAccelerator, second_device

import lightning_curv
from lightning_curv import (
    CurvatureCallback,
    CurvatureStepSize,
    DiagGGNOptimizer,
    DPOptimizer,
    KFACOptimizer,
    PrivacyCallback,
    curvature,
)
from lightning_curv.errors import UnsupportedError

N, CLASSES = 5, 3


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


def mlp(width=6):
    return nn.Sequential(nn.Linear(width, 4), nn.Sigmoid(), nn.Linear(4, CLASSES))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, CLASSES)
    )


def embedding():
    return nn.Sequential(
        nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 4), nn.Tanh(), Mean(), nn.Linear(4, CLASSES)
    )


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, Mean(), nn.Linear(4, CLASSES))


NETWORKS = {
    "mlp": (mlp, lambda: torch.randn(N, 6)),
    "cnn": (cnn, lambda: torch.randn(N, 1, 8, 8)),
    "embedding": (embedding, lambda: torch.randint(7, (N, 6))),
    "transformer": (transformer, lambda: torch.randn(N, 6, 4)),
}
OWN = "a loss of one's own"
LOSSES = {
    "cross-entropy": F.cross_entropy,
    OWN: lambda out, y: (out.logsumexp(1) - out.gather(1, y[:, None])[:, 0]).mean(),
}


def values(net, x, y, loss, name, seed):
    """The quantity `name` of every parameter; of products, those with ones."""
    extension = getattr(lightning_curv, name)()
    # Monte-Carlo generators start anew at every new seed.
    torch.manual_seed(seed)
    net.zero_grad()
    with curvature(extension):
        loss(net(x), y).backward()
    results = []
    for parameter in net.parameters():
        result = getattr(parameter, extension.savefield)
        if callable(result):
            result = result(torch.ones_like(parameter)[None])
        results.append(result)
        delattr(parameter, extension.savefield)
    return [*results, *(parameter.grad for parameter in net.parameters())]


def difference(here, there, bound=1e-8):
    """What is wrong with results of the second device, or "right"."""
    if isinstance(here, (list, tuple)):
        found = [difference(one, other, bound) for one, other in zip(here, there, strict=True)]
        return next((word for word in found if word != "right"), "right")
    if there.device != second_device():
        return f"on {there.device}"
    here, there = here.detach(), there.detach().cpu()
    largest = float((here - there).abs().max())
    if here.shape != there.shape or not largest <= bound * float(here.abs().max() + 1):
        return f"differs by {largest}"
    return "right"


def judged(compute):
    """What `compute` says, or its error."""
    try:
        return compute()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"[
            :400
        ]


def quantities():
    seed = 0
    for title, (build, data) in NETWORKS.items():
        for loss_name, loss in LOSSES.items():
            torch.manual_seed(0)
            net, x, y = build().double(), data(), torch.randint(CLASSES, (N,))
            x = x.double() if x.is_floating_point() else x
            moved = copy.deepcopy(net).to(second_device())
            for name in NAMES:
                seed += 1
                try:
                    expected = values(net, x, y, loss, name, seed)
                except UnsupportedError:
                    continue  # the same on every device
                on_device = (moved, x.to(second_device()), y.to(second_device()), loss, name, seed)
                # Classes are drawn in another way on the processor: see `losses.categorical`.
                drawn = loss_name == "cross-entropy" and ("MC" in name or name == "KFAC")
                bound = torch.inf if drawn else 1e-8
                yield (
                    f"{title}, {loss_name}: {name}",
                    judged(lambda e=expected, d=on_device, b=bound: difference(e, values(*d), b)),
                )


NAMES = """BatchGrad BatchL2Grad SumGradSquared Variance DiagGGNExact DiagGGNMC BatchDiagGGNExact BatchDiagGGNMC
SqrtGGNExact SqrtGGNMC KFAC KFLR KFRA GGNMP DiagHessian BatchDiagHessian HMP PCHMP""".split()  # noqa: SIM905


def stepped(build, make, seed, device, undefined=()):
    """The parameters after six steps on one device, some of them without a usable batch."""
    torch.manual_seed(seed)
    net, y = build().double(), torch.randint(CLASSES, (8,))
    if build is embedding:  # token 2 is padding
        x = torch.randint(4, (8, 6))
    else:
        x = torch.randn(8, *((6,) if build is mlp else (1, 8, 8)), dtype=torch.float64)
    net, x, y = net.to(device), x.to(device), y.to(device)
    optimizer = make(net.parameters())
    for step in range(6):
        optimizer.zero_grad()
        needed = getattr(optimizer, "required_extensions", lambda o=optimizer: o.extensions)()
        with curvature(*needed, batch_size=8):
            loss = LOSSES[OWN](net(x * math.nan if step in undefined else x), y)
            loss.backward()
        options = {"loss": loss} if isinstance(optimizer, CurvatureStepSize) else {}
        optimizer.step(**options)
    return [parameter.detach() for parameter in net.parameters()]


OPTIMIZERS = {
    "KFACOptimizer()": KFACOptimizer,
    "KFACOptimizer(eigen=True)": lambda p: KFACOptimizer(p, eigen=True),
    "KFACOptimizer(lr=0.1)": lambda p: KFACOptimizer(p, lr=0.1),
    "DiagGGNOptimizer()": DiagGGNOptimizer,
    "CurvatureStepSize(AdamW)": lambda p: CurvatureStepSize(torch.optim.AdamW(p)),
    "DPOptimizer(SGD)": lambda p: DPOptimizer(
        torch.optim.SGD(p, lr=0.1),
        clip_norm=1.0,
        noise_multiplier=1e-9,
        expected_batch_size=8,
    ),
}


def optimizers():
    for seed, (title, make) in enumerate(OPTIMIZERS.items(), 1000):
        for build in (mlp, cnn, embedding):
            # More entries than samples: the eigenvectors of the eigenvalue zero are arbitrary.
            if build is not mlp and "eigen" in title:
                continue
            expected = stepped(build, make, seed, torch.device("cpu"))
            there = (build, make, seed, second_device())
            yield (
                f"{build.__name__}: {title}",
                judged(lambda e=expected, t=there: difference(e, stepped(*t))),
            )
    for seed, title in enumerate(("KFACOptimizer()", "DiagGGNOptimizer()"), 2000):
        make, undefined = OPTIMIZERS[title], (2, 4)
        expected = stepped(mlp, make, seed, torch.device("cpu"), undefined)
        there = (mlp, make, seed, second_device(), undefined)
        yield (
            f"undefined batches: {title}",
            judged(lambda e=expected, t=there: difference(e, stepped(*t))),
        )


def fitted(callbacks, make_optimizer):
    """Train a network in a Trainer on the second device; what was logged."""

    class Net(Model):
        def configure_optimizers(self):
            return make_optimizer(self.parameters())

    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=SecondAccelerator(),
        strategy=SingleDeviceStrategy(second_device()),
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8), torch.randint(CLASSES, (32,)))
    trainer.fit(Net(cnn()), DataLoader(data, batch_size=8, shuffle=True))
    return sorted(trainer.callback_metrics)


def trainers():
    def monitored():
        logged = fitted([CurvatureCallback(every_n_steps=1)], torch.optim.AdamW)
        return "right" if "curvature/ggn_trace" in logged else f"logged {logged}"

    def private():
        def private_sgd(parameters):
            inner = torch.optim.SGD(parameters, lr=0.1)
            return DPOptimizer(inner, clip_norm=1.0, noise_multiplier=1.0)

        fitted([PrivacyCallback(delta=1e-3)], private_sgd)
        return "right"

    def kfac():
        fitted([CurvatureCallback()], KFACOptimizer)
        return "right"

    yield "CurvatureCallback in a Trainer", judged(monitored)
    yield "PrivacyCallback in a Trainer", judged(private)
    yield "KFACOptimizer in a Trainer", judged(kfac)


class Split(pl.LightningModule):
    """The first layer on the processor, the others on a device."""

    def __init__(self, device, make_optimizer=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest = nn.Linear(6, 5).double(), mlp(5).double().to(device)
        self.end, self.make_optimizer, self.series = device, make_optimizer, []

    def forward(self, x):
        return self.rest(self.first(x).tanh().to(self.end))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1].to(self.end))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def on_train_batch_end(self, *_):
        metrics = self.trainer.callback_metrics.items()
        self.series.append({name: float(value) for name, value in metrics})


class InPlace(SingleDeviceStrategy):
    """Leaves every layer where it is."""

    def model_to_device(self):
        pass


SERIES = """default norm_test inner_product_test orthogonality_test grad_diversity mean_gsnr early_stopping cabs
ggn_trace_exact ggn_max_eigenvalue gradient_stats sparsity update_size distance alpha""".split()  # noqa: SIM905


def split_values(name, device):
    """A quantity of every parameter, brought to the processor."""
    net, generator = Split(device), torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=generator).double()
    found = values(net, x, torch.arange(N) % CLASSES, on(device), name, 0)
    return [tensor.cpu() for value in found for tensor in flat(value)]


def on(device):
    return lambda output, target: F.cross_entropy(output, target.to(device))


def flat(value):
    return (
        [tensor for part in value for tensor in flat(part)] if isinstance(value, list) else [value]
    )


def split_training(make, device, quantities=None):
    """The parameters and series of a run in a Trainer."""
    callback = CurvatureCallback(quantities or ["grad_norm"], layers=True, mc_samples=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator).double()
    net = Split(device, make)
    trainer = pl.Trainer(
        max_epochs=1,
        strategy=InPlace(torch.device("cpu"), CPUAccelerator()),
        callbacks=[callback],
        log_every_n_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(x, torch.arange(24) % CLASSES)
    trainer.fit(net, DataLoader(data, batch_size=6))
    return [p.detach().cpu() for p in net.parameters()], net.series


def same(here, there):
    """What is wrong, or "right"."""
    if isinstance(here, dict):
        names = [
            k for k, v in here.items() if not abs(v - there.get(k, 1e9)) <= 1e-6 * abs(v) + 1e-9
        ]
        return "right" if here and not names else f"differs in {names}"
    if isinstance(here, torch.Tensor):
        return "right" if torch.allclose(here, there, rtol=1e-9, atol=1e-11) else "differs"
    found = [same(one, other) for one, other in zip(here, there, strict=True)]
    return next((word for word in found if word != "right"), "right")


def split():
    """A model of which one layer is on the processor, and all others are on the second device."""
    ends = torch.device("cpu"), second_device()
    # Random numbers of two devices differ; these two pass matrices from layer to layer.
    for name in NAMES:
        if "MC" not in name and name not in ("KFAC", "KFRA", "PCHMP"):
            yield (
                f"split: {name}",
                judged(lambda n=name: same(*(split_values(n, end) for end in ends))),
            )
    exact = {
        "KFAC": lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, curvature="exact"),
        "EKFAC": lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, curvature="exact", eigen=True),
        "auto": lambda p: KFACOptimizer(p, curvature="exact"),
        "DiagGGN": lambda p: DiagGGNOptimizer(p, curvature="exact"),
        "step size": lambda p: CurvatureStepSize(torch.optim.AdamW(p), curvature="exact"),
    }
    for name, make in exact.items():
        yield (
            f"split: {name}",
            judged(lambda m=make: same(*(split_training(m, end) for end in ends))),
        )
    yield (
        "split: series",
        judged(lambda: same(*(split_training(torch.optim.SGD, end, SERIES) for end in ends))),
    )


def counts():
    """What would stall a GPU, in one step of everything that the benchmark counts."""
    names = ("launches", "reads", "in_backward", "sent", "uploads", "float64")
    for network, kinds in {
        "mlp": (*LOOPS, *TRAINERS),
        "transformer": ("private, SGD", *TRAINERS),
    }.items():
        for title, step in steps(network, kinds):
            yield f"{network}: {title}", {name: getattr(step, name) for name in names}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # The form of attention that is the same on all devices.
    with sdpa_kernel(SDPBackend.MATH):
        cells = {**dict(quantities()), **dict(optimizers()), **dict(trainers()), **dict(split())}
        found = {"cells": cells, "counts": dict(counts())}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))

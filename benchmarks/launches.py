"""What would stall a GPU: launches of kernels, reads by the host, copies to the device, float64; counted without a GPU.

    OMP_NUM_THREADS=1 python benchmarks/launches.py [--networks mlp 3c3d transformer] [--where]

Every operation of torch that computes on the device of `second_device.py` is one launch, as it is on a GPU to within
the kernels that an operation has inside. A read is whatever makes the host wait for the device: a number or a boolean
taken out of a tensor, a copy to the processor, a result whose size depends on values. What is sent is copied to the
processor while the host goes on, which looks at it a step later, when the device has the passes of that step to do. An
upload is a copy from the processor. `--where` says which lines read, send, upload and use float64.

Each count is that of one step, after enough steps of the same run that nothing is done for the first time: forward
pass, loss, backward pass, update, and what `CurvatureCallback` and Lightning do in between. `backward` counts the reads
inside the backward pass. Attention has the form that torch has for every device. Not counted is what torch does inside
one operation, such as the check of `torch.linalg.cholesky`.
"""

import argparse
import logging
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from networks import NETWORKS
from privacy import private
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from second_device import SecondAccelerator, second_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_curv import CurvatureCallback, DiagGGNOptimizer, KFACOptimizer, curvature

ROOT = Path(__file__).parents[1]
# Operations that no kernel belongs to: they make memory or another view of it.
MEMORY = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
}
# Operations that end when the host knows something of the values.
READS = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "linalg_eig",
    "linalg_lstsq",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


class Counts(TorchDispatchMode):
    """Counts what a step does on the device."""

    def __init__(self, where: bool = False) -> None:
        super().__init__()
        self.where = where
        self.launches, self.reads, self.in_backward, self.sent = 0, 0, 0, 0
        self.uploads, self.float64 = 0, 0
        self.places: Counter[tuple[str, str]] = Counter()
        self.backward_runs = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in (*before, *after) if tensor.device.type != "cpu"]
        if not on_device or func.is_view or name in MEMORY:
            return result
        copies = name in ("_to_copy", "copy_")
        source = before[-1] if copies else None
        target = (before[0] if name == "copy_" else after[0]) if copies else None
        chosen_by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            tensor.dtype in (torch.bool, torch.uint8) for tensor in before[1:]
        )
        if copies and source.device != target.device:
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            to_host = "reads" if waits else "sent"
            kind = to_host if target.device.type == "cpu" else "uploads"
        elif name in READS or chosen_by_mask:
            kind = "reads"
        else:
            kind = ""
            self.launches += 1
        if kind:
            self._count(kind, name)
        if any(tensor.dtype == torch.float64 for tensor in after if tensor.device.type != "cpu"):
            self._count("float64", name)
        return result

    def _count(self, kind: str, name: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        self.in_backward += kind == "reads" and self.backward_runs
        if self.where:
            self.places[kind, f"{_innermost()} ({name})"] += 1


def _innermost() -> str:
    """The line outside of torch that runs: the project's own if there is one."""
    frames = [f for f in traceback.extract_stack()[:-4] if "site-packages/torch/" not in f.filename]
    own = [f for f in frames if f.filename.startswith(str(ROOT)) and "benchmarks" not in f.filename]
    if not frames:  # the thread of the device, outside of any hook
        return "autograd"
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{shown}:{frame.lineno}"


@contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count until the end; what is read inside of `backward` is told apart."""
    backward = torch.autograd.backward

    def watched(*args: Any, **kwargs: Any) -> None:
        counts.backward_runs = True
        try:
            backward(*args, **kwargs)
        finally:
            counts.backward_runs = False

    torch.autograd.backward = watched
    try:
        with counts:
            yield
    finally:
        torch.autograd.backward = backward


Step = Callable[[], None]


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def second_order(kind: type, **settings: Any) -> Callable[[nn.Module, Tensor, Tensor], Step]:
    def stepper(net: nn.Module, x: Tensor, y: Tensor) -> Step:
        optimizer = kind(net.parameters(), **settings)

        def step() -> None:
            optimizer.zero_grad()
            with curvature(*optimizer.required_extensions()):
                F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return step

    return stepper


FIXED = {"lr": 0.3, "damping": 0.03}
LOOPS = {
    "plain loop, AdamW": plain,
    "KFAC, automatic": second_order(KFACOptimizer),
    "KFAC, fixed, curvature in every step": second_order(
        KFACOptimizer, **FIXED, factor_interval=1, inverse_interval=1
    ),
    "KFAC, fixed, curvature in no step": second_order(
        KFACOptimizer, **FIXED, factor_interval=1000, inverse_interval=1000
    ),
    "diagonal, automatic": second_order(DiagGGNOptimizer, lr="auto", damping="auto"),
    "diagonal, curvature in every step": second_order(DiagGGNOptimizer),
    "diagonal, curvature in no step": second_order(DiagGGNOptimizer, interval=1000),
    "private, SGD": private,
}


def of_loop(make: Callable[[nn.Module, Tensor, Tensor], Step], name: str, where: bool) -> Counts:
    """Count one step of a loop of one's own."""
    network = NETWORKS[name]
    net = network.build(nn.ReLU).to(second_device())
    x, y = (part.to(second_device()) for part in network.data(16))
    step = make(net, x, y)
    for _ in range(12):
        step()
    counts = Counts(where)
    with counting(counts):
        step()
    return counts


class Model(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class CountLast(pl.Callback):
    """Counts the last step of a run, from the start of its batch to the end."""

    def __init__(self, where: bool) -> None:
        self.counts = Counts(where)
        self._context = counting(self.counts)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            self._context.__enter__()

    def on_train_end(self, *_: object) -> None:
        self._context.__exit__(None, None, None)


def of_trainer(callbacks: Sequence[pl.Callback], steps: int, name: str, where: bool) -> Counts:
    """Count the last of some steps in Lightning's Trainer."""
    network, last = NETWORKS[name], CountLast(where)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator=SecondAccelerator(),
            strategy=SingleDeviceStrategy(second_device()),
            callbacks=[last, *callbacks],
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        batches = DataLoader([network.data(16)] * (steps + 1), batch_size=None)
        trainer.fit(Model(network.build(nn.ReLU)), batches)
    return last.counts


# Every tenth logged step measures more than the others.
TRAINERS = {
    "Trainer, AdamW": (lambda: [], 30),
    "callback, step not logged": (lambda: [CurvatureCallback(every_n_steps=50)], 30),
    "callback, logged step": (lambda: [CurvatureCallback(every_n_steps=1)], 45),
}


def steps(
    name: str, kinds: Sequence[str] = (*LOOPS, *TRAINERS), where: bool = False
) -> Iterator[tuple[str, Counts]]:
    """Count one step of each kind on a network."""
    with sdpa_kernel(SDPBackend.MATH):
        for title in kinds:
            if title in LOOPS:
                yield title, of_loop(LOOPS[title], name, where)
            else:
                callbacks, count = TRAINERS[title]
                yield title, of_trainer(callbacks(), count, name, where)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["mlp", "3c3d", "transformer"])
    parser.add_argument("--where", action="store_true", help="name the lines")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in arguments.networks:
        print(f"\n{NETWORKS[name].title}\n{'':40} launches reads backward sent uploads float64")
        for title, counts in steps(name, where=arguments.where):
            print(
                f"{title:40} {counts.launches:8} {counts.reads:5} {counts.in_backward:8} "
                f"{counts.sent:4} {counts.uploads:7} {counts.float64:7}",
                flush=True,
            )
            for (kind, place), times in sorted(counts.places.items()):
                print(f"    {kind:8} {times:4} {place}")


if __name__ == "__main__":
    main()

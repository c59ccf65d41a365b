"""What a process keeps between steps of a model under FSDP2, counted.

    OMP_NUM_THREADS=1 python benchmarks/sharded_memory.py [--processes 1 2 4] [--width 256]

The perceptron of `communication.py` is trained by a loop of one's own over gloo, each layer sharded. Counted are the
bytes of the process' tensors behind the step: its parts of parameters and gradients, and the state of the optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from communication import BATCH, CLASSES, network
from process_group import in_processes
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_curv import DiagGGNOptimizer, DPOptimizer, KFACOptimizer, curvature

STEPS = 2
SETUPS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "private AdamW": lambda p: DPOptimizer(
        torch.optim.AdamW(p), noise_multiplier=1.0, expected_batch_size=BATCH
    ),
    "KFAC, inverses sent": lambda p: KFACOptimizer(p, lr=0.1, damping=0.1),
    "KFAC, inverses kept": lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, shard_inverses=True),
    "EKFAC": lambda p: KFACOptimizer(p, lr=0.1, damping=0.1, eigen=True),
    "KFAC, lr and damping found": lambda p: KFACOptimizer(p),
    "DiagGGN": lambda p: DiagGGNOptimizer(p, lr=0.1),
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested dicts and sequences; of a sharded one its part."""
    if isinstance(value, Tensor):
        yield getattr(value, "_local_tensor", value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def size(value: Any) -> int:
    """The bytes behind tensors, those that share memory once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
        for tensor in tensors_in(value)
    }
    return sum(storage.nbytes() for storage in storages.values())


def kept(name: str, width: int) -> tuple[int, int]:
    """Bytes of parameters and gradients, and of the optimizer's state."""
    model = network(width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        if [*layer.parameters()]:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = SETUPS[name](model.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(STEPS):
        x = torch.randn(BATCH, width, generator=generator)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        optimizer.zero_grad()
        if isinstance(optimizer, DPOptimizer):
            needed = optimizer.extensions
        else:
            needed = getattr(optimizer, "required_extensions", tuple)()
        with curvature(*needed):
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
    own = list(model.parameters())
    return size(own + [p.grad for p in own]), size([*optimizer.state.values()])


def kept_by_all(width: int) -> dict[str, Tensor]:
    """The bytes of the process that has most."""
    found = {name: torch.tensor(kept(name, width)) for name in SETUPS}
    for numbers in found.values():
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=256)
    arguments = parser.parse_args()
    whole = sum(4 * p.numel() for p in network(arguments.width).parameters())
    print(f"bytes per process in multiples of the model's parameters, which have {whole:,} bytes")
    print(f"{'':28} {'processes':>9} {'parameters, gradients':>22} {'state':>7}")
    for world in arguments.processes:
        for name, numbers in in_processes(kept_by_all, world, arguments.width).items():
            own, state = (float(number) / whole for number in numbers)
            print(f"{name:28} {world:9} {own:22.2f} {state:7.2f}")


if __name__ == "__main__":
    main()

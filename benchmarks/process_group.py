"""Several processes on this machine for a benchmark, joined by gloo."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def in_processes(work: Callable[..., Any], world: int, *arguments: Any) -> Any:
    """Call `work(*arguments)` in new processes.

    Args:
        work: A function of a module.
        world: How many processes.
        arguments: What can be pickled.

    Returns:
        What it returned in the first of them.
    """
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "found.pt")
        multiprocessing.spawn(_begin, (work, world, port, path, arguments), nprocs=world)
        return torch.load(path)


def _begin(
    rank: int, work: Callable[..., Any], world: int, port: int, path: str, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = work(*arguments)
    if rank == 0:
        torch.save(found, path)
    # The first process holds the store of the group: it goes last.
    dist.barrier()
    dist.destroy_process_group()

"""Several processes on this machine, started as `torchrun` starts them."""

import atexit
import gc
import os
import socket
import warnings
from contextlib import ExitStack

import pytorch_lightning as pl
import torch
from torch import distributed as dist
from torch import multiprocessing

# Of a Trainer that leaves the batches of every process as they are, and writes nothing.
QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "log_every_n_steps": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def spawn(work, *arguments, world=2, groups=None):
    """Call `work(rank, *arguments)` in new processes; an error in one of them is raised here.

    Args:
        work: a function of a module.
        arguments: what can be pickled.
        world: how many processes.
        groups: numbers of processes of groups that are made one after the other, instead of one group of all:
            `work` gets their ports as the last argument, and calls `join` for each.
    """
    ports = free_ports(1 if groups is None else len(groups))
    if groups is not None:
        arguments += (ports,)
    join_at_once = None if groups is not None else ports[0]
    multiprocessing.spawn(_begin, (work, world, join_at_once, arguments), nprocs=world)


def _begin(rank, work, world, port, arguments):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if port is not None:
        join(rank, world, port)
    work(rank, *arguments)
    leave_group()


def leave_group():
    """End the threads of this process' group.

    Torch's hold tensors of the last exchange for a moment longer than it takes, and abort the process where they let go
    of them while the interpreter ends.
    """
    if not dist.is_initialized():
        return
    # The last to hold the threads waits for their end: a group of torch 2.6 does so with the interpreter's lock, which
    # they need to let go of their tensors, and for ever; its backend waits without.
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.destroy_process_group()
    # Models in cycles keep the threads alive.
    gc.collect()
    del backend


class LeavesGroup(pl.Callback):
    """Ends the threads of the group that Lightning has made in a process of its own, and leaves to its end."""

    def setup(self, trainer, pl_module, stage):
        # Not in `teardown`, after which Lightning still exchanges results.
        atexit.register(leave_group)


def join(rank, world, port):
    """Set what a process group reads from the environment."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
    }
    numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()}


def free_ports(count):
    """So many ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]

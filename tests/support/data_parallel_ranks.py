"""Three processes with batches of unequal size under `DistributedDataParallel`, in loops of their own."""

import gc
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_curv import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    CurvatureStepSize,
    DiagGGNExact,
    DiagGGNOptimizer,
    DiagHessian,
    KFACOptimizer,
    Variance,
    curvature,
)
from lightning_curv.errors import UnsupportedError

SIZES = (2, 5, 7)  # samples of each process
WORLD, STEPS = len(SIZES), 4
ALL = range(WORLD)


class Net(nn.Module):
    """A layer that is used twice, and one that the first process leaves out, or all."""

    def __init__(self, branch=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.branch = nn.Linear(6, 3).requires_grad_(branch)
        self.double()

    def forward(self, x, branch):
        h = self.shared(self.shared(self.first(x).tanh()).tanh())
        return self.head(h) + self.branch(h) if branch else self.head(h)


def loss_of(model, rank, step, branch=False):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(SIZES[rank], 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (SIZES[rank],), generator=generator)
    return F.cross_entropy(model(x, branch and rank > 0), y)


# settings of DDP, whether all processes but the first use a layer more, micro-batches per step
SETTINGS = {
    "plain": ({}, False, 1),
    "unused": ({"find_unused_parameters": True}, True, 1),
    "static graph": ({"static_graph": True}, False, 1),
    "accumulation": ({}, False, 2),
    "accumulation, unused": ({"find_unused_parameters": True}, True, 2),
    "bucket views": ({"gradient_as_bucket_view": True}, False, 1),
}
EXTENSIONS = (BatchGrad, BatchL2Grad, Variance, DiagGGNExact, DiagHessian, KFLR)


def fields(model):
    """What the extensions left, by parameter and extension."""
    found = {}
    for name, parameter in model.named_parameters():
        for extension in EXTENSIONS:
            if hasattr(parameter, extension.savefield):
                found[name, extension.savefield] = getattr(parameter, extension.savefield)
    return found


def quantities(setting, rank):
    """Fields of the last micro-batch of every step, under DDP and alone, and the gradients and their means."""
    settings, branch, micro_batches = SETTINGS[setting]
    model, alone, union = Net(branch), Net(branch), Net(branch)
    wrapped = DistributedDataParallel(model, **settings)
    extensions, found = [extension() for extension in EXTENSIONS], []
    for step in range(STEPS):
        union.zero_grad(), model.zero_grad()
        for number in range(micro_batches):
            is_last = number == micro_batches - 1
            of_batch = 10 * step + number, branch
            with (
                nullcontext() if is_last else wrapped.no_sync(),
                curvature(*extensions, check=True),
            ):
                (loss_of(wrapped, rank, *of_batch) / micro_batches).backward()
            with curvature(*extensions):
                (loss_of(alone, rank, *of_batch) / micro_batches).backward()
            for other in ALL:
                (loss_of(union, other, *of_batch) / micro_batches / WORLD).backward()
        found.append((fields(model), fields(alone), gradients(model), gradients(union)))
    return found


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kfac(params, **settings):
    return KFACOptimizer(params, lr=0.1, damping=0.1, curvature="exact", **settings)


OPTIMIZERS = {
    "kfac": kfac,
    "eigen": lambda params: kfac(params, eigen=True),
    "diagonal": lambda params: DiagGGNOptimizer(params, lr=0.1, curvature="exact"),
    "step size": lambda params: CurvatureStepSize(torch.optim.AdamW(params), curvature="exact"),
}
TRAINED = [
    (optimizer, setting)
    for optimizer in ("kfac", "eigen", "diagonal")
    for setting, (_, branch, _) in SETTINGS.items()
    if not branch
]


def train(optimizer, setting, ranks, wrap=nullcontext):
    """The parameters after some steps on the batches of some processes: of one under DDP, or of all in turn.

    Args:
        optimizer: by name.
        setting: by name.
        ranks: whose batches this process has.
        wrap: makes DDP of a module, or is left out.
    """
    _, _, micro_batches = SETTINGS[setting]
    model = Net()
    called = model if wrap is nullcontext else wrap(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    optimizer.curvature_scale = passes = micro_batches * len(ranks)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [(number, rank) for number in range(micro_batches) for rank in ranks]
        for number, rank in parts[:-1]:
            quiet = nullcontext() if called is model else called.no_sync()
            with quiet, curvature(*optimizer.accumulated_extensions()):
                (loss_of(called, rank, 10 * step + number) / passes).backward()
            optimizer.accumulate()
        with curvature(*optimizer.required_extensions()):
            (loss_of(called, parts[-1][1], 10 * step + parts[-1][0]) / passes).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def fp16(model):
    model.register_comm_hook(None, fp16_compress_hook)


def power_sgd(model):
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook)


HOOKS = {"fp16": fp16, "PowerSGD": power_sgd}


def hooked(hook, optimizer, rank):
    """The parameters after some steps with compressed gradients; the last gradients and their means."""
    model = Net()
    wrapped = DistributedDataParallel(model)
    HOOKS[hook](wrapped)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for step in range(STEPS):
        union = Net()
        union.load_state_dict(model.state_dict())
        for other in ALL:
            (loss_of(union, other, step) / WORLD).backward()
        optimizer.zero_grad()
        with curvature(*optimizer.required_extensions(), BatchL2Grad()):
            loss_of(wrapped, rank, step).backward()
        norms = [p.batch_l2 for p in model.parameters() if p.requires_grad]
        optimizer.step()
    return [p.detach() for p in model.parameters()], gradients(model), gradients(union), norms


def joined(rank):
    """Gradients, and those expected, of processes of which some have fewer batches than others."""
    model, alone = Net(), Net()
    wrapped = DistributedDataParallel(model)
    found = []
    with wrapped.join():
        for step in range(2 + rank):
            model.zero_grad(), alone.zero_grad()
            with curvature(BatchL2Grad(), DiagGGNExact(), check=True):
                loss_of(wrapped, rank, step).backward()
            for other in ALL:
                if step < 2 + other:
                    (loss_of(alone, other, step) / WORLD).backward()
            found.append((gradients(model), gradients(alone)))
    return found


def steps_with_join(optimizer, rank, **settings):
    """How many steps an optimizer takes with `join`, and the error that ends them."""
    model = Net()
    wrapped, taken = DistributedDataParallel(model), 0
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    try:
        with wrapped.join(**settings):
            for step in range(2 + rank):
                optimizer.zero_grad()
                with curvature(*optimizer.required_extensions()):
                    loss_of(wrapped, rank, step).backward()
                optimizer.step()
                taken += 1
    except (RuntimeError, UnsupportedError) as error:
        message = str(error)
    return taken, message


def step_behind_join(rank):
    """How many steps an optimizer takes on a model that was in `join`."""
    model = Net()
    wrapped = DistributedDataParallel(model)
    with wrapped.join():
        loss_of(wrapped, rank, 0).backward()
    optimizer = OPTIMIZERS["diagonal"](model.parameters())
    optimizer.zero_grad()
    with curvature(*optimizer.required_extensions()):
        loss_of(wrapped, rank, 0).backward()
    optimizer.step()
    return optimizer.steps


def work(rank, folder):
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    with mock.patch.object(gc, "get_objects", side_effect=AssertionError("searched for FSDP")):
        found = {setting: quantities(setting, rank) for setting in SETTINGS}
    for optimizer, setting in TRAINED:
        settings = SETTINGS[setting][0]
        found[optimizer, setting] = train(
            optimizer,
            setting,
            [rank],
            lambda model, s=settings: DistributedDataParallel(model, **s),
        )
    found |= {
        (hook, optimizer): hooked(hook, optimizer, rank)
        for hook in HOOKS
        for optimizer in ("kfac", "diagonal")
    }
    found["join"] = joined(rank)
    found["behind join"] = step_behind_join(rank)
    for optimizer in ("kfac", "step size"):
        found["refused", optimizer] = steps_with_join(optimizer, rank)
        found["ended", optimizer] = steps_with_join(
            optimizer, rank, throw_on_early_termination=True
        )
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()

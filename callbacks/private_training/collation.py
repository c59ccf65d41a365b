"""Whether a collated batch mixes samples, before the training step sees it."""

from __future__ import annotations

import copy
import random
import secrets
import warnings
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_curv.callbacks.import_names import MisconfigurationException
from lightning_curv.callbacks.private_training.equal_randomness import EqualRandomness, seeded
from lightning_curv.callbacks.private_training.independence import compare, observe, tolerance
from lightning_curv.callbacks.private_training.loader import dataset_size
from lightning_curv.callbacks.private_training.undisturbed import equal, undisturbed
from lightning_curv.errors import UnsupportedError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

_MOST = 4  # samples that two batches share
Pair = tuple[Any, Any]


class _Pairs(Dataset[Pair]):
    """Pairs of collated batches that begin with the same samples and end with others."""

    def __init__(self, loader: DataLoader) -> None:
        self._dataset, self._collate = loader.dataset, loader.collate_fn

    def __getitem__(self, indices: tuple[list[int], int]) -> Pair:
        chosen, seed = indices
        # the smallest are shared, and the largest are in one batch only: padding differs where
        # sizes do
        samples = sorted(self._samples(chosen), key=_entries)
        count = len(samples) // 3
        first, rest = samples[:count], (samples[count : 2 * count], samples[2 * count :])
        randomness = EqualRandomness(
            len(first) + len(rest[0])
        )  # augmentation draws the same for the same samples
        batches = []
        for other in rest:
            with seeded(seed, torch.device("cpu")), randomness:
                # `collate_fn` may write into its samples.
                batches.append(self._collate(copy.deepcopy([*first, *other])))
            randomness.again()
        return batches[0], batches[1]

    def _samples(self, indices: list[int]) -> list[Any]:
        many = getattr(self._dataset, "__getitems__", None)
        return list(many(indices)) if many is not None else [self._dataset[i] for i in indices]


def _entries(sample: Any) -> int:
    """How large a sample is."""
    if isinstance(sample, (Tensor, np.ndarray)):
        return int(np.prod(sample.shape))
    if isinstance(sample, dict):
        return sum(map(_entries, sample.values()))
    if isinstance(sample, (list, tuple)):
        return sum(map(_entries, sample))
    return len(sample) if isinstance(sample, (str, bytes)) else 1


def refuse_mixed_batches(
    trainer: Trainer, pl_module: LightningModule, loader: DataLoader, mean: bool, rounds: int
) -> None:
    """Compare batches that share some samples: what these become must not depend on the others.

    Batches are collated and moved to the device by the user's own `collate_fn` and transfer hooks,
    with equal random numbers. Where what the shared samples become is not the same, by padding for
    instance, or cannot be told because there is no row per sample, their gradients in
    `training_step` decide.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        loader: The user's loader.
        mean: Whether the loss is a mean over the samples.
        rounds: Pairs of batches.

    Raises:
        MisconfigurationException: Samples are mixed.
    """
    size = dataset_size(loader)
    count = min(_MOST, size // 3)
    if not count:
        return
    jobs = []
    for _ in range(rounds):
        # Not from the user's generators: the run goes on as it would without the check.
        drawn = random.SystemRandom().sample(range(size), 3 * count)
        jobs.append((drawn, secrets.randbits(31)))
    pairs = DataLoader(
        _Pairs(loader),
        # a pair is collated already
        batch_size=None,
        sampler=jobs,
        num_workers=min(1, loader.num_workers),  # where the user's data set is read, too
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
    with seeded(
        secrets.randbits(31), pl_module.device
    ):  # of the data set, where it augments in this process
        for first, second in pairs:
            _refuse_mixed(trainer, pl_module, first, second, count, mean)


def _refuse_mixed(
    trainer: Trainer, pl_module: LightningModule, first: Any, second: Any, count: int, mean: bool
) -> None:
    with undisturbed(pl_module):
        a, b = (_moved(trainer, pl_module, batch) for batch in (first, second))
        same = same_samples(a, b, count, 2 * count)
    if not same:
        _compare_gradients(pl_module, a, b, count, mean)


def _moved(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch as the training step gets it, with the same random numbers every time."""
    with seeded(0, pl_module.device):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _compare_gradients(pl_module: LightningModule, a: Any, b: Any, count: int, mean: bool) -> None:
    size, rows = 2 * count, torch.arange(count)
    weights = torch.randn(
        size, dtype=torch.float64, generator=torch.Generator().manual_seed(secrets.randbits(63))
    )
    # The other samples differ on purpose.
    weights[count:] = 0
    randomness = EqualRandomness(size)
    try:
        with undisturbed(pl_module) as kept:
            first = observe(pl_module, a, 0, size, [weights], randomness, mean)
            kept.put_back()
            second = observe(pl_module, b, 0, size, [weights], randomness.again(), mean)
    except (
        UnsupportedError
    ) as error:  # training refuses by itself what it has no per-sample gradients of
        warnings.warn(
            "PrivacyCallback cannot check that `collate_fn` and transfer hooks keep samples apart: "
            f"on {size} samples there are no gradients to compare ({error})",
            stacklevel=2,
        )
        return
    if first is None or second is None:
        return
    try:
        shared = type(second)(second.norms[:count], second.sums)
        compare(first, shared, rows, 0, weights[:count], mean, tolerance(pl_module))
    except MisconfigurationException as error:
        raise MisconfigurationException(
            "PrivacyCallback needs batches whose samples do not influence each other, found that "
            "`collate_fn` or a transfer hook (`on_before_batch_transfer`, "
            "`on_after_batch_transfer`) makes something else of a sample when the other samples of "
            "its batch change: mixing (mixup, CutMix), statistics of the batch, or padding that "
            "the loss does not leave out. Do it sample by sample in the data set, with fixed "
            "statistics, or mask the padding."
        ) from error


def same_samples(a: Any, b: Any, count: int, size: int) -> bool:
    """Whether the first samples of two batches are the same for sure.

    Args:
        a: A batch.
        b: Another one, of the same kind.
        count: Number of the samples that are compared.
        size: Number of samples of each batch.
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray) and a.dtype.kind in "biufc":
        return same_samples(torch.from_numpy(a), torch.from_numpy(b), count, size)
    if isinstance(a, Tensor):
        return _same_rows(a, b, count, size)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_samples(a[key], b[key], count, size) for key in a)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return False
        # One entry per sample, or a few tensors that happen to be as many?
        per_sample = len(a) == size and not any(
            isinstance(v, Tensor) and v.ndim and len(v) == size for v in a
        )
        kept = count if per_sample else len(a)
        return all(same_samples(v, w, count, size) for v, w in zip(a[:kept], b[:kept], strict=True))
    if is_dataclass(a):
        return all(
            same_samples(getattr(a, f.name), getattr(b, f.name), count, size) for f in fields(a)
        )
    return isinstance(a, (int, float, str, bytes, type(None))) and bool(a == b)


def _same_rows(a: Tensor, b: Tensor, count: int, size: int) -> bool:
    if a.is_sparse or b.is_sparse or a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Samples come first, or second where sequences do.
    axis = next((k for k in range(min(a.ndim, 2)) if a.shape[k] == size), None)
    if axis is not None:
        a, b = a.movedim(axis, 0)[:count], b.movedim(axis, 0)[:count]
    return equal(a, b)

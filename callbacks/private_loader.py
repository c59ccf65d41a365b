"""From the user's training loader to batches whose privacy can be accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, cast

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.connectors.data_connector import _DataLoaderSource
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_curv.callbacks.poisson import PoissonBatchSampler


class ConvertedSource(_DataLoaderSource):
    """Where a Trainer gets its training loader from, with a conversion on the way.

    Args:
        source: The Trainer's own source.
        convert: From the user's loader to the one that is used.
    """

    def __init__(self, source: _DataLoaderSource, convert: Callable[[Any], Any]) -> None:
        super().__init__(source.instance, source.name)
        self.source, self._convert = source, convert

    def dataloader(self) -> Any:
        return self._convert(self.source.dataloader())


def require_plain_loader(loader: Any) -> DataLoader:
    """Refuse loaders whose samples cannot be drawn anew, or that repeat samples."""
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"PrivacyCallback expects one torch DataLoader for training, found `{type(loader).__name__}`; join several "
            "data sets with `torch.utils.data.ConcatDataset`."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise MisconfigurationException(
            "PrivacyCallback expects a data set with `__getitem__` and `__len__`, found an iterable one: without its "
            "size there is no sampling rate. Load it into a map-style data set."
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise MisconfigurationException(
            f"PrivacyCallback expects a DataLoader with `batch_size=`, found `{type(loader.batch_sampler).__name__}`, "
            "which may repeat samples; pass `batch_size=` and leave the drawing to the callback."
        )
    sampler = loader.sampler
    plain = isinstance(sampler, (SequentialSampler, DistributedSampler))
    if not plain and not (isinstance(sampler, RandomSampler) and not sampler.replacement):
        raise MisconfigurationException(
            f"PrivacyCallback expects every sample with the same probability, found `{type(sampler).__name__}`, which "
            "may repeat or prefer samples; use `shuffle=True`."
        )
    return loader


def dataset_size(loader: DataLoader) -> int:
    """Number of samples."""
    return len(cast("Sized", loader.dataset))


def with_batches(loader: DataLoader, sampler: PoissonBatchSampler, dataset: Dataset | None = None) -> DataLoader:
    """The same loader with other batches, and with another data set if one is given."""
    return DataLoader(
        loader.dataset if dataset is None else dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
    )

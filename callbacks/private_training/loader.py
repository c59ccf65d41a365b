"""From the user's training loader to batches whose privacy can be accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_curv.callbacks.import_names import MisconfigurationException, from_lightning
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler

if TYPE_CHECKING:
    from pytorch_lightning import Trainer
    from pytorch_lightning.trainer.connectors.data_connector import _DataLoaderSource
else:
    _DataLoaderSource = from_lightning("trainer.connectors.data_connector", "_DataLoaderSource")


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
            "PrivacyCallback expects one torch DataLoader for training, found "
            f"`{type(loader).__name__}`; join several data sets with "
            "`torch.utils.data.ConcatDataset`."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise MisconfigurationException(
            "PrivacyCallback expects a data set with `__getitem__` and `__len__`, found an "
            "iterable one: without its size there is no sampling rate. Load it into a map-style "
            "data set."
        )
    # The very class: a subclass may do anything.
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise MisconfigurationException(
            "PrivacyCallback expects a DataLoader with `batch_size=`, found "
            f"`{type(loader.batch_sampler).__name__}`, which may repeat samples; pass "
            "`batch_size=` and leave the drawing to the callback."
        )
    reason = _not_uniform(loader.sampler, dataset_size(loader))
    if reason:
        raise MisconfigurationException(
            f"PrivacyCallback expects every sample with the same probability, found {reason}, "
            "which may repeat or prefer samples; use `shuffle=True`."
        )
    return loader


def _not_uniform(sampler: Any, size: int) -> str:
    """What of a sampler may draw some samples more often than others; empty: nothing does.

    Subclasses may do anything, so that they are named as they are.
    """
    name = f"`{type(sampler).__name__}`"
    if type(sampler) not in (SequentialSampler, RandomSampler, DistributedSampler):
        return name
    source: Any = (
        sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
    )
    if len(source) != size:
        return f"{name} over {len(source)} of {size} samples"
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != size):
        drawn = f"num_samples={sampler.num_samples} of {size} samples"
        return f"{name} with replacement={sampler.replacement}, {drawn}"
    return ""


def require_each_sample_once(loader: DataLoader, trainer: Trainer) -> None:
    """Refuse loaders whose epoch is anything but all samples once, shuffled, in batches."""
    sampler, processes = loader.sampler, trainer.world_size
    size = dataset_size(loader)
    if size % processes:
        raise MisconfigurationException(
            f"`sampling='epoch'` needs a data set that {processes} processes can share evenly, "
            f"found {size} samples: Lightning would repeat some. Leave some out, or use Poisson "
            "sampling."
        )
    own = [
        name for name in ("__iter__", "_get_iterator", "_index_sampler") if _overrides(loader, name)
    ]
    if own:
        raise MisconfigurationException(
            "`sampling='epoch'` needs a DataLoader that takes its sampler's samples as they come, "
            f"found `{type(loader).__name__}`, which overrides "
            f"{', '.join(f'`{name}`' for name in own)}; use a plain DataLoader, or Poisson "
            "sampling."
        )
    if isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler) and not sampler.shuffle
    ):
        raise MisconfigurationException(
            "`sampling='epoch'` needs a loader that shuffles, found one that keeps the order of "
            "the data set; pass `shuffle=True`, or use Poisson sampling."
        )
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas != processes:
        raise MisconfigurationException(
            "`sampling='epoch'` needs every sample in one process, found a DistributedSampler for "
            f"{sampler.num_replicas} of {processes} processes; leave it to Lightning."
        )


def _overrides(loader: DataLoader, name: str) -> bool:
    return getattr(type(loader), name) is not getattr(DataLoader, name)


def dataset_size(loader: DataLoader) -> int:
    """Number of samples."""
    return len(cast("Sized", loader.dataset))


def with_batches(
    loader: DataLoader, sampler: PoissonBatchSampler, dataset: Dataset | None = None
) -> DataLoader:
    """The same loader with other batches, and with another data set if one is given."""
    # A plain one: subclasses may take other arguments, and bring their own way to samples.
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

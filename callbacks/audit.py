"""One audited training run: is a run as private as it claims to be?"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_curv.callbacks.import_names import Callback, MisconfigurationException
from lightning_curv.callbacks.privacy import PrivacyCallback
from lightning_curv.callbacks.private_training.loader import with_batches
from lightning_curv.callbacks.private_training.poisson import PoissonBatchSampler
from lightning_curv.callbacks.private_training.refusals import private_optimizer
from lightning_curv.callbacks.private_training.undisturbed import undisturbed
from lightning_curv.optimizers.privacy.audit_canaries import GradientCanaries
from lightning_curv.optimizers.privacy.audit_report import PrivacyAudit

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


def privacy_audit(
    trainer: Trainer,
    model: LightningModule,
    train_dataloaders: Any = None,
    canaries: int | Dataset = 1000,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
    norm: float = 10.0,
    seed: int | None = None,
    **fit: Any,
) -> PrivacyAudit:
    r"""Train a model once, with canaries among its samples, and look for them in what was released.

    The set-up is that of the run that is to be audited: its module, its loader, and a Trainer with
    its `PrivacyCallback`. m canaries are thrown a fair coin each; those it chose are trained on as
    samples of the data set are: drawn by the same sampler, clipped, noised and accounted by the
    same step. An auditor who sees the released steps then guesses the coins. More right guesses
    than (ε, δ)-differential privacy allows refute the claim, with a stated confidence. Steinke,
    Nasr & Jagielski, *Privacy Auditing with One (1) Training Run*, NeurIPS 2023.

    An audit that finds nothing proves nothing: the guarantee rests on the proof, the audit on the
    worst samples that it tried. The trained weights have seen the canaries and are for the audit
    only; so is the account of the callback.

    Args:
        trainer: With a `PrivacyCallback`; one process.
        model: Its optimizer is a `DPOptimizer`. It is trained.
        train_dataloaders: As for `trainer.fit`.
        canaries: Their number m: gradients of one entry each, longer than C (`GradientCanaries`),
            the worst case for the steps. Or a data set of m samples like those of the loader, for
            example with wrong labels: input canaries, which test the forward pass and the loss too.
            Their score is how far training lowered their loss, which is much weaker.
        confidence: An (ε, δ)-private run is refuted with a probability of at most 1 - confidence.
        guesses: Numbers of guesses, each a trial, fixed before the run; the confidence is shared
            among them.
        norm: Norm of the gradient canaries in units of C.
        seed: Of coins and canaries; default: from the operating system's entropy.
        fit: Further arguments of `trainer.fit`.

    Returns:
        ε that was shown beside ε that was claimed; `print` and `.plot()` show it.

    Cost: per step a backward pass through one linear op per large parameter; for input canaries a
        forward pass of each before and after training.

    Raises:
        MisconfigurationException: There is no `PrivacyCallback`, or not Poisson sampling, or
            several processes.

    Example:
        >>> import torch, lightning_curv, pytorch_lightning as pl
        >>> class Net(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(40, 10)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return lightning_curv.DPSGD(self.parameters(), noise_multiplier=2.0)
        >>> data = torch.utils.data.TensorDataset(torch.randn(60, 40), torch.randint(10, (60,)))
        >>> trainer = pl.Trainer(
        ...     max_epochs=1, callbacks=[PrivacyCallback()],
        ...     accelerator="cpu", logger=False, barebones=True,
        ... )
        >>> loader = torch.utils.data.DataLoader(data, 20, shuffle=True)
        >>> audit = privacy_audit(trainer, Net(), loader, canaries=400)
        >>> audit.refuted, audit.canaries
        (False, 400)
    """
    callbacks = cast("list[Any]", trainer.callbacks)  # type: ignore[attr-defined]
    privacy = next(
        (callback for callback in callbacks if isinstance(callback, PrivacyCallback)),
        None,
    )
    if privacy is None:
        raise MisconfigurationException(
            "privacy_audit expects a Trainer with a `PrivacyCallback`, whose ε it compares with, "
            "found none; add it to `callbacks`."
        )
    if privacy.sampling == "epoch" or trainer.world_size > 1:
        raise MisconfigurationException(
            "privacy_audit draws canaries as Poisson sampling draws samples, in one process, found "
            f"sampling={privacy.sampling!r} and {trainer.world_size} processes; audit the run with "
            "Poisson sampling on one device, or use `GradientCanaries` in a loop of your own."
        )
    seed = secrets.randbits(128) if seed is None else seed
    part: _Audited
    if isinstance(canaries, int):
        part = _Gradients(privacy, canaries, norm, seed)
    else:
        part = _Inputs(privacy, canaries, seed)
    # At the end of the list: in `setup` the private callback must have made its plan before.
    callbacks.append(part)
    try:
        trainer.fit(model, train_dataloaders, **fit)
    finally:
        # A later fit of this Trainer is no audit.
        callbacks.remove(part)
    epsilon = privacy.accountant.epsilon(privacy.delta)
    return PrivacyAudit.of(*part.found(), epsilon, privacy.delta, confidence, guesses)


class _Audited(Callback):
    """Lets canaries take part in a run of `PrivacyCallback`, which comes first among callbacks."""

    def __init__(self, privacy: PrivacyCallback) -> None:
        self.privacy = privacy

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # There is no loader yet: the plan adapts it when Lightning asks for it.
        self.privacy._current.adapt = self.adapt

    def adapt(self, loader: DataLoader) -> DataLoader:
        """The loader of Poisson batches, with canaries."""
        raise NotImplementedError

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and coins of all canaries."""
        raise NotImplementedError


class _Gradients(_Audited):
    """Canaries that are gradients: they are drawn, but not loaded."""

    def __init__(
        self,
        privacy: PrivacyCallback,
        count: int,
        norm: float,
        seed: int,
    ) -> None:
        super().__init__(privacy)
        self.count = count
        self.norm = norm
        self.seed = seed
        self.canaries: GradientCanaries | None = None

    @property
    def _canaries(self) -> GradientCanaries:
        assert self.canaries is not None
        return self.canaries

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        return self._canaries.scores, self._canaries.members

    def adapt(self, loader: DataLoader) -> DataLoader:
        # None is loaded: no data set has them, their gradients are made at the step.
        _sampler(loader).guests = np.zeros(self.count, bool)
        return loader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # σ and C are known by now: the private callback has set them in this hook, just before.
        self.canaries = GradientCanaries(
            private_optimizer(trainer),
            self.count,
            self.norm,
            self.seed,
        )

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
    ) -> None:
        # All samples of the step are in the sum, and its noise is not: canaries count as further
        # samples.
        number = self.privacy._drawn_step.number
        self._canaries.backward(self.privacy._current.drawn_guests(number))

    def teardown(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        if self.canaries is not None:
            self.canaries.close()


class _Inputs(_Audited):
    """Canaries that are samples: those of the coins' choice are loaded."""

    def __init__(self, privacy: PrivacyCallback, dataset: Dataset, seed: int) -> None:
        super().__init__(privacy)
        self.dataset = dataset
        self.members = np.random.default_rng(seed).random(len(cast("Any", dataset))) < 0.5
        self.scores = np.zeros(len(self.members))
        self._collate: Any = None

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        return self.scores, self.members

    def adapt(self, loader: DataLoader) -> DataLoader:
        sampler = _sampler(loader)
        sampler.guests = self.members
        self._collate = loader.collate_fn
        return with_batches(loader, sampler, ConcatDataset([loader.dataset, self.dataset]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scores = self._losses(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What was trained on should have lost more: higher scores are guessed to be members.
        self.scores = self.scores - self._losses(pl_module)

    def _losses(self, pl_module: LightningModule) -> np.ndarray:
        """The loss of every canary."""
        losses = []
        strategy = pl_module.trainer.strategy
        with (
            torch.no_grad(),
            undisturbed(pl_module),
            pl_module.trainer.precision_plugin.forward_context(),
        ):
            # One by one: the loss of a batch is that of no sample.
            for i in range(len(self.members)):
                batch = strategy.batch_to_device(self._collate([cast("Any", self.dataset)[i]]))
                output = pl_module.training_step(batch, 0)
                losses.append(
                    float(cast(Tensor, output["loss"] if isinstance(output, dict) else output))
                )
        return np.array(losses)


def _sampler(loader: DataLoader) -> PoissonBatchSampler:
    return cast("PoissonBatchSampler", loader.batch_sampler)

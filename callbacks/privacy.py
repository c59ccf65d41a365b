"""The callback that makes training differentially private: batches, clipping, account, budget."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_curv.callbacks.import_names import Callback, MisconfigurationException
from lightning_curv.callbacks.private_training import logs
from lightning_curv.callbacks.private_training.budget import Budget
from lightning_curv.callbacks.private_training.checks import Checks
from lightning_curv.callbacks.private_training.loader import ConvertedSource
from lightning_curv.callbacks.private_training.plan import Plan
from lightning_curv.callbacks.private_training.refusals import (
    private_optimizer,
    refuse_batch_statistics,
    refuse_half_precision,
    refuse_trainer,
)
from lightning_curv.callbacks.private_training.settings import check
from lightning_curv.callbacks.private_training.step import DrawnStep
from lightning_curv.callbacks.private_training.summary import guarantee, summary_table
from lightning_curv.callbacks.recorded_step import record_training_step, restore_training_step
from lightning_curv.callbacks.user_batch import Contents, describe_batch
from lightning_curv.distributed.failures import telling
from lightning_curv.engine.context import curvature
from lightning_curv.optimizers.privacy.accounting import PrivacyAccountant, require_accountable
from lightning_curv.samples.batch import Batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

# Of the callbacks that have trained a module.
_ACCOUNTS: WeakKeyDictionary[LightningModule, list[PrivacyAccountant]] = WeakKeyDictionary()


class PrivacyCallback(Callback):
    r"""Differentially private training of an ordinary `LightningModule`.

    Its optimizer is a `DPOptimizer`; `training_step`, its scalar loss and the DataLoader stay as
    they are. The callback

    - draws Poisson batches from the loader's data set: every sample takes part in a step with
      probability q = B̄ / N, where B̄ = `batch_size` × `accumulate_grad_batches` × processes of
      the loader as written; each batch is split into exactly `accumulate_grad_batches` parts, so
      that `global_step`, schedulers and the length of an epoch are what they were;
    - listens to the user's own backward passes, so that the optimizer clips and adds noise;
    - accounts for every step with `dp-accounting`, in the checkpoint too, as it was drawn: rate,
      sizes and length of the run are read at every step. Training stops before a step that would
      exceed the budget;
    - verifies on batches at growing distances, and in parts at every batch, that samples do not
      influence each other and that nothing else learns from them.

    The guarantee is (ε, δ)-differential privacy of all weights that training ends with and passes
    through, for neighbouring data sets that differ by one sample; `summary` says in which way. It
    does not cover statistics of the training data that you log or select by (a checkpoint by
    training loss). See `docs/privacy.md`.

    The account goes on over further fits, Trainers and checkpoints; each draws fresh batches and
    fresh noise.

    - `privacy/epsilon`: ε spent, on the progress bar too
    - `privacy/noise_multiplier`: σ
    - `privacy/clip_norm`: C
    - `privacy/noised_grad_norm`: ‖g̃‖
    - `non_private/sample_norm_median|max`: quantiles of ‖g_i‖; only with `log_non_private=True`
    - `non_private/clipped_fraction`: share of samples with ‖g_i‖ > C; the same
    - `non_private/discarded`: samples whose gradient was not finite; the same

    Args:
        epsilon: The budget ε; gives σ when the optimizer has none. `None`: no budget.
        delta: δ, well below 1 / N.
        sampling: `"poisson"`; `"truncated_poisson"`, of whose batches at most
            `max_batch_size` samples are kept; `"epoch"`, the shuffled loader as it is,
            accounted as one Gaussian mechanism per epoch without amplification, for neighbours of
            which one has a sample zeroed out.
        max_batch_size: Samples of the largest truncated batch, all processes and parts together.
        max_physical_batch_size: Samples that a process has in memory at once. The loader's batches
            may then be as large as the logical batch should be; each is split by size, its parts
            filled one after the other, and the Trainer accumulates them: its own
            `accumulate_grad_batches` becomes the number of parts that suffice for all but one in
            10⁹ batches, of whose last part is larger. Empty parts cost a sample each. Whatever the
            Trainer counts in batches (`limit_train_batches`, `val_check_interval`) counts parts.
        accountant: `"pld"` or `"rdp"`.
        on_budget: `"stop"` before the step that would exceed `epsilon`, or `"warn"` once and
            go on.
        every_n_steps: Steps between two evaluations of ε besides the end of every epoch (each takes
            up to a second).
        seed: Of the batches. It must be secret; default: from the operating system's entropy. Once
            a checkpoint was loaded, batches come from fresh entropy all the same.
        check_independence: Compare gradients of samples in a batch with those in random parts of
            it, on the 1st, 2nd, 5th, 10th, ... step; and what `collate_fn` and transfer hooks make
            of samples in different batches, for each loader. Random numbers of a sample are equal
            in all of them. `False` is for losses of which you know that samples do not influence
            each other, although random numbers that do not come from torch make it seem so.
        log_non_private: Log statistics of the samples.
        public_state: Patterns of names (`"target.*"`) of parameters and buffers that other code
            changes without looking at the data: moving averages of weights, clamped weights.
        exact_resume: Save the state of batches and noise in checkpoints and go on with it, so that
            a run resumes bit for bit. Two runs that go on from one checkpoint then use the same
            noise, and the difference of their weights has none: no ε holds for both together. Only
            where exactly one run goes on, and checkpoints are kept secret.
        same_shapes: Fill all batches up to one size with samples that stand in and do not count, at
            random places. The last digits of what torch computes for a sample depend on the shape
            of its batch; with this they do not depend on who else was drawn, whatever a network
            makes of them. Costs the places that are filled up: few where a logical batch is large
            (5 % of 16,384). What you log of a batch counts the stand-ins. Needed where parameters
            are of half precision.

    Raises:
        MisconfigurationException: In `fit`: something in the set-up is not private; the message
            says what to do.

    Example:
        >>> PrivacyCallback(epsilon=3.0, delta=1e-5).sampling
        'poisson'
    """

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float = 1e-5,
        sampling: str = "poisson",
        max_batch_size: int | None = None,
        accountant: str = "pld",
        on_budget: str = "stop",
        every_n_steps: int | None = None,
        seed: int | None = None,
        check_independence: bool = True,
        log_non_private: bool = False,
        public_state: Sequence[str] = (),
        exact_resume: bool = False,
        max_physical_batch_size: int | None = None,
        same_shapes: bool = False,
    ) -> None:
        check(
            epsilon,
            delta,
            sampling,
            max_batch_size,
            accountant,
            on_budget,
            max_physical_batch_size,
            same_shapes,
        )
        self.epsilon, self.delta = epsilon, delta
        self.sampling, self.max_batch_size = sampling, max_batch_size
        self.max_physical_batch_size, self.same_shapes = max_physical_batch_size, same_shapes
        self.accountant = PrivacyAccountant(method=accountant)
        self.on_budget, self.every_n_steps = on_budget, every_n_steps
        self.seed = seed
        self.check_independence, self.log_non_private = check_independence, log_non_private
        self.public_state, self.exact_resume = tuple(public_state), exact_resume
        self.noise_multiplier: float | None = None
        self._clip_norm: float | None = None
        self._entropy = seed  # what batches are drawn from
        self._next = 0  # the number of the next step to be drawn, over all fits
        self._resumes = False  # whether batches and noise go on where a checkpoint was
        self._forget_fit()

    def _forget_fit(self) -> None:
        """Forget everything that belongs to one `fit`."""
        self._source: ConvertedSource | None = None
        self._plan: Plan | None = None
        self._budget = Budget(self.epsilon, self.delta, self.accountant)
        self._warned = False
        self._given_size: float | None = None
        self._checks: Checks | None = None
        self._context: curvature | None = None
        self._step: DrawnStep | None = None
        self._size: int | None = None
        self._counted: Tensor | None = None
        self._contents: Contents | None = None
        self._batch = Batch()
        self._in_batch = False
        self._spent = 0.0
        self._replaced: Any = None
        self._logged: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        # Whoever reads the seed knows which samples took part: it is saved only where that was
        # asked for.
        drawn = {"entropy": self._entropy, "next": self._next} if self.exact_resume else {}
        return {"noise_multiplier": self.noise_multiplier, **drawn, **self.accountant.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.exact_resume and "entropy" not in state_dict:
            raise KeyError(
                "Expected the state of the batches for `exact_resume=True`, found none: the "
                "checkpoint was saved without that option. Leave it out to go on with fresh "
                "batches and fresh noise."
            )
        self.noise_multiplier = state_dict["noise_multiplier"]
        self.accountant.load_state_dict(state_dict)
        self._resumes = self.exact_resume
        # without entropy of its own, every continuation of this checkpoint would draw the same
        # batches
        self._entropy = state_dict["entropy"] if self._resumes else None
        self._next = state_dict["next"] if self._resumes else 0

    def __getstate__(self) -> dict[str, Any]:
        # a copy draws other batches, unless nothing was drawn yet
        return {**self.__dict__, "_entropy": None if self._next else self._entropy}

    def summary(self) -> str:
        """Describe what is guaranteed so far.

        Returns:
            A table with ε, δ, the neighbouring relation, and the releases that the account is made
            of.
        """
        return summary_table(
            self.accountant, self.epsilon, self.delta, self._clip_norm, self.accountant.sampling
        )

    # --- before training --------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        # The first to see a batch: hooks of others may change it. In place, for the Trainer goes
        # through this list just now; those before this callback had their turn.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)
        # In case an earlier `fit` ended without a hook that tidied up.
        self._restore(trainer)
        self._forget_fit()
        refuse_trainer(trainer, pl_module)
        refuse_batch_statistics(pl_module)
        poisson = self.sampling != "epoch"
        if poisson:
            # Every process draws the same global batch and takes its share: Lightning must not
            # divide the data set among them once more.
            connector = trainer._accelerator_connector
            self._replaced, connector.use_distributed_sampler = (
                connector.use_distributed_sampler,
                False,
            )
        self._plan = plan = Plan(
            trainer,
            poisson,
            self.max_batch_size,
            lambda: self._secret_seed(trainer),
            lambda: self._next,
            self.max_physical_batch_size,
            self.same_shapes,
        )
        # The source, not the loader: Lightning asks it again whenever loaders are reloaded.
        self._source = ConvertedSource(trainer.fit_loop._data_source, plan.convert)
        trainer.fit_loop._data_source = self._source

    def _secret_seed(self, trainer: Trainer) -> int:
        if self._entropy is None:
            # One seed for all processes, or they would draw different global batches.
            self._entropy = trainer.strategy.broadcast(secrets.randbits(128))
        return self._entropy

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = private_optimizer(trainer)  # before its state is restored
        own = optimizer.accountant
        if own is not None and own is not self.accountant:
            # What it has spent stays spent, and whoever holds it learns of what is spent now.
            self.accountant.share_with(own)
        self._warn_of_another_account(pl_module)
        # The optimizer itself tells of its steps, before anything of them can be seen.
        optimizer.accountant, optimizer.exact_resume = self.accountant, self.exact_resume
        refuse_batch_statistics(pl_module)  # of layers that were made since `setup`

    def _warn_of_another_account(self, pl_module: LightningModule) -> None:
        """Warn if the weights of the module know of releases that this account does not know."""
        accounts = _ACCOUNTS.setdefault(pl_module, [])
        unknown = [account for account in accounts if self.accountant.lacks(account)]
        if unknown:
            spent = max(account.epsilon(self.delta) for account in unknown)
            rank_zero_warn(
                "PrivacyCallback counts what is released from now on, found a module that another "
                f"PrivacyCallback has trained with ε = {spent:.3g} at δ = {self.delta:g}: where "
                "the weights and the data are still those, both add up to more than either says. "
                "Use that callback again, or pass its account to the optimizer, "
                "`DPOptimizer(..., accountant=callback.accountant)`."
            )
        if all(account is not self.accountant for account in accounts):
            accounts.append(self.accountant)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer, plan = private_optimizer(trainer), self._current
        if plan.poisson and not self.same_shapes:
            refuse_half_precision(optimizer)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_backward_grad_sync = (
                False  # clipped sums are added up instead
            )
        # The same noise in two runs cancels in the difference of their weights.
        if self.accountant.history and not self._resumes:
            optimizer.renew_noise()
        self._resumes = False
        self.accountant.start_run(trainer.strategy.broadcast(secrets.token_hex(8)))
        plan.align()
        # The user's, if there is one: `_follow` replaces it.
        self._given_size = optimizer.expected_batch_size
        self._follow(trainer)
        if optimizer.noise_multiplier is None:
            # Once, and kept in checkpoints: a resumed run must not calibrate for the steps that are
            # left.
            if self.noise_multiplier is None:
                self.noise_multiplier = self._budget.noise(plan.sampling, plan.releases)
            optimizer.noise_multiplier = self.noise_multiplier
        require_accountable(optimizer.noise_multiplier)
        mean = optimizer.loss_reduction == "mean"
        self._checks = Checks(
            trainer, pl_module, optimizer, mean, self.public_state, self.check_independence
        )
        self._spent = self.accountant.epsilon(self.delta)
        if self.log_non_private:
            rank_zero_warn(
                "PrivacyCallback logs `non_private/...`: these values are not covered by the "
                "guarantee."
            )

    def _follow(self, trainer: Trainer) -> None:
        """Account for the next step as it will be drawn.

        Loader, data set and length of the run may have changed since the last one.
        """
        optimizer, plan = private_optimizer(trainer), self._current
        plan.refuse_parts_of_steps()
        self.accountant.sampling = plan.sampling
        expected = plan.expected_batch_size
        if self._given_size not in (None, expected):
            raise MisconfigurationException(
                "`expected_batch_size` of the optimizer must be batch size × accumulated batches × "
                f"processes, {expected:g}, found {self._given_size}; leave it out."
            )
        optimizer.expected_batch_size = expected
        # Lightning divides the loss by it, but C bounds the gradients of the samples' own losses.
        optimizer.loss_scale = 1 / trainer.accumulate_grad_batches
        self._clip_norm = optimizer.clip_norm

    @property
    def _current(self) -> Plan:
        assert self._plan is not None
        return self._plan

    # --- one batch --------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.accountant.start_epoch()
        self._forget_parts()

    @telling()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        parts_before = 0 if self._step is None else self._step.parts
        if part != parts_before % trainer.accumulate_grad_batches:
            raise MisconfigurationException(
                f"PrivacyCallback expects whole steps of {trainer.accumulate_grad_batches} "
                f"accumulated batches, found a run that goes on at batch {batch_idx}, in the "
                "middle of one: its other batches are lost. Save checkpoints after whole steps."
            )
        if part == 0:
            self._begin_step(trainer)
        self._drawn_step.parts += 1
        self._in_batch = True
        self._size, self._counted = self._rows(part)
        self._batch = Batch(self._size)
        # What hooks and the step change is found by comparing with how things are now.
        self._check.before(batch, batch_idx, self._size, self._current.loader)
        # This callback is the first: `_read` tells what the hooks of all others have made of the
        # batch.
        self._contents = Contents(batch)
        record_training_step(pl_module, read=self._read)

    def _rows(self, part: int) -> tuple[int | None, Tensor | None]:
        """How many rows a part of the step has, and which of them count.

        All count, unless some are given; where nobody was drawn there is one that stands in. The
        number is unknown where the batch tells.
        """
        counted = self._current.counted(self._drawn_step.number, part)
        if counted is None:
            return None, None
        return len(counted), None if counted.all() else torch.from_numpy(counted)

    def _begin_step(self, trainer: Trainer) -> None:
        """Account for what a step will release, and allow it, before its first batch is read."""
        self._forget_parts()
        self._follow(trainer)
        self._check_budget(trainer)
        # After the step the account says otherwise.
        costs = self.accountant.next_step_costs
        self._step = DrawnStep(private_optimizer(trainer), self._next, costs)
        # When it is drawn, not when it has stepped: no number is drawn from twice, whatever fails.
        self._next += 1

    @property
    def _drawn_step(self) -> DrawnStep:
        assert self._step is not None
        return self._step

    def _forget_parts(self) -> None:
        if self._step is not None:
            self._step.forget_parts()

    @property
    def _check(self) -> Checks:
        assert self._checks is not None
        return self._checks

    def _read(self, batch: Any) -> None:
        if self._contents is None or not self._contents.are(Contents(batch)):
            raise MisconfigurationException(
                "PrivacyCallback expects the batch that `collate_fn` and transfer hooks have made, "
                "found that a hook changed it before `training_step` (`on_train_batch_start`), "
                "where nothing tells whether samples were mixed. Do it in `training_step` or "
                "`on_after_batch_transfer`, which are checked, or in the data set."
            )
        self._batch = describe_batch(batch, self._size)

    def _check_budget(self, trainer: Trainer) -> None:
        sigma = float(private_optimizer(trainer).noise_multiplier or 0.0)
        # Under a schedule only so many of the coming steps have the noise that is asked about.
        planned = private_optimizer(trainer).same_noise(self._current.left)
        if (
            self._warned
            or not self.accountant.next_step_costs
            or self._budget.allows(sigma, planned)
        ):
            return
        message = (
            f"PrivacyCallback: the budget ε = {self.epsilon:g} is spent after "
            f"{trainer.global_step} steps ({self._guarantee})"
        )
        if self.on_budget == "stop":
            rank_zero_warn(f"{message}: training stops.")
            trainer.should_stop = True
            raise StopIteration  # ends the epoch before the step
        rank_zero_warn(f"{message}; training goes on (`on_budget='warn'`).")
        self._warned = True

    @property
    def _guarantee(self) -> str:
        return guarantee(self.accountant.epsilon(self.delta), self.delta, self.accountant.sampling)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        optimizer = private_optimizer(trainer)
        optimizer.counted = self._counted
        # The backward pass is Lightning's: a hook enters the context before it, another one leaves
        # it.
        self._context = curvature(*optimizer.extensions, batch_size=self._batch)
        self._context.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is not None:
            self._step.passes += 1
        self._leave()

    @telling()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if self._step is not None:
            self._step.refuse_lost_parts()
        private = private_optimizer(trainer)
        costs = self.accountant.next_step_costs and not self._warned
        if (
            costs
            and self.on_budget == "stop"
            and not self._budget.checked(float(private.noise_multiplier or 0.0))
        ):
            raise MisconfigurationException(
                "PrivacyCallback expects the noise of a step before its batch is read, found "
                f"`noise_multiplier` changed to {private.noise_multiplier} since; change it "
                "between steps."
            )
        if self._step is not None:
            self._step.refuse_changes(private)
        # The last moment at which every change is somebody else's: now the optimizer makes its own.
        self._check.before_step()
        if self.log_non_private:
            # The step forgets the norms.
            self._logged = logs.non_private_values(private) or self._logged
        private.statistics.keep_norms = self.log_non_private

    @telling()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        self._release(pl_module)
        self._check.after(batch, batch_idx, self._size)
        step = self._drawn_step
        accumulated = step.parts == trainer.accumulate_grad_batches
        # The last step of an epoch of the user's own batches may have fewer of them.
        if not accumulated and not trainer.is_last_batch:
            return
        step.refuse_other_than_one(private_optimizer(trainer))
        if step.costs:
            self._budget.spend()
        # Lightning counts this step after the hook.
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        if self.every_n_steps is not None and steps % self.every_n_steps == 0:
            self._spent = self.accountant.epsilon(self.delta)
        if not trainer.barebones:
            # For the progress bar: by `log`, loggers would get it once more at every later logging
            # step.
            pl_module.log("epsilon", self._spent, prog_bar=True, logger=False)
            every_n_steps = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if steps % every_n_steps == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
                values = {**logs.private_values(private_optimizer(trainer)), **self._logged}
                if self.every_n_steps is not None:
                    values["privacy/epsilon"] = self._spent
                logs.write(trainer, values, steps - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # There are none yet in the sanity check, before training begins.
        if self._checks is not None:
            self._checks.between()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A -1 of a later hook leaves out `on_train_batch_end`, but not the end of the epoch.
        if self._in_batch:
            raise MisconfigurationException(
                "PrivacyCallback expects every drawn batch to be trained on, found one that "
                "`on_train_batch_start` left out by returning -1: that may depend on the data, "
                "which is not private. For shorter epochs use `limit_train_batches`."
            )
        self._check.after_epoch()
        self._forget_parts()
        self._spent = self.accountant.epsilon(self.delta)
        # For callbacks that watch it.
        trainer.callback_metrics["privacy/epsilon"] = torch.tensor(self._spent)
        if not trainer.barebones:
            pl_module.log("epsilon", self._spent, prog_bar=True, logger=False)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            logs.write(trainer, {"privacy/epsilon": self._spent}, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check.finish()
        rank_zero_info(f"PrivacyCallback: {self._guarantee}.")

    # --- afterwards -------------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Lightning calls no `teardown` after an error.
        self._release(pl_module)
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        checks = self._checks
        self._release(pl_module)
        self._restore(trainer)
        if checks is not None:
            checks.after_end()  # which may raise: everything has been put back before

    def _release(self, pl_module: LightningModule) -> None:
        restore_training_step(pl_module)
        self._batch, self._contents = Batch(), None
        self._leave()

    def _leave(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)

    def _restore(self, trainer: Trainer) -> None:
        """Give the Trainer back its own source of batches."""
        if self._checks is not None:
            self._checks.close()
            self._checks = None
        if self._plan is not None:
            self._plan.restore()
        if self._source is not None and trainer.fit_loop._data_source is self._source:
            trainer.fit_loop._data_source = self._source.source
            # Else a later `fit`, even without this callback, would go on with the private loader.
            trainer.fit_loop._combined_loader = None
        self._source = None
        if self._replaced is not None:
            trainer._accelerator_connector.use_distributed_sampler = self._replaced
            self._replaced = None

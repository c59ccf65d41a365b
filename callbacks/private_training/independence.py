"""Whether a sample's gradient depends on the other samples of its batch.

Then clipping it protects nobody.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_curv.callbacks.import_names import MisconfigurationException, from_lightning
from lightning_curv.callbacks.private_training.equal_randomness import EqualRandomness, seeded
from lightning_curv.callbacks.private_training.undisturbed import Kept, equal, undisturbed
from lightning_curv.callbacks.recorded_step import eager
from lightning_curv.callbacks.user_batch import describe_batch
from lightning_curv.engine.backprop import Backprop
from lightning_curv.extensions import GraphExtension
from lightning_curv.optimizers.privacy.clipping import Clipping
from lightning_curv.passes.passes import Column, Passes
from lightning_curv.precision import wide
from lightning_curv.recording.record import record
from lightning_curv.recording.records import edge_of
from lightning_curv.samples.batch import Batch
from lightning_curv.terms.jacobian import Jacobian

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule


class _Gradients(GraphExtension):
    """Norms of the per-sample gradients, and weighted sums of them.

    They come from a pass that touches no gradient and no hook.
    """

    savefield = "_independence"
    needs_likelihood = False

    def __init__(self, weights: Sequence[Tensor], scale: float) -> None:
        self._weights, self._scale = weights, scale
        self.found: Gradients | None = None

    @torch.no_grad()
    def compute(self, passes: Passes) -> dict[Tensor, Any]:
        jacobians = passes.jacobian(Column([edge_of(passes.loss)], [passes.seed]))
        squares = [jacobian.squared_norms()[0] for jacobian in jacobians.values()]
        norms = torch.stack([wide(s) for s in squares]).sum(0).sqrt() * self._scale
        # Clipping discards the others; here they would make every sum NaN.
        finite = norms.isfinite()
        kept = finite.nonzero().flatten().tolist()
        sums: list[dict[Tensor, Tensor]] = [
            {
                parameter: jacobian[kept].weighted_total(
                    _like(jacobian, weights[finite.cpu()] * self._scale)
                )
                for parameter, jacobian in jacobians.items()
                if kept
            }
            for weights in self._weights
        ]
        self.found = Gradients(norms, sums)
        return {}


def _like(jacobian: Jacobian, weights: Tensor) -> Tensor:
    return weights.to(jacobian.terms[0].g)


@dataclass(frozen=True)
class Gradients:
    """What one run of a training step says of the gradients of its samples.

    Attributes:
        norms: ‖g_i‖, `[N]`.
        sums: Σ w_i g_i by parameter over the samples whose gradient is finite, for each vector of
            weights w.
    """

    norms: Tensor
    sums: list[dict[Tensor, Tensor]]


def observe(
    pl_module: LightningModule,
    batch: Any,
    batch_idx: int,
    size: int,
    weights: Sequence[Tensor],
    randomness: EqualRandomness,
    mean: bool,
) -> Gradients | None:
    """Run a training step and look at the gradients of its samples.

    Args:
        pl_module: Its `training_step` is called.
        batch: Its first argument.
        batch_idx: Its second argument.
        size: Number of samples.
        weights: Of the samples, for each weighted sum.
        randomness: Gives all runs equal random numbers.
        mean: Whether the loss is a mean over the samples.

    Returns:
        `None` where the step gives no loss with a graph.
    """
    known: Batch = describe_batch(batch, size)
    step = pl_module.training_step
    takes = from_lightning("utilities.signature_utils", "is_param_in_hook_signature")
    arguments = (batch, batch_idx) if takes(step, "batch_idx", min_args=2) else (batch,)
    device = pl_module.device
    forward = pl_module.trainer.precision_plugin.forward_context()
    with seeded(0, device), torch.enable_grad(), forward, eager(), record(), randomness:
        output = step(*arguments)
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.grad_fn is None:
        return None
    gradients = _Gradients(weights, size if mean else 1)
    # No backward pass of the user's follows: parameters get no gradient.
    Backprop(loss, [gradients], batch_size=known).before()
    return gradients.found


def refuse_coupled_samples(
    pl_module: LightningModule,
    batch: Any,
    batch_idx: int,
    size: int,
    mean: bool,
    gradients: bool = True,
    clipping: Clipping | None = None,
) -> set[str] | None:
    """Compare the gradients of the samples in the whole batch with those in two random parts of it.

    Every sample is missing in one of the parts. Compared are the norm of every sample's gradient,
    and a weighted sum of the gradients of each part, with random weights: all entries count. Random
    numbers of a sample are equal in all runs, dropout and logging are off, and everything that a
    training step changes is put back.

    Args:
        pl_module: Its `training_step` is called three times.
        batch: A batch on the module's device.
        batch_idx: Its number.
        size: Number of its samples, at least 2.
        mean: Whether the loss is a mean over the samples.
        gradients: Whether to compare gradients; else only parameters and buffers.
        clipping: Says which differences of a gradient make none in the sum.

    Returns:
        The names of parameters and buffers that the step changes in the same way whatever the batch
        holds; `None`: the batch cannot be divided, or there is no loss.

    Raises:
        MisconfigurationException: Gradients differ, or a parameter or buffer is changed by what the
            batch holds.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(secrets.randbits(63)))
    first = _share(size)
    # In the order of the batch, which a step may rely on, for instance falling lengths.
    parts = [order[:first].sort().values, order[first:].sort().values]
    # Random: only by chance of measure zero does a difference of gradients leave the sum as it is.
    weights = torch.randn(
        size, generator=torch.Generator().manual_seed(secrets.randbits(63)), dtype=torch.float64
    )
    masked = [torch.zeros_like(weights).index_copy(0, rows, weights[rows]) for rows in parts]
    if not divides(batch, size):
        return None
    # Copies, made beforehand: a training step may write into its batch.
    copy = samples_of(batch, torch.arange(size), size)
    batches_of_parts = [samples_of(batch, rows, size) for rows in parts]
    with undisturbed(pl_module) as kept:
        randomness = EqualRandomness(size)
        whole = observe(pl_module, copy, batch_idx, size, masked, randomness, mean)
        changed = kept.changes()
        if whole is None:
            return None
        for number, (rows, part) in enumerate(zip(parts, batches_of_parts, strict=True)):
            # Each run starts from the same state: what they change is compared, too.
            kept.put_back()
            count, own = len(rows), [weights[rows]]
            found = _observe_part(
                pl_module, part, batch_idx, count, own, randomness.again(rows), mean
            )
            if found is None:
                return None
            if gradients:
                allowed = tolerance(pl_module)
                parameter = next(iter(pl_module.parameters()))
                eps = torch.finfo(torch.promote_types(parameter.dtype, torch.float32)).eps
                negligible = 0.0 if clipping is None else clipping.negligible(eps)
                compare(whole, found, rows, number, own[0], mean, allowed, negligible)
            _refuse_changed_state(changed, kept)
        return set(changed)


def _share(size: int) -> int:
    """About half of the samples, in a number that has no divisor in common with theirs.

    A loss that is divided by a count over the batch, such as that of a class, is the same in a part
    where the count happens to shrink like the number of samples. So it cannot, unless the count is
    none or all of them.
    """
    return next(share for share in range(size // 2, 0, -1) if math.gcd(share, size) == 1)


def _observe_part(pl_module: LightningModule, *arguments: Any) -> Gradients | None:
    try:
        return observe(pl_module, *arguments)
    except Exception as error:
        raise MisconfigurationException(
            "PrivacyCallback needs a `training_step` that gives every sample the same loss in any "
            "batch, found one that runs on a batch and fails on some of its samples, which depends "
            f"on the other samples: {error}"
        ) from error


def tolerance(pl_module: LightningModule) -> float:
    """How far gradients may differ by rounding, relative to their norms."""
    parameter = next(iter(pl_module.parameters()))
    if parameter.dtype == torch.float64:
        return 1e-6
    if parameter.dtype != torch.float32 or "mixed" in str(pl_module.trainer.precision):
        return 5e-2
    return 2e-3 if parameter.device.type == "cpu" else 1e-2  # TF32


def compare(
    whole: Gradients,
    part: Gradients,
    rows: Tensor,
    number: int,
    weights: Tensor,
    mean: bool,
    allowed: float,
    negligible: float = 0.0,
) -> None:
    """Raise if gradients of some samples are others in another batch.

    Args:
        whole: The whole batch.
        part: The other batch.
        rows: Its samples in the whole batch.
        number: Of the weighted sum in `whole` that has them.
        weights: Their weights in it.
        mean: Whether the loss is a mean over the samples.
        allowed: Relative difference by rounding.
        negligible: Difference of a gradient that is too small to matter: gradients may be nothing
            but what rounding left of others.

    Raises:
        MisconfigurationException: They differ.
    """
    norms = whole.norms[rows.to(whole.norms.device)]
    finite = norms.isfinite()
    # Beside the largest: a small gradient may be what rounding left of large ones.
    size = norms[finite].max() if bool(finite.any()) else norms.new_zeros(())
    differ = (norms[finite] - part.norms[finite]).abs() > (allowed * size).clamp(
        min=max(negligible, allowed * 1e-12)
    )
    expected = (weights.to(norms.device) * norms)[finite].square().sum().sqrt()
    weight = float(weights[finite.to(weights.device)].norm())
    in_sum = max(allowed * float(expected), negligible * weight, allowed * 1e-12)
    distance = _distance(whole.sums[number], part.sums[0])
    same_kind = torch.equal(finite, part.norms.isfinite())
    if same_kind and not bool(differ.any()) and distance <= in_sum:
        return
    raise MisconfigurationException(
        f"PrivacyCallback needs a loss that is the {'mean' if mean else 'sum'} of one loss per "
        "sample, found that a sample's gradient depends on the other samples of its batch (norms "
        f"{_some(norms)} in one batch, {_some(part.norms)} in another; the gradients differ by "
        f"{distance:.2g} of {float(expected):.2g}). Class weights, `ignore_index` and ragged "
        "sequences make a mean over something else than samples: compute one loss per sample and "
        "return its `.mean()`; for a sum set `loss_reduction='sum'` in the optimizer. Contrastive "
        "losses and batch statistics cannot be private."
    )


def _distance(a: dict[Tensor, Tensor], b: dict[Tensor, Tensor]) -> float:
    squares = 0.0
    for parameter in {**a, **b}:
        first, second = a.get(parameter), b.get(parameter)
        difference = (
            first - second
            if first is not None and second is not None
            else first
            if second is None
            else second
        )
        assert difference is not None
        squares += float(wide(difference).square().sum())
    return squares**0.5


def _refuse_changed_state(changed: dict[str, Tensor], kept: Kept) -> None:
    """Raise if a run on other samples leaves something else in a parameter or buffer.

    Raises:
        MisconfigurationException: It does.
    """
    other = kept.changes()
    for name in {**changed, **other}:
        if name not in other or name not in changed or not equal(changed[name], other[name]):
            raise MisconfigurationException(
                "PrivacyCallback needs a model that learns from the samples by its private "
                f"optimizer alone, found that `training_step` changes `{name}` by what the batch "
                "holds, without noise: running statistics, moving averages of features, queues of "
                "samples, or another optimizer. Fix it (`.eval()`, `track_running_stats=False`), "
                "or leave it out."
            )


def divides(batch: Any, size: int) -> bool:
    """Whether a batch can be divided into samples; warns if not."""
    try:
        samples_of(batch, torch.arange(size), size)
    except _Unsplit:
        warnings.warn(
            "PrivacyCallback cannot check that samples do not influence each other: no tensor of "
            f"the batch has {size} entries along its first axis.",
            stacklevel=2,
        )
        return False
    return True


class _Unsplit(Exception):
    pass


def samples_of(batch: Any, rows: Tensor, size: int) -> Any:
    """Some samples of a batch."""
    found, chosen = False, rows.tolist()

    def cut(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor):
            if value.ndim and len(value) == size:
                found = True
                return value[rows.to(value.device)]
            return value
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(cut(entry) for entry in value))
        if isinstance(value, (list, tuple)):
            whole = len(value) == size and not any(isinstance(v, Tensor) and v.ndim for v in value)
            return (
                type(value)(value[i] for i in chosen)
                if whole
                else type(value)(cut(entry) for entry in value)
            )
        return value

    result = cut(batch)
    if not found:
        raise _Unsplit
    return result


def _some(norms: Tensor) -> str:
    return ", ".join(f"{norm:.3g}" for norm in norms[:3].tolist())

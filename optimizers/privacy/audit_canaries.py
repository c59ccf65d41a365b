"""Canaries: samples of the worst kind, put into a private run to see whether they are noticed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_curv.distributed.shards import is_sharded
from lightning_curv.engine.context import curvature
from lightning_curv.errors import UnsupportedError
from lightning_curv.optimizers.privacy.audit_report import PrivacyAudit
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer
from lightning_curv.optimizers.settings import require_count, require_positive
from lightning_curv.samples.batch import Batch

_SMALLEST_NOISE = 1e-2  # of the claim that scores are made for; any score is valid


class GradientCanaries:
    r"""Gradient canaries of an audit with one training run.

    Each canary is a sample whose gradient is a direction of its own, one entry in every large
    parameter, and longer than C. A fair coin says whether it is in the training data. Canaries that
    take part in a step go through the private step as all samples do: a backward pass, the norms,
    the clipping, the sum, the noise, the account. What the step releases, minus what the other
    samples contributed (the adversary of differential privacy knows them), is
    $z = 1 + \sigma\,\mathcal N(0, 1)$ along a canary that took part, in units of C, and
    $\sigma\,\mathcal N(0, 1)$ along any other. Its score is the sum over the steps of

    $$\log\Big(1 - q + q \exp\frac{2z - 1}{2\sigma^2}\Big),$$

    with q and σ as they were accounted: the log-odds, if the claim is true. Steinke, Nasr &
    Jagielski, *Privacy Auditing with One (1) Training Run*, NeurIPS 2023, algorithm 1 and section
    6.1.

    In Lightning `privacy_audit` does all of it. In a loop of your own, sample among N + `count`,
    the last `count` of which are the canaries, and call `backward` before every
    `DPOptimizer.step`. The trained weights have seen the canaries: they are for the audit only.

    Args:
        optimizer: Of the run, with an `accountant`.
        count: m, number of canaries. At least one parameter with two or more axes needs that many
            entries.
        norm: Norm of their gradients in units of C; above 1, so that clipping is audited too.
        seed: Of the coins and directions; default: from the operating system's entropy.

    Cost: per step a backward pass through one small linear op per parameter, and reading `count`
        entries of each.

    Raises:
        ValueError: An argument is out of range, no parameter is large enough, or there is no
            accountant.
        UnsupportedError: Parameters are sharded.
        RuntimeError: In the optimizer's `step`: `backward` was not called before.

    Example:
        >>> from lightning_curv.optimizers import DPSGD, PoissonSampling, PrivacyAccountant
        >>> layer = torch.nn.Linear(20, 50)
        >>> optimizer = DPSGD(
        ...     layer.parameters(), noise_multiplier=2.0, expected_batch_size=1.0,
        ...     accountant=PrivacyAccountant(PoissonSampling(1.0)),
        ... )
        >>> canaries = GradientCanaries(optimizer, count=1000)
        >>> canaries.backward(range(1000))
        >>> optimizer.step()
        >>> canaries.audit(delta=1e-5).refuted
        False
    """

    def __init__(
        self, optimizer: DPOptimizer, count: int = 1000, norm: float = 10.0, seed: int | None = None
    ) -> None:
        require_count("count", count)
        require_positive("norm", norm)
        if optimizer.accountant is None:
            raise ValueError(
                "An audit compares with the ε of an accountant, found an optimizer without one; "
                "pass `accountant=PrivacyAccountant(...)` to it."
            )
        if any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
            raise UnsupportedError(
                "An audit needs whole parameters in every process, found sharded ones "
                "(`fully_shard`). Audit a run of one process, whose steps are the same."
            )
        self.optimizer, self.count, self.norm = optimizer, count, norm
        generator = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
        self.members: np.ndarray = generator.random(count) < 0.5
        self.scores = np.zeros(count)
        self._entries = _entries(optimizer, count, generator)
        # What all other samples contribute to the running step, along the canaries.
        self._others: list[Tensor] | None = None
        self._clip_norm = optimizer.clip_norm
        self._hook = optimizer.optimizer.register_step_pre_hook(self._released)

    def backward(self, drawn: Sequence[int] | np.ndarray = ()) -> None:
        """Add the canaries of a step to its sum; after the passes of all other samples.

        Args:
            drawn: Canaries that the sampler drew, numbers below `count`; those whose coin left them
                out are ignored.
        """
        self._clip_norm = self.optimizer.clip_norm
        extensions = self.optimizer.extensions
        (clipped_sum,) = extensions
        totals = dict(zip(clipped_sum.parameters, clipped_sum.totals(), strict=True))
        self._others = self._along(totals)
        chosen = [int(i) for i in drawn if self.members[i]]
        if not chosen:
            self.optimizer.add_empty_pass()
            return
        inputs = {
            parameter: self._one_hot(parameter, entries[chosen])
            for parameter, entries in self._entries.items()
        }
        batch = Batch(len(chosen), tensors=[tensor for pair in inputs.values() for tensor in pair])
        with torch.enable_grad(), curvature(*extensions, batch_size=batch):
            products = [(_apply(parameter, x) * g).sum(1) for parameter, (x, g) in inputs.items()]
            losses = torch.stack(products).sum(0)
            reduced = losses.mean() if self.optimizer.loss_reduction == "mean" else losses.sum()
            (reduced * self.optimizer.loss_scale).backward()

    def _one_hot(self, parameter: Tensor, entries: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and cotangents of a linear op whose gradients have one entry each.

        Args:
            parameter: Whose gradients these are.
            entries: The entry of each of n canaries, a number in the flat parameter.

        Returns:
            Inputs, `[n, *]`, and cotangents, `[n, outputs]`.
        """
        count, inputs_per_row = len(entries), parameter[0].numel()
        rows, columns = np.divmod(entries, inputs_per_row)
        samples = np.arange(count)
        x = torch.zeros(count, inputs_per_row, dtype=parameter.dtype, device=parameter.device)
        g = torch.zeros(count, len(parameter), dtype=parameter.dtype, device=parameter.device)
        x[samples, columns] = 1.0
        # One entry in each parameter: together they have the norm that is asked for.
        g[samples, rows] = self.norm * self._clip_norm / math.sqrt(len(self._entries))
        return x.reshape(count, *parameter.shape[1:]), g

    def _along(self, values: dict[Tensor, Tensor]) -> list[Tensor]:
        """The entries of the canaries, `[m]` for every parameter."""
        along = []
        for parameter, entries in self._entries.items():
            flat = values[parameter].detach().flatten()
            indices = torch.from_numpy(entries).to(parameter.device)
            along.append(flat[indices].cpu().double())
        return along

    def _released(self, *_: Any) -> None:
        """Score the canaries: the step's gradient is private now, and about to be used."""
        if self._others is None:
            raise RuntimeError(
                "Expected `canaries.backward(drawn)` before every step of the optimizer, found a "
                "step without; call it with an empty list where no canary was drawn."
            )
        gradients = {
            parameter: parameter.grad for parameter in self._entries if parameter.grad is not None
        }
        size = float(self.optimizer.expected_batch_size or 1.0)
        # The released sum minus what the other samples contributed: the canary's own, and noise.
        released = self._along(gradients)
        alone = [g * size - other for g, other in zip(released, self._others, strict=True)]
        z = torch.stack(alone).sum(0).numpy() / (math.sqrt(len(alone)) * self._clip_norm)
        self.scores += _log_odds(z, *self._claim())
        self._others = None

    def _claim(self) -> tuple[float, float]:
        """Rate q and noise σ of the last release, as they were accounted."""
        assert self.optimizer.accountant is not None
        sampling, sigma, _ = self.optimizer.accountant.history[-1]
        return getattr(sampling, "sampling_rate", 1.0), max(sigma, _SMALLEST_NOISE)

    def audit(
        self, delta: float, confidence: float = 0.95, guesses: Sequence[int] | None = None
    ) -> PrivacyAudit:
        """Compare what the scores show with the accountant's ε.

        Args:
            delta: δ in (0, 1).
            confidence: Of all trials together.
            guesses: Numbers of guesses, each a trial, fixed before the run; see `PrivacyAudit.of`.

        Returns:
            The result.

        Raises:
            ValueError: An argument is out of range.
        """
        assert self.optimizer.accountant is not None
        epsilon = self.optimizer.accountant.epsilon(delta)
        return PrivacyAudit.of(self.scores, self.members, epsilon, delta, confidence, guesses)

    def close(self) -> None:
        """Watch steps of the optimizer no longer."""
        self._hook.remove()


def _log_odds(z: np.ndarray, rate: float, sigma: float) -> np.ndarray:
    """The logarithm of 1 - q + q exp((2z - 1) / 2σ²), without overflow."""
    gaussian = (2 * z - 1) / (2 * sigma**2)
    if rate >= 1:
        return gaussian
    return np.logaddexp(math.log1p(-rate), math.log(rate) + gaussian)


def _entries(
    optimizer: DPOptimizer, count: int, generator: np.random.Generator
) -> dict[Tensor, np.ndarray]:
    """For every parameter that is large enough an entry per canary, all different."""
    trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    large = [p for p in trainable if 2 <= p.ndim <= 5 and p.numel() >= count and not p.is_complex()]
    if not large:
        most = max((p.numel() for p in trainable if 2 <= p.ndim <= 5), default=0)
        raise ValueError(
            f"{count} canaries need a trainable parameter of two to five axes with at least as "
            f"many entries, found none with more than {most}; take fewer canaries."
        )
    return {p: generator.choice(p.numel(), count, replace=False) for p in large}


def _apply(parameter: Tensor, x: Tensor) -> Tensor:
    """The inner products of every row of a parameter with every input, `[n, rows]`."""
    if parameter.ndim == 2:
        return F.linear(x, parameter)
    # A kernel as large as its input has one position.
    convolution = (F.conv1d, F.conv2d, F.conv3d)[parameter.ndim - 3]
    return convolution(x, parameter).flatten(1)

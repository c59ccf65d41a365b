"""The sum of clipped per-sample gradients, over the backward passes of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device
from lightning_curv.distributed.shards import registered
from lightning_curv.extensions.receiver import GradientReceiver
from lightning_curv.optimizers.privacy.clipping import Clipping, joint_norms
from lightning_curv.terms import ghost_norms
from lightning_curv.terms.chunks import CHUNK_BYTES, joined
from lightning_curv.terms.jacobian import Jacobian

# How much larger the parts of a sample's gradient may be than their sum. A sum over all samples at
# once rounds the parts, before they cancel; where they cancel further, each sample's gradient is
# formed first, and rounded as a whole.
CANCELS = 32
# Size of all parameters up to which gradients are formed though Gram matrices would give the norms.
FORMED_BYTES = 2**22
# So many samples are worked on together even if their gradients are larger than `CHUNK_BYTES`: they
# share the time of the calls. Measured.
FEW, FEW_BYTES = 8, 2**24


class ClippedSum(GradientReceiver):
    r"""The sum $\sum_i c_i g_i$ of unscaled per-sample gradients, clipped one by one.

    Book-keeping: one backward pass as far as the recorded ops, squared norms from their inputs and
    cotangents, then one weighted contraction of the same. Where a norm needs the per-sample
    gradient itself, all such gradients of a few samples are formed at once, in cache, and the
    sample's factor is known while they are there: no second contraction.

    Args:
        parameters: The norm is taken over all of them together.
        clipping: The factors $c_i$.
        mean: Whether the loss is the mean over the samples of a pass, instead of their sum.

    Attributes:
        loss_scale: Factor on the loss (1 / accumulated passes in Lightning).
        passes: Backward passes since the last step.
        norms: Norms of the per-sample gradients since the last step, if `keep_norms`; not
            private.
        discarded: Samples whose gradient was not finite, since the last step; not private.
        counted: Which samples of the next backward pass count, `[N]`; the others stand in, so
            that no shape says how many were drawn. `None`: all of them.
    """

    def __init__(self, parameters: Sequence[Tensor], clipping: Clipping, mean: bool) -> None:
        self.clipping, self.mean = clipping, mean
        self._parameters: list[Tensor] = []
        self._known: set[Tensor] = set()
        self._bytes = 0
        self.parameters = parameters
        self.loss_scale = 1.0
        self.keep_norms = False
        self.counted: Tensor | None = None
        self.forget()

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable parameters; to be changed between passes only."""
        return self._parameters

    @parameters.setter
    def parameters(self, parameters: Sequence[Tensor]) -> None:
        if len(parameters) != len(self._parameters) or any(
            new is not old for new, old in zip(parameters, self._parameters, strict=True)
        ):
            self._parameters, self._known = list(parameters), set(parameters)
            self._bytes = sum(parameter.nbytes for parameter in parameters)

    def forget(self) -> None:
        """Drop everything since the last step."""
        self._sums: dict[Tensor, Tensor] = {}
        self.begin(0)
        self.passes = 0
        self.norms: list[Tensor] = []
        self.discarded = 0
        self.clipping.forget()

    def receives(self, parameter: Tensor) -> bool:
        """Whether it is one of `parameters`, or what FSDP has gathered of one."""
        return registered(parameter) in self._known

    def begin(self, samples: int) -> None:
        """A backward pass begins.

        Raises:
            ValueError: `counted` is of another number of samples.
        """
        if self.counted is not None and samples and len(self.counted) != samples:
            raise ValueError(
                f"`counted` must say of each of the {samples} samples of a backward pass whether "
                f"it counts, found {len(self.counted)} entries."
            )
        self._jacobians: list[Jacobian] = []
        self._norms: list[Tensor] = []  # of these
        # What is to be asked of them once all are known.
        self._open: list[_Open] = []
        # Those whose norms need per-sample gradients.
        self._formed: list[Jacobian] = []
        self._samples = samples

    def receive(self, jacobian: Jacobian) -> None:
        """Take a parameter's norms now, while its inputs are in the cache, and hold its terms."""
        # Held until the pass ends, the gradients then take less memory than what they are made of.
        if jacobian.forms_norms and _is_small(jacobian):
            jacobian = jacobian.formed()
        if jacobian.forms_norms or self._forms(jacobian):
            self._formed.append(jacobian)
            return
        norms, sizes, odd = jacobian.unread_norms()
        self._jacobians.append(jacobian)
        self._norms.append(norms[0])
        # Sizes that are the norms themselves: nothing cancels.
        if sizes is not norms:
            self._open.append(_Open(jacobian, norms, sizes, odd))

    def _forms(self, jacobian: Jacobian) -> bool:
        """Whether to form gradients that have norms without, as the sum then takes no product."""
        term = jacobian.terms[0]
        # Only where a sample's gradient by all parameters stays in cache.
        if term.classes or not term.shared or self._bytes > FORMED_BYTES:
            return False
        return term.g.device.type == "cpu" and not ghost_norms.are_cheaper_with_a_sum(term)

    def _cancelling(self) -> set[Jacobian]:
        """Settle all norms; those of which a sum over all samples at once would round too much.

        Layers are asked together: the host waits for a device once, not layer by layer.
        """
        asked, self._open = self._open, []
        if not asked:
            return set()
        answers = torch.stack(on_one_device([layer.flags() for layer in asked])).tolist()
        cancelling = set()
        for layer, (cancels, odd) in zip(asked, answers, strict=True):
            if odd and layer.odd is not None:
                layer.jacobian.settle_norms(layer.norms, layer.sizes, layer.odd)
                cancels = bool(layer.cancels().any())
            if cancels:
                cancelling.add(layer.jacobian)
        return cancelling

    @torch.no_grad()
    def end(self) -> None:
        """Clip and add up the pass."""
        jacobians, formed, samples = self._jacobians, self._formed, self._samples
        norms, cancelling = self._norms, self._cancelling()
        # For one pass: rows of the next one belong to others.
        counted, self.counted = self.counted, None
        self.begin(0)
        self.passes += 1
        if not (jacobians or formed) or not samples:
            return
        # At hand: it is looked at once, and then asked for every chunk.
        counted = None if counted is None else counted.cpu()
        if counted is not None and bool(counted.all()):
            counted = None
        bytes_of_sample = sum(4 * jacobian.parameter.numel() for jacobian in formed)
        size = samples
        if formed:
            few = min(FEW, FEW_BYTES // bytes_of_sample)
            size = max(1, few, CHUNK_BYTES // bytes_of_sample)
        dtypes = {jacobian.terms[0].g.dtype for jacobian in (*jacobians, *formed)}
        smallest_normal = max(torch.finfo(dtype).tiny for dtype in dtypes)
        weights_of_chunks = []
        for start in range(0, samples, size):
            chunk = slice(start, start + size)
            rows, norms_of_rows = [], []
            for jacobian in formed:
                rows.append(row := jacobian[chunk].formed())
                norms_of_rows.append(row.norms()[0])  # while it is in the cache
            weights = self._weights(
                [*(norms_of_all[chunk] for norms_of_all in norms), *norms_of_rows],
                [registered(jacobian.parameter) for jacobian in (*jacobians, *rows)],
                smallest_normal,
                None if counted is None else counted[chunk],
            )
            if len(dtypes) == 1:  # else every sum converts its own
                weights = weights.to(next(iter(dtypes)))
            self._add_formed(rows, weights[len(jacobians) :])
            # All parameters leave out the same samples: one row at least tells which.
            weights_of_chunks.append(weights[: max(1, len(jacobians))])
        # Their terms are not needed again, and the loop below wants the memory.
        formed.clear()
        weights_of_all = joined(weights_of_chunks)
        kept = _numbers_of_kept(weights_of_all[0])
        if kept is not None:
            taking_part = samples if counted is None else int(counted.sum())
            self.discarded += taking_part - len(kept)
            weights_of_all = weights_of_all[:, kept]
        # One after the other, so that memory falls.
        for weights in reversed(weights_of_all.unbind() if jacobians else ()):
            jacobian = jacobians.pop()
            some = _chosen(jacobian, kept)
            if jacobian not in cancelling:
                self._add(some, weights)
                continue
            size = max(1, CHUNK_BYTES // (4 * jacobian.parameter.numel()))
            for start in range(0, len(weights), size):
                chunk = slice(start, start + size)
                self._add(some[chunk].formed(), weights[chunk])

    def _weights(
        self,
        norms: list[Tensor],
        owners: list[Tensor],
        smallest_normal: float,
        counted: Tensor | None,
    ) -> Tensor:
        """Factors of the gradients of some samples, one row per parameter.

        A sample's factor is NaN where it does not count. That is where it only stands in
        (`counted`), and where its gradient is not finite, or so large that the factor is no normal
        number.
        """
        # Parameters may be on several devices; the norm of a sample is over all of them.
        stacked = torch.stack(on_one_device(norms))
        if counted is not None:
            # What stands in is in nobody's statistics: rules count, and norms are kept.
            numbers = counted.nonzero().flatten().to(stacked.device)
            weights = stacked.new_full(stacked.shape, math.nan)
            weights[:, numbers] = self._weights(
                list(stacked[:, numbers]), owners, smallest_normal, None
            )
            return weights
        factors = self.clipping.factors_of(stacked, owners, self._parameters)
        if self.keep_norms:
            self.norms.append(joint_norms(stacked))
        if _all_usable(stacked, factors, smallest_normal):
            return factors.expand(len(norms), -1)
        joint = joint_norms(stacked)
        # Subnormal factors have fewer digits: the product could be longer than C.
        normal = (factors >= smallest_normal) & (factors < math.inf)
        # In all parameters or in none: what was clipped is the whole gradient of a sample.
        usable = (joint < math.inf) & normal.all(0)
        return factors.where(usable, math.nan).expand(len(norms), -1)

    def _add_formed(self, rows: list[Jacobian], weights: Tensor) -> None:
        """Add per-sample gradients that were formed, of the samples whose weight is a number."""
        if not rows:
            return
        if weights.device.type == "cpu":
            kept = _numbers_of_kept(weights[0])
            if kept is not None:
                weights = weights[:, kept]
            for row, weight in zip(rows, weights.unbind(), strict=True):
                self._add(_chosen(row, kept), weight)
            return
        # The host does not wait to learn how many there are: the others become zeros.
        kept = weights[0].isfinite()
        for row, weight in zip(rows, weights.where(kept, 0.0).unbind(), strict=True):
            self._add(_zero_elsewhere(row, kept), weight)

    def _add(self, jacobian: Jacobian, weights: Tensor) -> None:
        """Add samples, each times its weight."""
        if not jacobian.samples:
            return
        total = jacobian.weighted_total(weights.to(jacobian.terms[0].g.device))
        parameter = registered(jacobian.parameter)
        if parameter in self._sums:
            self._sums[parameter] += total
        else:
            self._sums[parameter] = total

    def totals(self) -> list[Tensor]:
        """The sum of every parameter, in float32 or better; zero where there was no gradient.

        Of a parameter of which processes have parts each: all of it, over this process' samples.
        """
        return [
            self._sums[p].contiguous() if p in self._sums else _zeros(p) for p in self._parameters
        ]


@dataclass
class _Open:
    """A layer whose norms are not settled yet; see `Jacobian.unread_norms`."""

    jacobian: Jacobian
    norms: Tensor
    sizes: Tensor
    odd: Tensor | None

    def cancels(self) -> Tensor:
        """For which norms what they measure cancels too much for a sum over all samples."""
        return self.sizes > CANCELS * self.norms

    def flags(self) -> Tensor:
        """Whether it does for any, and whether any are to be looked at again, `[2]`."""
        cancels = self.cancels().any()
        odd = torch.zeros_like(cancels) if self.odd is None else self.odd.any()
        return torch.stack([cancels, odd])


def _all_usable(norms: Tensor, factors: Tensor, smallest_normal: float) -> bool:
    """Whether every sample counts, which the extremes tell, where nobody waits for them.

    Args:
        norms: `[P, N]`.
        factors: `[P, N]` or `[1, N]`.
        smallest_normal: The least factor that counts.
    """
    if norms.device.type != "cpu" or not factors.numel():
        return False
    # Of P such squares the sum is finite.
    most = torch.finfo(norms.dtype).max ** 0.5 / len(norms)
    lowest, highest = factors.aminmax()
    # NaN is an extreme where there is one, and no comparison with it holds.
    return (
        float(norms.amax()) < most
        and float(lowest) >= smallest_normal
        and float(highest) < math.inf
    )


def _numbers_of_kept(weights: Tensor) -> Tensor | None:
    """The samples whose weight is a number; `None`: all of them.

    A weight of zero would not do for the others: 0 · NaN is NaN.
    """
    kept = weights.isfinite().nonzero().flatten()
    return None if kept.numel() == weights.numel() else kept


def _chosen(jacobian: Jacobian, samples: Tensor | None) -> Jacobian:
    """The Jacobian of some samples; `None`: of all."""
    return jacobian if samples is None else jacobian[samples.to(jacobian.terms[0].g.device)]


def _zero_elsewhere(jacobian: Jacobian, kept: Tensor) -> Jacobian:
    """A Jacobian that was formed, with zeros for samples that are not kept, `[N]`."""
    (term,) = jacobian.terms
    others = ~kept.to(term.g.device).view(-1, *[1] * (term.g.ndim - 2))
    return Jacobian(jacobian.parameter, [term.of(term.g.masked_fill(others, 0), None)])


def _is_small(jacobian: Jacobian) -> bool:
    """Whether a per-sample gradient takes much less memory than what it is made of."""
    cotangents_of_sample = max(term.g[0, 0].numel() for term in jacobian.terms)
    return 4 * jacobian.parameter.numel() <= cotangents_of_sample


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)

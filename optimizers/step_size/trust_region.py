r"""How far a step may go before it is known where it leads, and whether the last one failed.

The quadratic model is that of one layer at a time: where two layers move by more than their own
length it says nothing of what their product does. Of a loss without a lower bound it says nothing
of how much there is to gain. Both are bounded here by one radius, which shrinks when a step fails
and grows while it is what holds steps back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Failures are losses above the running mean by so many mean deviations, and above twice the mean.
DEVIATIONS = 6.0
DECAY = 0.9  # of these running means
# The radius: after a failed step, of what that one has used; after one that kept its promise.
SHRINK = 0.25
GROWTH = 2.0
KEPT = 0.25  # of what a step promised, for the radius to grow
LARGEST = 2.0
LARGEST_OF_DENSITIES = 16.0  # of losses without a lower bound, in multiples of their reach
# The multiple of a step: in batches of fewer samples it starts below 1, with their root. It falls
# in every step in which the loss is not below its slow running mean, and rises in all others.
SAMPLES = 64
SLOW_DECAY = 0.98
SETTLED = 10.0  # weight of the slow mean from which on it is compared with
SHORTER = 0.97
LONGER = 1.01
LEAST = 1e-3


class TrustRegion:
    r"""A radius $\rho$, in units of the lengths of layers and of what the loss is worth.

    Args:
        enabled: Whether anything is bounded but what a step promises.

    Attributes:
        memory: Plain numbers that checkpoints save.

    >>> region = TrustRegion()
    >>> region.accept(2.0)
    >>> region.took(layers=0.5, promised=0.3, share=0.1)
    >>> region.suspects(2.5), region.suspects(1e6), region.suspects(float("nan"))
    (False, True, True)
    >>> region.reject()
    >>> region.radius
    0.125
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.memory: dict[str, Any] = {
            "radius": 1.0,
            "used": 0.0,
            "promised": 0.0,
            "loss": 0.0,
            "level": 0.0,
            "spread": 0.0,
            "weight": 0.0,
            "slow": 0.0,
            "slow_weight": 0.0,
            "multiple": 1.0,
            "pending": 0.0,
            "undefined": 0.0,  # whether gradients of the last batch were inf or NaN
        }

    @property
    def radius(self) -> float:
        r"""The radius $\rho$."""
        return self.memory["radius"]

    def max_decrease(self, bound: float, worth: float) -> float:
        """How much a step may promise.

        Args:
            bound: What the loss can fall by, inf if it is not known.
            worth: The size of a loss whose bound is not known.
        """
        if math.isfinite(bound):
            return bound * min(1.0, self.radius)
        return worth * self.radius if worth else math.inf

    def shrink(self, changes: list[float]) -> float:
        """The factor of a step in which layers move by multiples of their own length.

        The one that moves farthest may do as it wants: it alone is what the model knows. Where all
        others move by a small part of their length each, so does what they compute together.
        """
        multiple = self.memory["multiple"]
        # The last one of the sorted is the one that moves farthest.
        others = sum(sorted(changes)[:-1])
        if not self.enabled or not others > 0:
            return multiple
        return min(multiple, self.radius / others)

    def shrink_on_device(self, changes: Tensor, radius: float | Tensor) -> Tensor:
        """The same, [], of changes [W] and a radius that the host does not know yet."""
        multiple = torch.full_like(changes[0], self.memory["multiple"])
        if not self.enabled:
            return multiple
        others = changes.sum() - changes.max()
        # NaN of what is not finite; where all others stand still the quotient is inf.
        own = radius.to(changes) if isinstance(radius, Tensor) else radius
        return torch.minimum(multiple, own / others)

    def took(self, layers: float, promised: float, share: float) -> None:
        """Remember a step that can be taken back.

        Args:
            layers: By how much of their own length layers have moved, all but one.
            promised: Decrease of the loss.
            share: Of what a step may promise.
        """
        self.memory.update(used=max(layers, share * self.radius), promised=promised, pending=1.0)

    def suspects(self, loss: float) -> bool:
        """Whether a loss is far above what batches vary by, after a step that can be taken back."""
        highest = self.highest
        # Written so that NaN is suspected.
        return highest is not None and not loss <= highest

    @property
    def highest(self) -> float | None:
        """The highest loss that is not suspected; None if none is."""
        memory = self.memory
        if not self.enabled or not memory["pending"] or not memory["weight"]:
            return None
        # The level itself, too: where all batches have had nearly the same loss, the spread says
        # nothing of the next one.
        return memory["level"] + max(DEVIATIONS * memory["spread"], abs(memory["level"]))

    def accept(self, loss: float, bounded: bool = True, samples: float = 0.0) -> None:
        """Take a loss into the running means.

        The radius grows if it held the last step back, and the step kept what it promised; without
        a lower bound of the loss it shrinks if the loss did not fall.

        Args:
            loss: Of a batch.
            bounded: Whether it has a lower bound that is known.
            samples: Of the batch; 0 if steps are not to become shorter where the loss stalls.
        """
        memory = self.memory
        if not self.enabled or not math.isfinite(loss):
            return
        if memory["pending"] and memory["used"] > 0.5 * self.radius:
            change = loss - memory["loss"]
            if change < -KEPT * memory["promised"]:
                largest = max(LARGEST if bounded else LARGEST_OF_DENSITIES, self.radius)
                memory["radius"] = min(GROWTH * self.radius, largest)
            elif change > 0 and not bounded:
                memory["radius"] /= GROWTH
        if samples and not memory["weight"]:
            memory["multiple"] = min(1.0, math.sqrt(samples / SAMPLES))
        memory["loss"] = loss
        memory["weight"] = DECAY * memory["weight"] + 1
        share = 1 / memory["weight"]
        deviation = abs(loss - memory["level"])
        if memory["weight"] > 1:
            memory["spread"] += share * (deviation - memory["spread"])
        memory["level"] += share * (loss - memory["level"])
        if samples:
            self._anneal(loss)

    def radius_on_device(self, loss: Tensor, bounded: Tensor) -> Tensor:
        """The radius, [], after `accept` of a loss [] that the host does not know yet.

        Args:
            loss: Of a batch.
            bounded: Whether it has a lower bound that is known, [].
        """
        memory = self.memory
        radius = torch.full_like(loss, self.radius)
        if not self.enabled or not memory["pending"] or not memory["used"] > 0.5 * self.radius:
            return radius
        change = loss - memory["loss"]
        largest = torch.where(bounded, LARGEST, LARGEST_OF_DENSITIES)
        grown = torch.minimum(GROWTH * radius, torch.maximum(largest, radius))
        shorter = torch.where((change > 0) & ~bounded, radius / GROWTH, radius)
        return torch.where(change < -KEPT * memory["promised"], grown, shorter)

    def reject(self) -> None:
        """Shrink below what the failed step has used."""
        memory = self.memory
        # Of what was used, not of the radius: a radius far above it would change nothing.
        memory["radius"] = SHRINK * min(self.radius, memory["used"] or self.radius)
        memory["pending"] = 0.0

    def _anneal(self, loss: float) -> None:
        """Shorten steps while the loss does not fall, lengthen them while it does."""
        memory = self.memory
        memory["slow_weight"] = SLOW_DECAY * memory["slow_weight"] + 1
        memory["slow"] += (loss - memory["slow"]) / memory["slow_weight"]
        # In the first steps the two means are the same few losses.
        if memory["slow_weight"] < SETTLED:
            return
        stalls = memory["level"] >= memory["slow"]
        factor = SHORTER if stalls else LONGER
        memory["multiple"] = min(max(factor * memory["multiple"], LEAST), 1.0)

"""What a row of the zoo is: a tiny network with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Any]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of transformers returns where it is given labels."""
    return model(**batch).loss


def rows(batch: Batch, n: int) -> Batch:
    """Sample ``n`` of a batch of tensors whose first axis holds the samples."""
    return {
        key: value[n : n + 1] if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def twice(batch: Batch, n: int) -> Batch:
    """Sample ``n`` two times: the same mean loss, for networks whose gradients torch gets wrong on a single sample."""
    return {
        key: value[[n, n]] if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def copied(batch: Batch) -> Batch:
    """Another batch like this one, for models that change theirs."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()
    }


@dataclass
class Problem:
    """A network, a batch and a loss, from which plain autograd finds everything.

    Attributes:
        model: in evaluation mode and in float64, or float32 where its kernels know no float64.
        batch: arguments of the network, labels included.
        samples: how many are in the batch.
        loss: of the model on a batch.
        alone: sample ``n`` as a batch of its own.
        counts: what samples may weigh in the loss; those that agree with the loss' value are found
            by trial. Samples that weigh the same and samples that are added up need not be named.
    """

    model: nn.Module
    batch: Batch
    samples: int
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss
    alone: Callable[[Batch, int], Batch] = rows
    counts: list[list[int]] = field(default_factory=list)

    def __call__(self) -> Tensor:
        """The loss of the whole batch; what is random is the same every time."""
        torch.manual_seed(0)
        return self.loss(self.model, copied(self.batch))

    def sample(self, n: int) -> Tensor:
        """The loss of a batch of sample ``n`` only."""
        torch.manual_seed(0)
        return self.loss(self.model, copied(self.alone(self.batch, n)))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Network:
    """A row of the zoo.

    Attributes:
        name: how the command line and the results call it.
        suite: ``transformers``, ``peft``, ``vision`` or ``graphs``.
        make: makes the problem for a number of samples.
        package: what must be installed.
        coupled: whether the samples influence each other by design, so that per-sample quantities
            are to be refused.
        penalty: whether the loss has a term that belongs to no sample, so that per-sample
            quantities are to be refused.
        samples: numbers of samples to run with; the first is the usual one.
    """

    name: str
    suite: str
    make: Callable[[int], Problem]
    package: str = "torch"
    coupled: bool = False
    penalty: bool = False
    samples: tuple[int, ...] = (3,)


def settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in evaluation mode, with parameters that are neither zero nor equal to one another."""
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.clamp_(-10, 10).nan_to_num_()  # some models leave memory as they find it
                inputs = max(1, parameter[:1].numel()) if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += min(0.2, inputs**-0.5) * noise
    return model


def randn(*shape: int) -> Tensor:
    """Standard normal numbers, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def integers(low: int, high: int, *shape: int) -> Tensor:
    """Integers from ``low`` to ``high - 1``, the same for the same arguments."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(2))

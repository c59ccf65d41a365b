"""Weight and bias as one matrix that acts on inputs with a 1 appended."""

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(grads: Sequence[Tensor]) -> Tensor:
    """A parameter as it is; weight [o, *i] and bias [o] as [o, prod(i) + 1]."""
    weight, *bias = grads
    return torch.cat([weight.flatten(1), bias[0].to(weight.dtype).unsqueeze(1)], dim=1) if bias else weight


def separated(matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `joined`, in the shapes of `like`."""
    weight, *bias = like
    return [matrix[:, :-1].reshape(weight.shape), matrix[:, -1]] if bias else [matrix]

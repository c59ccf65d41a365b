"""Per-sample gradients of normalization layers alone, which are few and cost next to nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import Parameter

from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions import BatchL2Grad

NORM_LAYERS = "norm_layer_l2"  # the savefield
# LayerNorm, LayerNorm2d, GroupNorm32, LlamaRMSNorm; neither WeightNorm nor PreNormBlock
_NAME = re.compile(r"(?<!weight)(?<!spectral)norm\d*d?$", re.IGNORECASE)


def norm_parameters(module: nn.Module) -> dict[str, Parameter]:
    """Trainable parameters that modules named after a normalization hold themselves, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: param
        for prefix, layer in module.named_modules()
        if _NAME.search(type(layer).__name__)
        for name, param in layer.named_parameters(recurse=False)
        if param.requires_grad
    }


def no_norm_layers() -> UnsupportedError:
    """Why there is no noise scale of theirs."""
    return UnsupportedError(
        "`noise_scale_norm_layers` needs normalization layers with trainable parameters, found "
        "none. `noise_scale` looks at all layers."
    )


class NormLayerL2(BatchL2Grad):
    """Squared norms of the per-sample gradients of some parameters.

    Ops of others are not listened to.

    Args:
        parameters: which.
    """

    savefield = NORM_LAYERS

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters = frozenset(parameters)

    def wants(self, parameter: Tensor) -> bool:
        """Whether it is one of them."""
        return parameter in self._parameters

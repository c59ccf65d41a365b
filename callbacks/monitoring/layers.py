"""Which layers get series of their own."""

from __future__ import annotations

import re

from torch import nn
from torch.nn import Parameter


def parameters_by_layer(module: nn.Module) -> dict[str, list[Parameter]]:
    """The trainable parameters of every module that owns some, in the order of the model."""
    layers: dict[str, list[Parameter]] = {}
    for name, param in module.named_parameters():
        if param.requires_grad:
            # Parameters of the model itself have no dot in their names.
            layers.setdefault(name.rpartition(".")[0] or "root", []).append(param)
    return layers


def choose(module: nn.Module, layers: bool | str, most: int) -> list[str]:
    """Names of at most that many layers.

    Args:
        module: the model.
        layers: True for the first ones, "topk" for those with most parameters, or a regular
            expression that is searched in the name.
        most: the cap.
    """
    parameters = parameters_by_layer(module)
    names = list(parameters) if layers else []
    if layers == "topk":
        largest = sorted(names, key=lambda name: -sum(p.numel() for p in parameters[name]))[:most]
        # Back in the order of the model.
        names = [name for name in names if name in largest]
    elif isinstance(layers, str):
        names = [name for name in names if re.search(layers, name)]
    return names[:most]

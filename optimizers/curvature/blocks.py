"""Which weight and bias belong to one layer, read off their Jacobians."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.term import Term


def weight_bias_pairs(jacobians: dict[Tensor, Jacobian]) -> dict[Tensor, Tensor]:
    """The bias of each weight that has one: the parameter whose cotangents are the weight's own.

    Only outputs-first weights of one use count, such as those of `nn.Linear` and ungrouped
    convolutions: there weight and bias are one matrix that acts on the inputs with a 1 appended.

    Args:
        jacobians: of the parameters.

    Returns:
        The bias of each of these weights.
    """
    biases = {
        param: jacobian.terms[0] for param, jacobian in jacobians.items() if _is_bias(jacobian)
    }
    pairs: dict[Tensor, Tensor] = {}
    for weight, jacobian in jacobians.items():
        if not _is_weight(jacobian):
            continue
        term = jacobian.terms[0]
        partner = next((b for b, other in biases.items() if _same_cotangents(term, other)), None)
        if partner is not None:
            pairs[weight] = partner
            del biases[partner]  # a bias belongs to one weight
    return pairs


def _is_weight(jacobian: Jacobian) -> bool:
    """Whether it is a weight of one use with outputs in front, a matrix of one group."""
    return len(jacobian.terms) == 1 and jacobian.terms[0].is_weight


def _is_bias(jacobian: Jacobian) -> bool:
    """Whether the derivative by this parameter is the cotangents themselves."""
    return len(jacobian.terms) == 1 and jacobian.terms[0].is_bias


def _same_cotangents(weight: Term, bias: Term) -> bool:
    if (weight.out, weight.g.shape) != (bias.out, bias.g.shape):
        return False
    same_memory = weight.g.data_ptr() == bias.g.data_ptr()
    if same_memory and weight.g.stride() == bias.g.stride():
        return True
    # Copies, from a conversion out of low precision. Cotangents that are all zero say nothing.
    if weight.g.dtype != bias.g.dtype:
        return False
    return torch.equal(weight.g, bias.g) and bool(weight.g.any())

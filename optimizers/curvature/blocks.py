"""Which weight and bias belong to one layer, read off their Jacobians."""

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
    """
    biases = [
        (param, jacobian.terms[0]) for param, jacobian in jacobians.items() if _is_bias(jacobian)
    ]
    pairs: dict[Tensor, Tensor] = {}
    for weight, jacobian in jacobians.items():
        term = jacobian.terms[0]
        if (
            len(jacobian.terms) > 1
            or term.x is None
            or term.classes
            or not term.par.startswith("oi")
        ):
            continue
        found = next(
            (i for i, (_, bias) in enumerate(biases) if _same_cotangents(term, bias)), None
        )
        if found is not None:
            pairs[weight] = biases.pop(found)[0]
    return pairs


def _is_bias(jacobian: Jacobian) -> bool:
    return len(jacobian.terms) == 1 and jacobian.terms[0].x is None and jacobian.terms[0].par == "o"


def _same_cotangents(weight: Term, bias: Term) -> bool:
    if (weight.out, weight.g.shape) != (bias.out, bias.g.shape):
        return False
    if (weight.g.data_ptr(), weight.g.stride()) == (bias.g.data_ptr(), bias.g.stride()):
        return True
    # Copies, from a conversion out of low precision. Cotangents that are all zero say nothing.
    return weight.g.dtype == bias.g.dtype and torch.equal(weight.g, bias.g) and bool(weight.g.any())

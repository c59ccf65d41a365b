"""Kronecker factors by the batch-averaged recursion."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F

from lightning_curv.dependence import Dependence
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions.base import GraphExtension
from lightning_curv.extensions.kronecker import KFLR, WeightSharing
from lightning_curv.jacobian import Jacobian
from lightning_curv.passes import Passes
from lightning_curv.places import Place, place_of
from lightning_curv.residuals import probes
from lightning_curv.symmetric import eigh
from lightning_curv.terms import Term


class KFRA(GraphExtension):
    r"""Kronecker factors from a batch-averaged GGN, in ``kfra``; factors as in `KFLR`.

    The GGN with respect to a layer's output is averaged over the batch before it is propagated to the layer's input,
    :math:`\bar H_{in} = \tfrac1N \sum_n J_n^\top \bar H_{out} J_n`, and its blocks are the factors B. Exact where the
    layers' Jacobians do not depend on the sample. Needs a chain of layers and one loss. Cost: a pass through every
    elementwise layer, as many as hold its inputs and outputs, N at a time, through every linear one, and as many as it
    has inputs and outputs through others, such as max-pooling; memory: the square of the widest layer. Botev, Ritter &
    Barber, *Practical Gauss-Newton optimisation for deep learning*, ICML 2017, eq. 17.

    Args:
        weight_sharing: ``"expand"`` or ``"reduce"`` as in `KFLR`.

    Example:
        >>> import torch
        >>> from lightning_curv import KFRA, curvature
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with curvature(KFRA()):
        ...     torch.nn.functional.cross_entropy(model(torch.ones(5, 4)), torch.tensor([0, 1, 0, 1, 0])).backward()
        >>> [factor.shape for factor in model[0].weight.kfra]
        [torch.Size([3, 3]), torch.Size([4, 4])]
    """

    savefield = "kfra"
    independent = False

    def __init__(self, weight_sharing: WeightSharing = "expand") -> None:
        self._factors = KFLR(weight_sharing)

    def compute(self, passes: Passes) -> dict[Tensor, list[Tensor]]:
        """The factors of every parameter, from the last layer to the first."""
        terms: dict[Tensor, list[Term]] = {}
        for node, columns in _recursion(passes):
            for parameter, term in passes.terms(node, passes.tape.uses[node], columns):
                terms.setdefault(parameter, []).append(term)
        return {p: self._factors.evaluate(Jacobian(p, found)) for p, found in terms.items()}


def _recursion(passes: Passes) -> Iterator[tuple[Node, Tensor]]:
    """At every use a square root of its averaged GGN: columns of its output's shape, equal in all samples."""
    (loss, call), *others = passes.tape.losses.items()
    if others:
        raise UnsupportedError(f"KFRA expects one loss, found {1 + len(others)}; use `KFLR`.")
    count, edge, place = passes.samples.count, call.input, passes.samples.losses[loss]
    columns = passes.likelihood(loss).columns(count, place.minor)
    roots = torch.stack([place.split(column, count) for column in columns])  # [V, N, E]
    average = torch.einsum("vni,vnj->ij", roots, roots)
    shape, dependence = call.arguments["input"].shape, Dependence(passes.tape)
    while True:
        if edge.node in passes.tape.uses:
            yield edge.node, _columns(average, place, shape, count)
        inputs = dependence.inputs(edge.node)
        if not inputs:
            return
        if len(inputs) > 1:
            raise UnsupportedError(
                f"KFRA expects a chain of layers, found a branch at `{edge.node.name()}`: {len(inputs)} inputs "
                "depend on parameters. Use `KFLR` or `KFAC`."
            )
        probe = probes(passes, inputs)[inputs[0]]
        if probe is None:
            return
        after = place_of(*probe, count)
        average = _averaged(passes, average, (edge, place, shape), (inputs[0], after), count)
        edge, place, shape = inputs[0], after, probe[0].shape


def _averaged(
    passes: Passes,
    average: Tensor,
    output: tuple[GradientEdge, Place, torch.Size],
    source: tuple[GradientEdge, Place],
    count: int,
) -> Tensor:
    """The mean over the samples of Jᵀ H J, by two sweeps of vector-Jacobian products with the rows of H.

    Where every J is diagonal, its entries are one product; where all are the same, a pass takes a row in every sample.
    Both are found out by passes with random numbers, and true up to rounding.
    """
    (edge, place, shape), (after, after_place) = output, source

    def pull(entries: Tensor) -> Tensor:
        """``[N, E_out]`` to ``[N, E_in]``."""
        (g,) = passes.backward([edge], [after], [place.join(entries, shape)])
        return average.new_zeros(count, 0) if g is None else after_place.split(g, count)

    def pull_rows(rows: Tensor) -> Tensor:
        """``[R, E_out]`` to ``[R, E_in]``, if J is the same in all samples: N rows at a time."""
        parts = [F.pad(part, (0, 0, 0, count - len(part))) for part in rows.split(count)]
        return torch.cat([pull(part) for part in parts])[: len(rows)]

    generator = torch.Generator(average.device).manual_seed(0)
    entries = average.new_empty(count, len(average)).uniform_(1, 2, generator=generator)
    diagonal = pull(torch.ones_like(entries))
    if diagonal.shape == entries.shape and _same(pull(entries), entries * diagonal):
        return average * (diagonal.mT @ diagonal / count)
    weights, row = entries[:, :1], entries[:1].expand(count, -1)
    if _same(pull(weights * row), weights * pull(row)[:1]):
        return pull_rows(pull_rows(average).mT)
    half = torch.stack([pull(row.expand(count, -1)) for row in average], -1)  # [N, E_in, E_out]
    full = [pull(column).mean(0) for column in half.unbind(1)]
    return torch.stack(full)


def _same(one: Tensor, other: Tensor) -> bool:
    """Up to the rounding of products of matrices."""
    tolerance = 100 * torch.finfo(other.dtype).eps * other.abs().amax() if other.numel() else 0
    return bool(((one - other).abs() <= tolerance).all())


def _columns(average: Tensor, place: Place, shape: torch.Size, count: int) -> Tensor:
    values, vectors = eigh(average)
    root = (vectors * (values.clamp(min=0) / count).sqrt()).mT
    if place.minor or shape[place.axis] != count:
        return torch.stack([place.join(row.expand(count, -1), shape) for row in root])
    rest = [size for axis, size in enumerate(shape) if axis != place.axis]
    return root.reshape(-1, *rest).unsqueeze(1 + place.axis).expand(-1, *shape)  # one sample in memory

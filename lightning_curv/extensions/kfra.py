"""Kronecker factors by the batch-averaged recursion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.extensions.base import GraphExtension
from lightning_curv.extensions.kronecker import KFLR, WeightSharing, kronecker_factor
from lightning_curv.graph.dependence import Dependence
from lightning_curv.graph.heads import name_of
from lightning_curv.kernels.symmetric import eigh, gram
from lightning_curv.passes.passes import Passes
from lightning_curv.recording.records import shape_at
from lightning_curv.samples.probing import owners_at
from lightning_curv.samples.rowwise import ENTRYWISE, LEADING, VIEWS
from lightning_curv.terms.jacobian import Jacobian
from lightning_curv.terms.owners import BatchAxis, Owners, RowOwners
from lightning_curv.terms.sides import kronecker_sides, side_of
from lightning_curv.terms.term import Term

# Nodes whose J is the same in all samples of an axis.
SAME = frozenset(("Addmm", "Convolution", "Mm"))
# Nodes that treat what is on the leading axis of their input one by one, where it is as long as
# that of their output. Of a product of matrices that is the left one.
KEEP_LEADING_AXIS = SAME | ENTRYWISE | VIEWS | LEADING


class KFRA(GraphExtension):
    r"""Kronecker factors from a batch-averaged GGN, in `kfra`; factors as in `KFLR`.

    The GGN with respect to a layer's output is averaged over the batch before it is propagated to
    the layer's input, $\bar H_{in} = \tfrac1N \sum_n J_n^\top \bar H_{out} J_n$, and its
    blocks are the factors B. Exact where the layers' Jacobians do not depend on the sample. Needs a
    chain of layers and one loss. Cost: a pass through every elementwise layer (two where its name
    is not known for one), as many as hold its inputs and outputs, N at a time, through every linear
    one, and as many as it has inputs and outputs through others, such as max-pooling; memory: the
    square of the widest layer. Botev, Ritter & Barber, *Practical Gauss-Newton optimisation for
    deep learning*, ICML 2017, eq. 17.

    Args:
        weight_sharing: `"expand"` or `"reduce"` as in `KFLR`.

    Raises:
        ValueError: `weight_sharing` is neither.

    Example:
        >>> import torch
        >>> from lightning_curv import KFRA, curvature
        >>> hidden, output = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        >>> with curvature(KFRA()):
        ...     logits = output(hidden(torch.ones(5, 4)).relu())
        ...     torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1, 0])).backward()
        >>> [factor.shape for factor in hidden.weight.kfra]
        [torch.Size([3, 3]), torch.Size([4, 4])]
    """

    savefield = "kfra"
    independent = False

    def __init__(self, weight_sharing: WeightSharing = "expand") -> None:
        self._kflr = KFLR(weight_sharing)

    def compute(self, passes: Passes) -> dict[Tensor, list[Tensor]]:
        """Make the factors of every parameter, from the last layer to the first."""
        factors: dict[Tensor, list[Tensor]] = {}
        # From the output to the first layer: one averaged GGN is in memory at a time.
        for point, average in _recursion(passes):
            if point.edge.node not in passes.tape.uses:
                continue
            # The rule of the op tells how its parameters see the rows of the average.
            terms = _terms(passes, point, average)
            if all(_kronecker(p, term) for p, term in terms.items()):
                # A term has the entries in the order of its op. Once through the rule every row of
                # the averaged GGN is in that order; transposed and through it again, its columns.
                made = {}
                for parameter, term in terms.items():
                    columns = term.g[:, 0].flatten(1).mT
                    squares = _terms(passes, point, columns)
                    made[parameter] = self._factors(parameter, squares[parameter])
            else:
                # No factor of its own: the GGN of the parameter from a root of the average.
                roots = _terms(passes, point, _root(average, point.count))
                made = {}
                for parameter, term in roots.items():
                    made[parameter] = self._kflr.evaluate(Jacobian(parameter, [term]))
            used_again = made.keys() & factors.keys()
            if used_again:
                raise _used_again(used_again.pop())
            factors |= made
        return factors

    def _factors(self, parameter: Tensor, term: Term) -> list[Tensor]:
        """Make the factors from a term whose columns are the rows of the averaged GGN.

        Rows and entries are in the same order.
        """
        jacobian = Jacobian(parameter, [term])
        term = jacobian.terms[0]
        sharing = self._kflr.weight_sharing
        rows_and_columns = 2 * term.g.shape[2:]
        average = term.g[:, 0].reshape(rows_and_columns)
        outputs = side_of(term, "outputs")
        factors = []
        for side in kronecker_sides(jacobian.terms):
            if side == "outputs":
                factors.append(outputs.paired_features(average, sharing == "expand"))
            else:
                factors.append(kronecker_factor(term, side, sharing))
        return factors


@dataclass(frozen=True)
class _Point:
    """A place in the chain of layers.

    Attributes:
        edge: Where it is in the graph.
        owners: Which sample owns each row of its tensor.
        shape: The tensor's shape.
    """

    edge: GradientEdge
    owners: Owners
    shape: torch.Size

    @property
    def count(self) -> int:
        """The number of samples N."""
        return self.owners.count

    @property
    def entries(self) -> int:
        """The number of entries of a sample."""
        if self.count:
            return math.prod(self.shape) // self.count
        return math.prod(self.shape[1:])

    def spread(self, rows: Tensor) -> Tensor:
        """Make tensors `[R, *shape]` that are equal in all samples of rows `[R, E]`.

        Where the samples are an axis of their own, one of them is in memory.
        """
        owners = self.owners
        if not isinstance(owners, BatchAxis) or self.shape[owners.axis] != self.count:
            whole = [owners.join(row.expand(self.count, -1), self.shape) for row in rows]
            return torch.stack(whole)
        rest = [size for axis, size in enumerate(self.shape) if axis != owners.axis]
        one_sample = rows.reshape(len(rows), *rest)
        one_sample = one_sample.unsqueeze(1 + owners.axis)
        return one_sample.expand(-1, *self.shape)


def _recursion(passes: Passes) -> Iterator[tuple[_Point, Tensor]]:
    """The averaged GGN at every place of the chain, `[E, E]`."""
    output, *inputs = _chain(passes)
    average = _at_output(passes, output)
    yield output, average
    for point in inputs:
        average = _averaged(passes, average, output, point)
        output = point
        yield output, average


def _at_output(passes: Passes, output: _Point) -> Tensor:
    """The sum over the samples of the loss' H, `[E, E]`."""
    (part,) = passes.parts
    columns = []
    if output.count:
        columns = [column for (column,) in part.columns(complete=True)]
    if not columns:
        return passes.seed.new_zeros(output.entries, output.entries)
    # The columns of all samples beside each other, [V·N, E]: their squares add up to the sum.
    if output.owners == BatchAxis(output.count):
        roots = torch.stack(columns).view(-1, output.entries)
    else:
        roots = torch.cat([output.owners.split(column) for column in columns])
    return gram(roots.mT)


def _chain(passes: Passes) -> list[_Point]:
    """The places from the network's output to the output of the first layer."""
    # One loss of one output: the recursion starts from a single matrix.
    edges = [edge for part in passes.parts for edge in part.edges]
    if len(edges) != 1:
        raise UnsupportedError(
            f"KFRA expects one loss of one output, found losses of {len(edges)}; use `KFLR`."
        )
    (part,) = passes.parts
    dependence = Dependence(passes.tape, edges)
    while inputs := dependence.inputs(edges[-1].node):
        if len(inputs) > 1:
            raise UnsupportedError(
                f"KFRA expects a chain of layers, found a branch at `{edges[-1].node.name()}`: "
                f"{len(inputs)} inputs depend on parameters. Use `KFLR` or `KFAC`."
            )
        edges += inputs
        (below,) = inputs
        metadata = below.node._input_metadata[below.output_nr]
        if metadata.dtype.is_complex:
            raise UnsupportedError(
                f"KFRA expects real numbers, found complex ones below `{edges[-2].node.name()}`."
            )
    points = [_Point(edges[0], part.owners[0], part.likes[0].shape)]
    for edge in edges[1:]:
        if not _keeps_leading_axis(points[-1], edge):
            break
        points.append(_Point(edge, points[-1].owners, shape_at(edge)))
    # From the first node that may do anything with the samples, weights have to tell.
    for edge, owners in owners_at(passes, edges[len(points) :]).items():
        if owners is None:
            break
        points.append(_Point(edge, owners, shape_at(edge)))
    for point in points:
        if not isinstance(point.owners, RowOwners):
            continue
        lengths = point.owners.lengths
        if len({*lengths.tolist()}) > 1:
            raise UnsupportedError(
                "KFRA averages over the batch and expects equally many rows of every sample, "
                f"found a tensor of shape {tuple(point.shape)} with {_some(lengths)} "
                "of them. Use `KFLR` or `KFAC`."
            )
    return points


def _keeps_leading_axis(output: _Point, source: GradientEdge) -> bool:
    """Whether samples on the leading axis of a node's output are those of this input's."""
    node = output.edge.node
    name = name_of(node)
    if name not in KEEP_LEADING_AXIS or _axis(output.owners):
        return False
    if not isinstance(output.owners, BatchAxis) or not output.shape:
        return False
    # The input that depends on parameters: the pictures of a convolution, the left matrix.
    number = 1 if name == "Addmm" else 0
    if node.next_functions[number] != source[:2]:
        return False
    shape = shape_at(source)
    return bool(shape) and shape[0] == output.shape[0]


def _some(numbers: Tensor) -> str:
    shown = ", ".join(map(str, numbers[:4].tolist()))
    if len(numbers) <= 4:
        return shown
    return f"{shown}, ..."


def _averaged(
    passes: Passes,
    average: Tensor,
    output: _Point,
    source: _Point,
) -> Tensor:
    """The mean over the samples of Jᵀ H J, by vector-Jacobian products with the rows of H.

    Where every J is diagonal, its entries are one product; where all are the same, a pass takes a
    row in every sample. Unless the node tells, both are found out by passes with random numbers,
    and true up to rounding.
    """
    count = output.count
    if not count:
        return average.new_zeros(source.entries, source.entries)

    def pull(entries: Tensor) -> Tensor:
        """`[N, E_out]` to `[N, E_in]`."""
        seed = output.owners.join(entries, output.shape)
        (g,) = passes.backward([output.edge], [source.edge], [seed])
        if g is None:
            return average.new_zeros(count, source.entries)
        return source.owners.split(g).to(average)

    def pull_rows(rows: Tensor) -> Tensor:
        """`[R, E_out]` to `[R, E_in]`, if J is the same in all samples: N rows at a time."""
        pulled = []
        for part in rows.split(count):
            missing = count - len(part)
            pulled.append(pull(F.pad(part, (0, 0, 0, missing))))
        return torch.cat(pulled)[: len(rows)]

    name = name_of(output.edge.node)
    if name in ENTRYWISE and (output.owners, output.shape) == (source.owners, source.shape):
        return _through_diagonals(average, pull(average.new_ones(count, len(average))))
    # Of its own, so that nobody's random numbers change.
    generator = torch.Generator(average.device).manual_seed(0)
    axis = _axis(output.owners)
    same_axis = axis is not None and axis == _axis(source.owners)
    same = same_axis and name in SAME
    # As many entries below as above: J may be diagonal. Random entries come out times J 1 then.
    if source.entries == output.entries and not same:
        entries = average.new_empty(count, len(average)).uniform_(1, 2, generator=generator)
        image = pull(entries)
        diagonal = pull(torch.ones_like(entries))
        if torch.equal(image, entries):
            return average
        if _same(image, entries * diagonal, image.abs().amax()):
            return _through_diagonals(average, diagonal)
    # H J first, then Jᵀ (H J), both by the same function as H is symmetric.
    half = pull_rows(average)
    if same:
        return pull_rows(half.mT)
    # If J is the same in all samples, a mixture of the rows weighted by sample comes out weighted.
    weights = average.new_empty(count).uniform_(-1, 1, generator=generator)
    mixture = average.new_empty(len(average)).uniform_(-1, 1, generator=generator)
    image = pull(torch.outer(weights, mixture @ average))
    expected = torch.outer(weights, mixture @ half)
    magnitude = (mixture.abs() @ half.abs()).amax()
    if _same(image, expected, magnitude):
        return pull_rows(half.mT)
    # Every sample has a J of its own: as many passes as there are entries above and below.
    of_rows = [pull(row.expand(count, -1)) for row in average]
    half = torch.stack(of_rows, -1)  # [N, E_in, E_out]
    full = [pull(column).mean(0) for column in half.unbind(1)]
    return torch.stack(full)


def _through_diagonals(average: Tensor, diagonals: Tensor) -> Tensor:
    """The mean over the samples of diag(d) H diag(d), for their `diagonals [N, E]`."""
    # diag(d) H diag(d) = (d dᵀ) ⊙ H.
    return gram(diagonals.mT).mul_(average).div_(len(diagonals))


def _axis(owners: Owners) -> int | None:
    return owners.axis if isinstance(owners, BatchAxis) else None


def _same(one: Tensor, other: Tensor, scale: Tensor) -> bool:
    """Up to the rounding of sums of the magnitude `scale`."""
    rounding = 100 * torch.finfo(other.dtype).eps * scale
    within = (one - other).abs() <= rounding
    return bool(within.all())


def _terms(passes: Passes, point: _Point, rows: Tensor) -> dict[Tensor, Term]:
    """The terms of the parameters used at a point, for cotangents `[R, E]`.

    They are equal in all samples.
    """
    # What the parameters of the op at this place see of the average.
    node = point.edge.node
    use = passes.tape.uses[node]
    terms = dict[Tensor, Term]()
    for parameter, term in passes.terms(node, use, point.spread(rows)):
        if parameter in terms:
            raise _used_again(parameter)
        terms[parameter] = term
    return terms


def _used_again(parameter: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"KFRA expects every parameter to be used once, found {describe(parameter)} used again. "
        "Use `KFLR` or `KFAC`."
    )


def _kronecker(parameter: Tensor, term: Term) -> bool:
    """Whether the block has Kronecker factors, and all samples have the cotangents of one."""
    samples = term.g.shape[1]
    # A stride of zero: one sample's cotangents, seen as those of all.
    shared = samples == 1 or (samples > 1 and not term.g.stride(1))
    return shared and bool(kronecker_sides(Jacobian(parameter, [term]).terms))


def _root(average: Tensor, count: int) -> Tensor:
    """Rows whose outer products, once per sample, add up to the averaged GGN."""
    values, vectors = eigh(average)
    shares = values.clamp(min=0) / count
    return (vectors * shares.sqrt()).mT

"""The parts of a loss: known loss functions, and all else as functions of the outputs.

Above its outputs the network has no parameters: an output is where the last op with a parameter
ends, or where what depends on no sample meets the samples. A summand that is no known loss
function, or a nonlinear function of one, is taken as a function of the outputs below it; summands
with outputs in common are one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast
from weakref import ReferenceType, ref

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.graph.heads import head_at, linear_inputs
from lightning_curv.graph.joins import node_of
from lightning_curv.graph.tape import Tape
from lightning_curv.losses.autograd import Quadratic
from lightning_curv.losses.likelihoods import Likelihood
from lightning_curv.losses.parts import KnownPart, LossPart
from lightning_curv.recording.records import LossCall, Use, edge_of, shape_at
from lightning_curv.terms.owners import BatchAxis, Owners, RowOwners, owners_of

if TYPE_CHECKING:
    from lightning_curv.passes.passes import Passes

Place = tuple[Node, int]


@dataclass
class Summands:
    """What a loss is a sum of, up to kinks.

    Attributes:
        known: Calls of known loss functions.
        others: For the others the outputs of the network that they are functions of, one list for
            every function.
    """

    known: dict[Node, LossCall]
    others: list[list[Place]]


def find_summands(tape: Tape, loss: Tensor, joint: bool = False) -> Summands:
    """The summands of a loss: the graph is followed down as long as it is piecewise linear.

    Args:
        tape: What is recorded.
        loss: The root.
        joint: Whether a known loss function of several outputs is a function like any other.
    """
    outputs: _Outputs | None = None  # a loss that is a known function never asks
    known: dict[Node, LossCall] = {}
    others: list[set[Place]] = []
    below: set[Node] = set()  # some summand that is no known loss function
    seen: set[Place] = set()
    stack = [(cast("Node", loss.grad_fn), loss.output_nr)]
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        node, call = place[0], tape.losses.get(place[0])
        differentiated = joint and call is not None and call.beside
        if call is not None and not differentiated:
            known[node] = call
            if call.beside:
                stack += [
                    (after, number) for after, number in node.next_functions if after is not None
                ]
            continue
        outputs = outputs or _Outputs(tape)
        if (output := outputs.at(place)) is not None:
            others.append({output})
        elif not differentiated and (inputs := linear_inputs(node, kinks=True)):
            stack += inputs
        else:
            outputs_below, passed = outputs.below(place)
            others.append(outputs_below)
            below |= passed
    if not others:
        return Summands(known, [])
    known = {node: call for node, call in known.items() if node not in below}
    return Summands(known, [[*places] for places in _united(others) if places])


class _Outputs:
    """Where ops with parameters end."""

    def __init__(self, tape: Tape) -> None:
        self._uses = {node_of(key): use for key, use in tape.uses.items() if use.operands}
        self._strays = {edge_of(parameter).node for parameter, _ in tape.stray}

    def at(self, place: Place) -> Place | None:
        """The output of the op at a node, if it is one with parameters."""
        node, number = place
        if node in self._uses:
            return node, self._uses[node].output_nr
        unrecorded = any(after in self._strays for after, _ in node.next_functions)
        return (node, number) if unrecorded else None

    def below(self, top: Place) -> tuple[set[Place], set[Node]]:
        """The first outputs on every way down, and the nodes above them."""
        outputs = set[Place]()
        passed = set[Node]()
        seen = set[Place]()
        stack = [top]
        while stack:
            place = stack.pop()
            if place in seen:
                continue
            seen.add(place)
            if (output := self.at(place)) is not None:
                outputs.add(output)
            else:
                passed.add(place[0])
                stack += [
                    (after, number)
                    for after, number in place[0].next_functions
                    if after is not None
                ]
        return outputs, passed


def _united(sets: Iterable[set[Place]]) -> list[set[Place]]:
    """The same, those that have something in common as one."""
    groups: list[set[Place]] = []
    for places in sets:
        apart = [group for group in groups if not group & places]
        groups = [*apart, places.union(*(group for group in groups if group & places))]
    return groups


def loss_parts(passes: Passes) -> list[LossPart]:
    """The parts of the loss of some passes whose samples are known."""
    tape = passes.tape
    output = passes.output
    if output is None:
        summands = find_summands(tape, passes.loss, passes.joint)
    else:
        known = {node: call for node, call in tape.losses.items() if call is not output}
        summands = Summands(known, [[output.input[:2]]])
    parts: list[LossPart] = [
        KnownPart(
            call.input,
            call.arguments["input"],
            passes.samples.losses[node],
            call.function,
            partial(_likelihood, ref(passes), node),
        )
        for node, call in summands.known.items()
    ]
    if not summands.others:
        return parts
    owners = _owners(passes)
    others = [*summands.known, *(node for places in summands.others for node, _ in places)]
    for places in summands.others:
        edges = [GradientEdge(*place) for place in places]
        likes = [head_at(edge, passes.loss).like for edge in edges]
        own = [
            owners.get(place, BatchAxis(passes.samples.count)) for place in places
        ]  # of no use: one sample
        chosen = output is not None
        parts.append(
            Quadratic(edges, likes, own, passes.loss, passes.seed, others, passes.separate, chosen)
        )
    return parts


def bounds(parts: Iterable[LossPart]) -> list[Node]:
    """The nodes that loss functions that are differentiated do not reach below."""
    return next(([*part.others] for part in parts if isinstance(part, Quadratic)), [])


def nodes_of_loss(passes: Passes) -> set[Node]:
    """The nodes of loss functions that are differentiated."""
    if not (below := {*bounds(passes.parts)}):
        return set()
    nodes = set[Node]()
    stack = [cast("Node", passes.loss.grad_fn)]
    while stack:
        node = stack.pop()
        if node not in nodes and node not in below:
            nodes.add(node)
            stack += [after for after, _ in node.next_functions if after is not None]
    return nodes


def _likelihood(passes: ReferenceType[Passes], node: Node) -> Likelihood:
    """The likelihood of a loss call; passes keep their parts: no strong reference, or a circle."""
    alive = passes()
    assert alive is not None
    return alive.likelihood(node)


def _owners(passes: Passes) -> dict[Place, Owners]:
    """Which sample owns each row of the outputs of all uses, and of `Passes.output`."""
    samples = passes.samples
    owners = {
        (node_of(key), use.output_nr): _at_node(use, node_of(key), samples.uses[key])
        for key, use in passes.tape.uses.items()
        if key in samples.uses
    }
    if passes.output is not None:
        owners[passes.output.input[:2]] = samples.losses[cast("Node", passes.loss.grad_fn)]
    return owners


def _at_node(use: Use, node: Node, owners: Owners) -> Owners:
    """The owners of an op's output in the shape of its node: `linear` multiplies flattened rows."""
    shape = shape_at(GradientEdge(node, use.output_nr))
    leading = owners == BatchAxis(owners.count)
    if shape == use.shape or leading or not isinstance(owners, (BatchAxis, RowOwners)):
        return owners
    rows = use.shape[:-1] if shape[-1:] == use.shape[-1:] else use.shape
    owner = owners.owner(use.shape)
    if rows is not use.shape:  # the last axis belongs to the same samples throughout
        return owners_of(owner.expand(*rows, 1).reshape(*shape[:-1], 1), shape, owners.count)
    return owners_of(owner.expand(rows).reshape(shape), shape, owners.count)

"""Calls: what a call of a torch function leaves at the autograd node of its output.

This runs at every call of a forward pass and is written for that: what most calls need comes first,
and there are loops where generators would be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curv.losses import LOSSES, PARTS
from lightning_curv.recording.provenance import (
    DATA,
    Roots,
    is_parameter,
    note,
    roots_of,
    tensors_in,
    united,
)
from lightning_curv.recording.records import (
    CONSTANT,
    PURE,
    TENTATIVE,
    LossCall,
    Marks,
    Operand,
    Use,
    all_roots,
    combined,
    edge_of,
    is_copy,
    mark_at,
    marks,
    origin_of,
)
from lightning_curv.recording.row_numbers import name_of
from lightning_curv.rules import Rule, bind, fallback
from lightning_curv.rules.registry import repeated

JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}


def passes_on(values: Iterable[Any], out: Tensor) -> bool:
    """Record a call that reads values of the network and no tensor else; false: it is none.

    Most calls are of this kind. Either nothing is to be said of these values, or all come from the
    same, and so does the output.

    Args:
        values: The arguments.
        out: The output.
    """
    only: Marks | None = None
    count = 0
    for value in values:
        if isinstance(value, Tensor):
            node = value.grad_fn
            # Data, a value that is changed in place, or a nested one: each needs more than this.
            if node is None or value is out or value.is_nested:
                return False
            left = marks(node)
            if left is not None and left.origin is not None:
                if left.origin == PURE or (count and not _same_source(only, left)):
                    return False
                only = left
            elif only is not None:
                return False
            count += 1
        elif isinstance(value, (list, tuple, dict)):
            return False
    if only is None:
        return True
    mark = mark_at(cast("Node", out.grad_fn))
    if mark.origin is None:
        mark.origin = only.origin
        mark.roots = only.roots
    mark.copies = only.copies
    return True


def _same_source(one: Marks | None, other: Marks) -> bool:
    """Whether two values come from the same, none of them a mere copy of a parameter."""
    return one is not None and one.roots is other.roots and not (one.copies or other.copies)


def read_data_alone(values: Iterable[Any]) -> bool:
    """Whether all tensors that a call reads are values of the network that depend on data.

    There is nothing to be said of its output then, nor of what it reads.

    Args:
        values: The arguments.
    """
    for value in values:
        if isinstance(value, Tensor):
            node = value.grad_fn
            if node is None or value.is_nested:
                return False
            left = marks(node)
            if left is not None and left.origin is not None:
                return False
        elif isinstance(value, (list, tuple, dict)):
            return False
    return True


def has_origin(tensors: Sequence[Tensor]) -> bool:
    """Whether some of the tensors was computed from parameters."""
    for tensor in tensors:  # noqa: SIM110 - a generator takes twice as long
        if tensor.requires_grad and origin_of(tensor) is not None:
            return True
    return False


def record_loss(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Tensor,
) -> Tensor:
    """Record a call of a known loss function, and return its output."""
    node = out.grad_fn
    if node is None:
        return out
    arguments = bind(LOSSES[func], args, kwargs)
    differentiable = []
    detached = {}
    read = []
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            detached[name] = value
            continue
        detached[name] = value.detach()
        if value.requires_grad:
            differentiable.append(name)
        else:
            read.append(roots_of(value))
    # No formula for a second derivative by this argument: the loss is one like any other.
    for name in differentiable:
        if (func, name) not in PARTS:
            return out
    roots = read[0] if len(read) == 1 else united(read)
    numbered = [one for one in read if one.numbers is not None]
    if len(numbered) == 1 and roots is not numbered[0]:
        # Those of the targets: beside them are weights of classes, which have none.
        roots = replace(roots, numbers=numbered[0].numbers)
    # A node holds one record: a loss that is differentiable in two inputs gets a node for each.
    for i, name in enumerate(differentiable):
        if i:
            out = out.view_as(out)
            node = cast("Node", out.grad_fn)
        mark = mark_at(node)
        if mark.loss is None:
            own = {**detached, name: detached["input"], "input": detached[name]}
            edge = edge_of(arguments[name])
            shape = out.shape
            # The hook lets go of the arguments once the user's pass is through this node.
            mark.loss = LossCall(PARTS[func, name], own, edge, shape, out.output_nr, roots, i > 0)
            node.register_hook(mark.loss.release)
    return out


def mark_read(
    out: Tensor,
    tensors: Sequence[Tensor],
    find: Callable[[Tensor], Roots] = all_roots,
) -> None:
    """Leave at the node of an op which tensors without gradient it reads, parameters left out.

    Args:
        out: The output of the op.
        tensors: Those among its arguments.
        find: Looks up the roots of a tensor without gradient.
    """
    read = None
    for tensor in tensors:
        if not (tensor.requires_grad or is_parameter(tensor)):
            found = find(tensor)
            read = found if read is None else read | found
    if read is not None and not read.constant:
        mark_at(cast("Node", out.grad_fn)).read = read


def record_unknown(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    """An op without a rule: note what its outputs come from.

    Parameters among its arguments need the fallback.
    """
    tensors = tensors_in((*args, *kwargs.values()))
    for result in tensors_in([out]):
        if result.grad_fn is not None:
            mark_read(result, tensors)
            if result.is_nested:
                mark_at(result.grad_fn).nested = name_of(func)
    differentiable = [tensor for tensor in tensors if tensor.requires_grad]
    origins = [origin_of(tensor) for tensor in differentiable]
    # A parameter that was repeated for every sample and is joined to data is data itself.
    if func in JOINS and {*origins} != {PURE}:
        origins = [None if is_copy(tensor) else origin_of(tensor) for tensor in differentiable]
    if not any(origins):
        _note_beside(out, DATA)
        return
    if {*origins} == {PURE}:
        _note_beside(out, united(all_roots(t) for t in tensors if not t.requires_grad))
    outputs = [tensor for tensor in tensors_in([out]) if tensor.grad_fn is not None]
    # Changed in place: the origin of what it was is gone.
    if any(o is t for o in outputs for t in tensors):
        return
    others = [one for one in tensors if not (one.requires_grad and origin_of(one) == PURE)]
    origin, roots = combined(origins, others)
    copies = all(map(is_copy, differentiable))
    for out in outputs:
        mark = mark_at(out.grad_fn)
        if mark.origin is None:
            mark.origin = origin
            mark.roots = roots
        mark.copies = copies
    if PURE in origins and len(outputs) == 1 and not copies:
        RecordedCall(func, *fallback.rule_for(func, args, kwargs)).store(outputs[0])


def _note_beside(out: Any, roots: Roots) -> None:
    """Note where tensors without gradient beside others are from, such as indices of a maximum.

    Those of parameters alone are constants; those of values of the network are data.
    """
    if isinstance(out, tuple):
        for tensor in out:
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                note(tensor, roots)


class RecordedCall:
    """The arguments of a call before it runs: in-place ops change values and history."""

    __slots__ = (
        "_roots",
        "bound",
        "changed",
        "func",
        "inplace",
        "nodes",
        "origins",
        "reads",
        "rule",
        "tensors",
    )

    def __init__(
        self,
        func: Callable[..., Any],
        rule: Rule,
        bound: dict[str, Any],
    ) -> None:
        self.func = func
        self.rule = rule
        self.bound = bound
        # Of tensors without gradient, by `id`: they are asked for several times.
        self._roots: dict[int, Roots] = {}
        self.tensors = tensors = dict[str, Tensor]()
        self.nodes = nodes = dict[str, tuple[Node | None, int]]()
        self.origins = origins = dict[str, str | None]()
        for name, value in bound.items():
            if isinstance(value, Tensor):
                tensors[name] = value
                if value.requires_grad:
                    nodes[name] = (value.grad_fn, value.output_nr)
                    origins[name] = origin_of(value)
        self.reads = rule.needs_values(bound)
        self.changed: dict[str, Tensor] | None = None
        self.inplace = rule.inplace(func)
        if self.inplace:
            first = next(iter(bound))
            # The rule needs the value that the op is about to overwrite.
            if first in self.reads and first in tensors:
                self.changed = {first: tensors[first].detach().clone()}

    def roots_of(self, tensor: Tensor) -> Roots:
        """What an argument was computed from besides parameters."""
        if tensor.requires_grad:
            return all_roots(tensor)
        found = self._roots.get(id(tensor))
        if found is None:
            found = self._roots[id(tensor)] = all_roots(tensor)
        return found

    def store(self, out: Tensor) -> None:
        """Leave the call at the node of its output."""
        if self.inplace and out._is_view():
            return  # its gradient goes to the tensor that it is a view of, around the node
        rule = self.rule
        # Which arguments are parameters is known only now that there is an output.
        operands = self._operands(out)
        self._mark_origin(operands, out)
        couples = rule.mixes_samples is not None and rule.mixes_samples(self.bound)
        if not (operands or couples):
            return
        owner = _owner(out) if rule.parameters and out._base is not None else out
        node = cast("Node", owner.grad_fn)
        mark = mark_at(node)
        if out.is_nested:
            mark.nested = name_of(self.func)
        if mark.use is None:
            mark.use = use = self._use(operands, out, owner.output_nr)
            use.mixes_samples = couples
            node.register_hook(use.release)

    def _use(self, names: list[str], out: Tensor, output_nr: int) -> Use:
        """The call as a use of its operands, which are those of these names."""
        # The call is over, and nobody else needs its arguments.
        arguments = self.bound
        operands: dict[str, Operand] = {}
        inputs: dict[str, GradientEdge] = {}
        versions: dict[str, int] = {}
        roots: dict[str, Roots] = {}
        shapes: dict[str, torch.Size] = {}
        nodes = self.nodes
        reads = self.reads
        for name, tensor in self.tensors.items():
            if name in names:
                before, number = nodes[name]
                if before is None:
                    operands[name] = Operand(tensor)
                    continue
                arguments[name] = value = self._value(name, tensor)
                operands[name] = Operand(value, GradientEdge(before, number))
            else:
                if name in reads:
                    arguments[name] = value = self._value(name, tensor)
                    versions[name] = value._version
                else:  # not read by the rule: its memory is not kept alive
                    arguments[name] = None
                if name in nodes:
                    before, number = nodes[name]
                    edge = edge_of(tensor) if before is None else GradientEdge(before, number)
                    inputs[name] = edge
                if tensor.requires_grad:
                    continue
            # Of what has no gradient, and of operands that were computed from parameters.
            roots[name] = self.roots_of(tensor)
            shapes[name] = tensor.shape
        return Use(
            self.func,
            self.rule,
            arguments,
            operands,
            inputs,
            out.shape,
            out.dtype,
            output_nr,
            versions,
            roots=roots,
            shapes=shapes,
        )

    def _value(self, name: str, tensor: Tensor) -> Tensor:
        """The value of an argument when it was read."""
        if self.changed is not None and name in self.changed:
            return self.changed[name]
        return tensor.detach()

    def _mark_origin(self, operands: list[str], out: Tensor) -> None:
        node = cast("Node", out.grad_fn)
        expands = self.rule.broadcasts
        origin, roots = None, DATA
        # Most calls read data, and nothing is to be said of their output.
        if None not in self.origins.values():
            others = []
            for name, tensor in self.tensors.items():
                # In place: what an argument was computed from is no longer what it was.
                if self.inplace or self.origins.get(name) != PURE:
                    others.append(tensor)
            origin, roots = combined(self.origins.values(), others, self.roots_of)
        if expands and operands and repeated(self.tensors[operands[0]], out):
            origin = None  # a copy per sample: from here on it is data
        if origin is not None or expands or marks(node) is not None:
            mark = mark_at(node)
            mark.origin = origin
            mark.roots = roots
            mark.copies = expands

    def _operands(self, out: Tensor) -> list[str]:
        """The arguments that are parameters of this call; the others are data."""
        if self.rule.parameters:
            holds = self.rule.holds
            return [name for name in self.nodes if holds(name)]
        pure = [name for name, origin in self.origins.items() if origin == PURE]
        if pure:
            return pure
        tentative = [k for k, origin in self.origins.items() if origin in (CONSTANT, TENTATIVE)]
        return [name for name in tentative if self.rule.is_parameter(name, self.tensors[name], out)]


def _owner(out: Tensor) -> Tensor:
    """The tensor whose node survives in-place changes.

    An op's result may be a view of what it computed.
    """
    base = out._base
    if base is not None and base.grad_fn is not None and base.numel() == out.numel():
        return base
    return out

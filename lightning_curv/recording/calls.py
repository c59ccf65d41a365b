"""Calls: what a call of a torch function leaves at the autograd node of its output.

This runs at every call of a forward pass and is written for that: what most calls need comes first,
and there are loops where generators would be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
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


def has_origin(values: Iterable[Any]) -> bool:
    """Whether some of the tensors that a call reads was computed from parameters."""
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad and origin_of(value) is not None:
                return True
        elif isinstance(value, (list, tuple, dict)) and has_origin(tensors_in([value])):
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
        if not value.requires_grad:
            read.append(roots_of(value))
        elif (func, name) in PARTS:
            differentiable.append(name)
        else:  # no formula for a second derivative by this argument: a loss like any other
            return out
    roots = read[0] if len(read) == 1 else _read_by_loss(read)
    # A node holds one record: a loss that is differentiable in two inputs gets a node for each.
    for i, name in enumerate(differentiable):
        if i:
            out = out.view_as(out)
            node = cast("Node", out.grad_fn)
        mark = mark_at(node)
        if mark.loss is None:
            own = {**detached, name: detached["input"], "input": detached[name]}
            edge = edge_of(arguments[name])
            part = PARTS[func, name]
            mark.loss = call = LossCall(part, own, edge, out.shape, out.output_nr, roots, i > 0)
            # The hook lets go of the arguments once the user's pass is through this node.
            node.register_hook(call.release)
    return out


def _read_by_loss(read: Sequence[Roots]) -> Roots:
    """The roots of all that a loss reads, with the numbers of the targets' rows.

    Beside targets are weights of classes, which have none.
    """
    roots = united(read)
    numbered = [one for one in read if one.numbers is not None]
    if len(numbered) == 1 and roots is not numbered[0]:
        return replace(roots, numbers=numbered[0].numbers)
    return roots


def mark_read(out: Tensor, tensors: Sequence[Tensor]) -> None:
    """Leave at the node of an op which tensors without gradient it reads, parameters left out.

    Args:
        out: The output of the op.
        tensors: Those among its arguments.
    """
    read = read_among(tensors)
    if not read.constant:
        mark_at(cast("Node", out.grad_fn)).read = read


def read_among(tensors: Iterable[Tensor]) -> Roots:
    """The roots of the tensors without gradient among some, parameters left out."""
    return united([roots_of(t) for t in tensors if not (t.requires_grad or is_parameter(t))])


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
    origin, roots = combined([DATA] if None in origins else map(all_roots, others))
    copies = all(map(is_copy, differentiable))
    for out in outputs:
        mark = mark_at(out.grad_fn)
        if mark.origin is None:
            mark.origin = origin
            mark.roots = roots
        mark.copies = copies
    if PURE in origins and len(outputs) == 1 and not copies:
        rule, arguments = fallback.rule_for(func, args, kwargs)
        record_call(func, rule, arguments, states_of(arguments), outputs[0])


def _note_beside(out: Any, roots: Roots) -> None:
    """Note where tensors without gradient beside others are from, such as indices of a maximum.

    Those of parameters alone are constants; those of values of the network are data.
    """
    if isinstance(out, tuple):
        for tensor in out:
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                note(tensor, roots)


# Where a tensor that requires gradients is in the graph, and what it was computed from.
State = tuple[Node | None, int, str | None]


def states_of(arguments: Mapping[str, Any]) -> dict[str, State]:
    """The states of arguments before the call: ops in place change them.

    Args:
        arguments: The arguments of the call by name.
    """
    states: dict[str, State] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            node = value.grad_fn
            if node is not None:
                left = marks(node)
                states[name] = node, value.output_nr, None if left is None else left.origin
            elif type(value) is nn.Parameter:
                states[name] = None, 0, PURE
            else:
                states[name] = None, value.output_nr, origin_of(value)
    return states


def overwritten(rule: Rule, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The value that an op in place is about to overwrite, if its rule needs that, by name."""
    first, value = next(iter(arguments.items()))
    if isinstance(value, Tensor) and first in rule.needs_values(arguments):
        return {first: value.detach().clone()}
    return {}


def record_call(
    func: Callable[..., Any],
    rule: Rule,
    arguments: dict[str, Any],
    states: Mapping[str, State],
    out: Tensor,
    before: Mapping[str, Tensor] | None = None,
) -> None:
    """Leave a call at the node of its output, and what it reads that has no gradient.

    Args:
        func: The function that was called.
        rule: Its rule.
        arguments: The arguments by name, which are not needed elsewhere.
        states: Their states before the call.
        out: The output.
        before: For ops in place, the values that were overwritten.
    """
    # Which arguments are parameters is known only now that there is an output.
    named = rule.parameters
    operands: list[str] = []
    if named:
        for name in states:
            if name in named or rule.holds(name):
                operands.append(name)
    else:
        operands = _operands(rule, arguments, states, out)
    roots: dict[str, Roots] = {}
    read: Roots | None = None
    beside: list[Roots] = []  # of all that was not computed from parameters alone
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            if isinstance(value, (list, tuple, dict)):
                among = read_among(tensors_in([value]))
                read = among if read is None else read | among
            continue
        if not value.requires_grad:
            roots[name] = found = roots_of(value)
            if type(value) is Tensor or not is_parameter(value):
                read = found if read is None else read | found
        elif name in states and before is None:
            origin = states[name][2]
            if origin == PURE:
                continue
            found = DATA if origin is None else all_roots(value)
        else:  # changed in place: what it was computed from is no longer what it was
            found = all_roots(value)
        beside.append(found)
    node: Node = out.grad_fn  # type: ignore[assignment]
    mark = mark_at(node)
    if read is not None and (read.tensors or read.data):
        mark.read = read
    if before is not None and out._is_view():
        return  # its gradient goes to the tensor that it is a view of, around the node
    origin, of_output = combined(beside if states else (DATA,))
    expands = rule.broadcasts
    if expands and operands and repeated(arguments[operands[0]], out):
        origin = None  # a copy per sample: from here on it is data
    mark.origin = origin
    mark.roots = of_output
    mark.copies = expands
    couples = rule.mixes_samples is not None and rule.mixes_samples(arguments)
    if not (operands or couples):
        return
    output_nr = out.output_nr
    if named and out._base is not None:
        owner = _owner(out)
        node = owner.grad_fn  # type: ignore[assignment]
        output_nr = owner.output_nr
        mark = mark_at(node)
    if out.is_nested:
        mark.nested = name_of(func)
    if mark.use is None:
        mark.use = use = _use(func, rule, arguments, states, out, before, operands, roots)
        use.output_nr = output_nr
        use.mixes_samples = couples
        node.register_hook(use.release)


def _operands(
    rule: Rule,
    arguments: Mapping[str, Any],
    states: Mapping[str, State],
    out: Tensor,
) -> list[str]:
    """The arguments that are parameters of a call whose rule names none; the others are data."""
    pure = [name for name, (_, _, origin) in states.items() if origin == PURE]
    if pure:
        return pure
    tentative = [k for k, (_, _, origin) in states.items() if origin in (CONSTANT, TENTATIVE)]
    return [name for name in tentative if rule.is_parameter(name, arguments[name], out)]


def _use(
    func: Callable[..., Any],
    rule: Rule,
    arguments: dict[str, Any],
    states: Mapping[str, State],
    out: Tensor,
    before: Mapping[str, Tensor] | None,
    names: Collection[str],
    roots: dict[str, Roots],
) -> Use:
    """A call as a use of its operands, which are those of these names."""
    operands: dict[str, Operand] = {}
    inputs: dict[str, GradientEdge] = {}
    versions: dict[str, int] = {}
    shapes: dict[str, torch.Size] = {}
    reads = rule.needs_values(arguments)
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        node, number, _ = states.get(name, (None, 0, None))
        if name in names and node is None:  # a parameter itself
            operands[name] = Operand(value)
            continue
        kept = None  # what is not read by the rule: its memory is not kept alive
        if name in reads or name in names:
            kept = before[name] if before and name in before else value.detach()
        # The call is over, and nobody else needs its arguments.
        arguments[name] = kept
        if name in names and node is not None and kept is not None:  # computed from parameters
            operands[name] = Operand(kept, GradientEdge(node, number))
            roots[name] = all_roots(value)
        else:
            if kept is not None:
                versions[name] = kept._version
            if name in states:
                inputs[name] = edge_of(value) if node is None else GradientEdge(node, number)
        if name in roots:
            shapes[name] = value.shape
    return Use(
        func,
        rule,
        arguments,
        operands,
        inputs,
        out.shape,
        out.dtype,
        versions=versions,
        roots=roots,
        shapes=shapes,
    )


def _owner(out: Tensor) -> Tensor:
    """The tensor whose node survives in-place changes.

    An op's result may be a view of what it computed.
    """
    base = out._base
    if base is not None and base.grad_fn is not None and base.numel() == out.numel():
        return base
    return out

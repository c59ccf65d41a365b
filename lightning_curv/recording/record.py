r"""Recording: tag the autograd node of every op that consumes a parameter, and of every loss call.

``record()`` watches the calls of torch functions. An op with a trainable parameter among its
arguments (or a tensor computed from parameters: a cast, ``.t()``, a slice, a parametrization)
leaves a `Use` in the ``metadata`` of its output's autograd node; a known loss function leaves a
`LossCall`. Records live and die with the graph: there is no registry, nothing to clear, and a graph
that is never backpropagated costs nothing once it is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_curv.differentiation.weight_norm import weight_norm
from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import LOSSES, PARTS
from lightning_curv.recording.provenance import CONSTANT as CONSTANT_ROOTS
from lightning_curv.recording.provenance import (
    DATA,
    Numbers,
    Root,
    Roots,
    mapped,
    note,
    physical,
    roots_of,
    tensors_in,
    united,
)
from lightning_curv.recording.records import (
    CONSTANT,
    PURE,
    TENTATIVE,
    LossCall,
    Mapped,
    Operand,
    Use,
    all_roots,
    combined,
    edge_of,
    is_copy,
    like,
    mark_at,
    marks,
    origin_of,
)
from lightning_curv.recording.row_numbers import (
    FILLING,
    LIKE,
    ROUTING,
    Rows,
    counted,
    fingerprint,
    follow,
    mapped_rows,
    name_of,
    numbers_of,
    ordered,
    plainly_in_order,
)
from lightning_curv.rules import RULES, Rule, bind, fallback
from lightning_curv.rules.joined import joined
from lightning_curv.rules.registry import repeated

# Functions whose results are no function of their arguments.
_RANDOM = """
    bernoulli exponential multinomial normal poisson rand rand_like randint randint_like randn
    randn_like randperm uniform
"""
RANDOM = frozenset(_RANDOM.split())
# Functions that make tensors of something else.
MAKING = frozenset(("as_tensor", "asarray", "from_numpy", "frombuffer", "tensor"))
# Functions that fill up what is nested.
PADDING = frozenset(("nested_to_padded_tensor", "to_padded_tensor"))
# Functions that cut a tensor into several.
PIECES = frozenset(("chunk", "split", "split_with_sizes", "tensor_split"))
JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}

_local = threading.local()


class record(TorchFunctionMode):
    """Context manager that records parameter uses and loss calls in the autograd graph.

    Run the forward pass and the loss inside it; `curvature` and `extend` do so for you. It costs a
    few microseconds per torch call and no memory beyond what autograd keeps.

    Args:
        output: A module whose output is to be found again: `curvature` takes it as ``output``.

    Example:
        >>> import torch
        >>> from lightning_curv import Variance, curvature, record
        >>> layer = torch.nn.Linear(3, 2)
        >>> with record():
        ...     loss = torch.nn.functional.mse_loss(layer(torch.ones(4, 3)), torch.zeros(4, 2))
        >>> with curvature(Variance()):
        ...     loss.backward()
        >>> layer.weight.variance.shape
        torch.Size([2, 3])
    """

    def __init__(self, output: nn.Module | None = None) -> None:
        super().__init__()
        self._output = output
        self._hooks: list[Any] = []

    def __enter__(self) -> record:
        """Start recording."""
        if self._output is not None:
            self._hooks.append(self._output.register_forward_hook(require_output))
        return cast("record", super().__enter__())

    def __exit__(self, *exception: Any) -> None:
        """Stop recording."""
        if self._hooks:
            self._hooks.pop().remove()
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and record what it consumed."""
        return self._recorded(func, args, kwargs or {}, func)

    def _recorded(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[..., Any],
    ) -> Any:
        """The result of a call, recorded; ``run`` is what is called."""
        # This runs at every call of a torch function: the usual cases come first.
        rule = RULES.get(func)
        if rule is None:
            if func in LOSSES:
                if _recording():
                    return _record_loss(func, args, kwargs, run)
                return run(*args, **kwargs)
            # What it returns is connected to the ops that were recorded: nothing is to be noted.
            if func is torch.autograd.grad:
                return run(*args, **kwargs)
            if func in self._intercepted and not disabled():
                return self._intercepted[func](self, func, args, kwargs)
            out = run(*args, **kwargs)
            if isinstance(out, (Tensor, tuple, list)) and (free := _without_gradient(out)):
                _note_roots(func, args, kwargs, free)
            elif isinstance(out, (Tensor, tuple, list, dict)) and _recording():
                _record_unknown(func, args, kwargs, out)
            elif func is Tensor.__setitem__ and not args[0].requires_grad:
                _note_roots(func, args, kwargs, [args[0]])
            return out
        if not _recording() or not (rule.slots or _has_origin([*args, *kwargs.values()])):
            out = run(*args, **kwargs)
            if isinstance(out, Tensor) and out.grad_fn is None:
                _note_roots(func, args, kwargs, [out])
            elif isinstance(out, Tensor) and not disabled():
                _mark_read(out, [*args, *kwargs.values()])
            return out
        # Before the call: an op in place changes what its arguments are.
        call = _Call(func, rule, rule.bind(args, kwargs))
        out = run(*args, **kwargs)
        if rule.outputs and any(map(rule.holds, call.origins)):
            first = out[0] if isinstance(out, tuple) else out
            call.bound["output"] = first.detach(), first._version
        if rule.outputs and isinstance(out, tuple) and any(map(rule.holds, call.origins)):
            whole, out = joined(out, rule.outputs(call.bound))
            call.store(whole)
        elif isinstance(out, Tensor) and out.grad_fn is not None:
            call.store(out)
            _mark_read(out, [*args, *kwargs.values()], call.roots_of)
        elif isinstance(out, Tensor):
            _note_roots(func, args, kwargs, [out])
        return out

    def _record_inside(
        self,
        func: FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A Python function whose inner calls are recorded instead."""
        if not _recording():
            return func(*args, **kwargs)
        with self:
            return _undispatched(func)(*args, **kwargs)

    def _record_weight_norm(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """An op whose second derivative is wrong in torch."""
        if not _recording():
            return func(*args, **kwargs)
        out = weight_norm(*args, **kwargs)
        _record_unknown(func, args, kwargs, out)
        return out

    _intercepted: Mapping[Callable[..., Any], Callable[..., Any]] = {
        F.multi_head_attention_forward: _record_inside,
        torch._weight_norm: _record_weight_norm,
    }


def _recording() -> bool:
    return torch.is_grad_enabled() and not disabled()


def _without_gradient(out: Tensor | Sequence[Any]) -> list[Tensor]:
    """The results of a call, if they are tensors without a graph; else nothing."""
    results = [out] if isinstance(out, Tensor) else list(out)
    free = all(isinstance(result, Tensor) and result.grad_fn is None for result in results)
    return results if free else []


def _note_roots(
    func: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    results: list[Tensor],
) -> None:
    """Note what tensors without gradient were computed from; random numbers come from outside."""
    name = name_of(func)
    if disabled() or name in RANDOM:
        return
    if physical(results[0]).requires_grad:
        return _mark_mapped(func, results, tensors_in([*args, *kwargs.values()]))
    # What is looked at for its type only, or not used at all, is not what a result comes from.
    if name in LIKE:
        args = args[:1]
    elif name == "where":
        args = _without_unused(args)
    tensors = tensors_in([*args, *kwargs.values()])
    inplace = any(results[0] is tensor for tensor in tensors)
    if inplace and not _changes(func, kwargs):
        return  # an argument as it is
    known = list(map(all_roots, tensors))
    roots = united(known)
    # Indices that come from statistics say where something is: they are no part of what is there.
    if roots.pooled and name in ROUTING:
        of_first = united(map(all_roots, tensors_in(args[:1])))
        roots = replace(roots, pooled=of_first.pooled)
    if name in FILLING:
        roots = CONSTANT_ROOTS
    if name in MAKING and not tensors:
        made = replace(Root.of(results[0]), made=True)
        note(results[0], Roots((made,)))
        return
    if any(tensor.is_nested for tensor in (*tensors, *results)):
        for out in results:
            in_order = out.is_nested or name in PADDING
            note(out, roots if in_order else replace(roots.moved, numbers={}))
        return
    # Where nobody has moved rows yet, and this function does not either, nothing has to be
    # followed.
    explicit = any(one.numbers is not None for one in known)
    if not roots.tensors or (not explicit and plainly_in_order(func, tensors, results)):
        for out in results:
            note(out, roots)
        return
    # Some rows of a tensor may be a batch out of a data set, whose rows count from zero.
    drawn = _drawn_from(func, args, kwargs)
    decided = any(tensor.requires_grad for tensor in tensors)
    # Sums of integers are lengths and positions, no statistics of what is in the rows.
    counts = not any(tensor.is_floating_point() for tensor in tensors)
    view = results[0]._base if inplace else None
    before = None if view is None else numbers_of(results[0])
    for out, rows in zip(results, follow(func, args, kwargs, results), strict=True):
        pooled = roots.pooled if counts else roots.pooled | rows.pooled
        numbers: Numbers = {size: physical(found) for size, found in rows.numbers.items()}
        if view is not None and before is not None:
            _note_whole(view, before, rows, replace(roots, pooled=pooled))
        if drawn is None:
            own = roots if ordered(numbers, physical(out), roots) else roots.moved
        else:
            # Some rows of a tensor: they may be the batch, whose rows are counted anew.
            others = [root for root in roots.tensors if root != drawn]
            own = Roots((Root.of(out, drawn), *others))
            if out.ndim:
                numbers = {len(out): counted(len(out), out), **numbers}
        # What the network's own values decide, the entry of a codebook, is nothing that was moved:
        # weights tell whose rows read it.
        told = numbers or None if decided else numbers
        note(out, replace(own, numbers=told, pooled=pooled))


def _without_unused(args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of ``torch.where`` less an alternative with pooled rows that is never taken.

    So a statistic of the batch that stands in for missing values is none of the others' business
    where none is missing.
    """
    alternatives = [value for value in args[1:] if isinstance(value, Tensor)]
    if len(args) != 3 or not any(all_roots(value).pooled for value in alternatives):
        return args
    shapes = [value.shape for value in (args[0], *alternatives)]
    first_taken = args[0].expand(torch.broadcast_shapes(*shapes))
    if bool(first_taken.all()):
        return args[:2]
    if bool(first_taken.any()):
        return args
    return (args[0], args[2])


def _mark_mapped(
    func: Callable[..., Any],
    results: Sequence[Tensor],
    tensors: Sequence[Tensor],
) -> None:
    """Leave at a node that ``vmap`` hides what the op reads of the batch."""
    whole = physical(results[0])
    read = [tensor for tensor in tensors if not physical(tensor).requires_grad]
    roots = united(map(roots_of, read))
    if whole.grad_fn is None or not roots.tensors or not mapped(results[0]):
        return
    name = name_of(func)
    rows = mapped_rows(name, read, results[0])
    with_rows = replace(roots, numbers=rows.numbers, pooled=roots.pooled | rows.pooled)
    mark_at(whole.grad_fn).mapped = Mapped(name, with_rows, edge_of(whole), like(whole))


def _changes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function that returns one of its arguments has changed it."""
    name = getattr(func, "__name__", "")
    return (
        "out" in kwargs
        or name.startswith(("__i", "__set"))
        or (name.endswith("_") and not name.endswith("__"))
    )


def _note_whole(whole: Tensor, before: Numbers, rows: Rows, roots: Roots) -> None:
    """Note what the tensor behind a view was computed from, after the view was changed in place."""
    known = all_roots(whole)
    both = replace(known | roots, numbers=known.numbers)
    # Rows have moved inside of the view: those of the whole are not known any more.
    if fingerprint(before) != fingerprint(rows.numbers):
        both = replace(both.moved, numbers={})
    note(whole, both)


def _drawn_from(
    func: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
) -> Root | None:
    """The tensor that a call takes some rows of: a batch out of a data set, a piece of a batch."""
    if not _draws(func, args, kwargs):
        return None
    roots = all_roots(args[0])
    single = len(roots.tensors) == 1 and not roots.data and not roots.routed
    if single and roots.tensors[0].ndim:
        return roots.tensors[0]
    return None


def _draws(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call takes some rows of a tensor: a slice, a list of numbers, or a piece."""
    if name_of(func) in PIECES:
        by_position = args[2] if len(args) > 2 else 0
        return bool(kwargs.get("dim", by_position) == 0)
    if func is not Tensor.__getitem__ or isinstance(args[1], tuple):
        return False
    index = args[1]
    if isinstance(index, Tensor):
        return index.ndim == 1 and not index.requires_grad
    if isinstance(index, slice):
        return index != slice(None)
    return isinstance(index, list)


def _has_origin(values: Iterable[Any]) -> bool:
    """Whether some tensor among the arguments was computed from parameters."""
    with_gradient = (tensor for tensor in tensors_in(values) if tensor.requires_grad)
    return any(origin_of(tensor) is not None for tensor in with_gradient)


def _undispatched(function: FunctionType) -> FunctionType:
    """``function`` without the hand-over to a torch function mode that its first lines make."""
    scope = {
        **function.__globals__,
        "has_torch_function": lambda _: False,
        "has_torch_function_variadic": lambda *_: False,
    }
    clone = FunctionType(
        function.__code__,
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


def _record_loss(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[..., Any],
) -> Any:
    out = run(*args, **kwargs)
    arguments = bind(LOSSES[func], args, kwargs)
    differentiable = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    if out.grad_fn is None:
        return out
    # No formula for a second derivative by this argument: the loss is one like any other.
    if any((func, name) not in PARTS for name in differentiable):
        return out
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    free = [v for v in arguments.values() if isinstance(v, Tensor) and not v.requires_grad]
    read = list(map(all_roots, free))
    numbered = [one for one in read if one.numbers is not None]
    roots = united(read)
    if len(numbered) == 1:
        # Those of the targets: beside them are weights of classes, which have none.
        roots = replace(roots, numbers=numbered[0].numbers)
    # A node holds one record: a loss that is differentiable in two inputs gets a node for each.
    for i, name in enumerate(differentiable):
        out = out.view_as(out) if i else out
        mark = mark_at(out.grad_fn)
        part = PARTS[func, name]
        own = {**detached, name: detached["input"], "input": detached[name]}
        if mark.loss is None:
            edge = edge_of(arguments[name])
            mark.loss = LossCall(part, own, edge, out.shape, out.output_nr, roots, i > 0)
            out.grad_fn.register_hook(mark.loss.release)
    return out


def _mark_read(
    out: Tensor,
    values: Iterable[Any],
    find: Callable[[Tensor], Roots] = roots_of,
) -> None:
    """Leave at the node of an op which tensors without gradient it reads, parameters left out.

    Args:
        out: The output of the op.
        values: Its arguments.
        find: Looks up the roots of a tensor without gradient.
    """
    free = []
    for tensor in tensors_in(values):
        if not tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            free.append(tensor)
    if not free:
        return
    roots = united(map(find, free))
    if not roots.constant:
        mark_at(cast("Node", out.grad_fn)).read = roots


def _record_unknown(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
) -> None:
    """An op without a rule: note what its outputs come from.

    Parameters among its arguments need the fallback.
    """
    tensors = tensors_in([*args, *kwargs.values()])
    for result in tensors_in([out]):
        if result.grad_fn is not None:
            _mark_read(result, tensors)
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
    origin, roots = combined(origins, tensors)
    copies = all(map(is_copy, differentiable))
    for out in outputs:
        mark = mark_at(out.grad_fn)
        if mark.origin is None:
            mark.origin = origin
            mark.roots = roots
        mark.copies = copies
    if PURE in origins and len(outputs) == 1 and not copies:
        _Call(func, *fallback.rule_for(func, args, kwargs)).store(outputs[0])


def _note_beside(out: Any, roots: Roots) -> None:
    """Note where tensors without gradient beside others are from, such as indices of a maximum.

    Those of parameters alone are constants; those of values of the network are data.
    """
    if isinstance(out, tuple):
        for tensor in out:
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                note(tensor, roots)


class _Call:
    """The arguments of a call before it runs: in-place ops change values and history."""

    __slots__ = (
        "_roots",
        "bound",
        "changed",
        "func",
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
        # By the `id` of a tensor: they are asked for several times, and to look one up takes long.
        self._roots: dict[int, Roots] = {}
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[str, tuple[Node | None, int]] = {}
        self.origins: dict[str, str | None] = {}
        for name, value in bound.items():
            if isinstance(value, Tensor):
                self.tensors[name] = value
                if value.requires_grad:
                    self.nodes[name] = (value.grad_fn, value.output_nr)
                    self.origins[name] = origin_of(value)
        self.reads = rule.reads(bound)
        self.changed: dict[str, Tensor] = {}
        if rule.inplace(func):
            first = next(iter(bound))
            # The rule needs the value that the op is about to overwrite.
            if first in self.reads and first in self.tensors:
                self.changed[first] = self.tensors[first].detach().clone()

    def roots_of(self, tensor: Tensor) -> Roots:
        """What an argument was computed from besides parameters."""
        found = self._roots.get(id(tensor))
        if found is None:
            found = self._roots[id(tensor)] = all_roots(tensor)
        return found

    def store(self, out: Tensor) -> None:
        """Leave the call at the node of its output."""
        if out._is_view() and self.rule.inplace(self.func):
            return  # its gradient goes to the tensor that it is a view of, around the node
        # Which arguments are parameters is known only now that there is an output.
        operands = self._operands(out)
        self._mark_origin(operands, out)
        owner = _owner(out) if self.rule.slots else out
        couples = self.rule.couples(self.bound)
        if not (operands or couples):
            return
        node = cast("Node", owner.grad_fn)
        mark = mark_at(node)
        if out.is_nested:
            mark.nested = name_of(self.func)
        if mark.use is not None:
            return
        arguments = dict(self.bound)
        versions = {}
        for name in self.tensors:
            if name in operands:
                arguments[name] = self._value(name)
            elif name in self.reads:
                value = self._value(name)
                arguments[name] = value
                versions[name] = value._version
            else:  # not read by the rule: its memory is not kept alive
                arguments[name] = None
        roots = {}
        for name, tensor in self.tensors.items():
            derived = name in operands and tensor.grad_fn is not None
            if derived or not tensor.requires_grad:
                roots[name] = self.roots_of(tensor)
        mark.use = Use(
            function=self.func,
            rule=self.rule,
            arguments=arguments,
            operands={k: self._operand(k, arguments[k]) for k in operands},
            inputs={k: self._edge(k) for k in self.nodes if k not in operands},
            shape=out.shape,
            dtype=out.dtype,
            output_nr=owner.output_nr,
            versions=versions,
            couples=couples,
            roots=roots,
            shapes={k: self.tensors[k].shape for k in roots},
        )
        node.register_hook(mark.use.release)

    def _mark_origin(self, operands: list[str], out: Tensor) -> None:
        node = cast("Node", out.grad_fn)
        origin, roots = combined([*self.origins.values()], [*self.tensors.values()], self.roots_of)
        if self.rule.expands and operands and repeated(self.tensors[operands[0]], out):
            origin = None  # a copy per sample: from here on it is data
        if origin is not None or self.rule.expands or marks(node) is not None:
            mark = mark_at(node)
            mark.origin = origin
            mark.roots = roots
            mark.copies = self.rule.expands

    def _operands(self, out: Tensor) -> list[str]:
        """The arguments that are parameters of this call; the others are data."""
        if self.rule.slots:
            return [name for name in self.nodes if self.rule.holds(name)]
        pure = [name for name, origin in self.origins.items() if origin == PURE]
        if pure:
            return pure
        tentative = [k for k, origin in self.origins.items() if origin in (CONSTANT, TENTATIVE)]
        return [name for name in tentative if self.rule.accepts(name, self.tensors[name], out)]

    def _operand(self, name: str, value: Tensor) -> Operand:
        leaf = self.nodes[name][0] is None
        if leaf:
            return Operand(self.tensors[name])
        return Operand(value, self._edge(name))

    def _edge(self, name: str) -> GradientEdge:
        node, output_nr = self.nodes[name]
        if node is None:
            return edge_of(self.tensors[name])
        return GradientEdge(node, output_nr)

    def _value(self, name: str) -> Tensor:
        if name in self.changed:
            return self.changed[name]
        return self.tensors[name].detach()


def _owner(out: Tensor) -> Tensor:
    """The tensor whose node survives in-place changes.

    An op's result may be a view of what it computed.
    """
    base = out._base
    if base is not None and base.grad_fn is not None and base.numel() == out.numel():
        return base
    return out


def mark_output(module: nn.Module, args: Any, output: Any) -> None:
    """Remember at the node of a module's output that it is one."""
    if isinstance(output, Tensor) and output.grad_fn is not None and not disabled():
        mark = mark_at(output.grad_fn)
        others = mark.outputs or {}
        mark.outputs = {**others, module: (output.output_nr, like(output))}


def require_output(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module given as ``output=``."""
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            f"`output=` needs a module that returns one tensor, found `{type(module).__name__}` "
            f"that returns `{type(output).__name__}`; pass the tensor itself."
        )
    mark_output(module, args, output)


def disabled() -> bool:
    """Whether recording is switched off by `disable`."""
    return getattr(_local, "disabled", False)


@contextmanager
def disable() -> Iterator[None]:
    """Context manager in which nothing is recorded, extended modules included.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from lightning_curv import disable, extend
        >>> model = extend(torch.nn.Linear(3, 2))
        >>> with disable():
        ...     output = model(torch.ones(4, 3))
    """
    before = disabled()
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before

r"""Recording: tag the autograd node of every op that consumes a parameter, and of every loss call.

``record()`` watches the calls of torch functions. An op with a trainable parameter among its arguments (or a tensor
computed from parameters: a cast, ``.t()``, a slice, a parametrization) leaves a `Use` in the ``metadata`` of its
output's autograd node; a known loss function leaves a `LossCall`. Records live and die with the graph: there is no
registry, nothing to clear, and a graph that is never backpropagated costs nothing once it is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import LOSSES, PARTS
from lightning_curv.records import (
    PURE,
    TENTATIVE,
    LossCall,
    Operand,
    Use,
    combined,
    edge_of,
    is_copy,
    like,
    mark_at,
    origin_of,
)
from lightning_curv.rules import RULES, Rule, bind, fallback
from lightning_curv.rules.joined import joined

TRANSPARENT = {F.multi_head_attention_forward}  # Python functions whose inner calls are recorded instead
JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}

_local = threading.local()


class record(TorchFunctionMode):
    """Context manager that records parameter uses and loss calls in the autograd graph.

    Run the forward pass and the loss inside it; `curvature` and `extend` do so for you. It costs a few microseconds per
    torch call and no memory beyond what autograd keeps.

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
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and record what it consumed."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or disabled():
            return func(*args, **kwargs)
        if func in TRANSPARENT:
            with self:
                return _undispatched(cast("FunctionType", func))(*args, **kwargs)
        if func in LOSSES:
            return _record_loss(func, args, kwargs)
        rule = RULES.get(func)
        if rule is None:
            out = func(*args, **kwargs)
            leaves = tree_leaves(out) if isinstance(out, (tuple, list)) else [out]
            outputs = [t for t in leaves if isinstance(t, Tensor) and t.grad_fn is not None]
            if outputs:
                _record_unknown(func, args, kwargs, outputs)
            return out
        if not rule.slots and not any(map(_has_origin, args)) and not any(map(_has_origin, kwargs.values())):
            return func(*args, **kwargs)  # data alone
        call = _Call(func, rule, rule.bind(args, kwargs))
        out = func(*args, **kwargs)
        if rule.outputs and isinstance(out, tuple) and any(rule.holds(k) for k in call.edges):
            whole, out = joined(out, rule.outputs(call.bound))
            call.store(whole)
        elif isinstance(out, Tensor) and out.grad_fn is not None:
            call.store(out)
        return out


def _has_origin(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_origin, value))
    return isinstance(value, Tensor) and value.requires_grad and origin_of(value) is not None


def _undispatched(function: FunctionType) -> FunctionType:
    """``function`` without the hand-over to a torch function mode that its first lines make."""
    scope = {
        **function.__globals__,
        "has_torch_function": lambda _: False,
        "has_torch_function_variadic": lambda *_: False,
    }
    clone = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    clone.__kwdefaults__ = function.__kwdefaults__
    return clone


def _record_loss(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(*args, **kwargs)
    arguments = bind(LOSSES[func], args, kwargs)
    differentiable = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    if out.grad_fn is None:
        return out
    if unknown := [name for name in differentiable if (func, name) not in PARTS]:
        mark_at(out.grad_fn).refusal = f"`{func.__name__}` whose `{unknown[0]}` requires gradients; detach it"
        return out
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    for i, name in enumerate(differentiable):
        out = out.view_as(out) if i else out
        mark, part = mark_at(out.grad_fn), PARTS[func, name]
        own = {**detached, name: detached["input"], "input": detached[name]}
        mark.loss = mark.loss or LossCall(part, own, edge_of(arguments[name]), out.shape, out.output_nr, i > 0)
    return out


def _record_unknown(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> None:
    """An op without a rule: note what its outputs come from; parameters among its arguments need the fallback."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    origins = [origin_of(t) for t in tensors if t.requires_grad]
    if func in JOINS and {*origins} != {PURE}:
        origins = [None if is_copy(t) else origin_of(t) for t in tensors if t.requires_grad]
    if not any(origins) or any(o is t for o in outputs for t in tensors):
        return
    origin = combined(origins, tensors)
    copies = all(is_copy(t) for t in tensors if t.requires_grad)
    for out in outputs:
        mark = mark_at(cast("Node", out.grad_fn))
        mark.origin, mark.copies = mark.origin or origin, copies
    if PURE in origins and len(outputs) == 1 and not copies:
        _Call(func, *fallback.rule_for(func, args, kwargs)).store(outputs[0])


class _Call:
    """The arguments of a call as they are before it runs (in-place ops change values and history)."""

    def __init__(self, func: Callable[..., Any], rule: Rule, bound: dict[str, Any]) -> None:
        self.func, self.rule, self.bound = func, rule, bound
        self.tensors = {k: v for k, v in bound.items() if isinstance(v, Tensor)}
        self.edges = {k: edge_of(v) for k, v in self.tensors.items() if v.requires_grad}
        self.origins = {k: origin_of(self.tensors[k]) for k in self.edges}
        self.reads = {*rule.reads(bound)}
        changed = next(iter(bound)) if rule.inplace(func) else None
        self.values = {
            k: v.detach().clone() if k == changed and k in self.reads else v.detach() for k, v in self.tensors.items()
        }

    def store(self, out: Tensor) -> None:
        """Leave the call at the node of its output."""
        origin = combined(list(self.origins.values()), list(self.tensors.values()))
        operands = self._operands(out)
        if self.rule.expands and operands and _repeated(self.tensors[operands[0]], out):
            origin = None  # a copy per sample: from here on it is data
        mark_at(cast("Node", out.grad_fn)).origin = origin
        mark_at(cast("Node", out.grad_fn)).copies = self.rule.expands
        owner = _owner(out) if self.rule.slots else out
        mark = mark_at(cast("Node", owner.grad_fn))
        couples = self.rule.couples(self.bound)
        if mark.use is not None or not (operands or couples):
            return
        keep = {k: v for k, v in self.values.items() if k in self.reads or k in operands}
        mark.use = Use(
            function=self.func,
            rule=self.rule,
            arguments={k: keep.get(k) if k in self.tensors else v for k, v in self.bound.items()},
            operands={k: self._operand(k) for k in operands},
            inputs={k: e for k, e in self.edges.items() if k not in operands},
            shape=out.shape,
            output_nr=owner.output_nr,
            versions={k: v._version for k, v in keep.items() if k not in operands},
            couples=couples,
        )

    def _operands(self, out: Tensor) -> list[str]:
        """The arguments that are parameters of this call; the others are data."""
        if self.rule.slots:
            return [k for k in self.edges if self.rule.holds(k)]
        pure = [k for k in self.edges if self.origins[k] == PURE]
        tentative = (k for k in self.edges if self.origins[k] == TENTATIVE)
        return pure or [k for k in tentative if self.rule.accepts(k, self.tensors[k], out)]

    def _operand(self, name: str) -> Operand:
        tensor = self.tensors[name]
        return Operand(tensor if tensor.grad_fn is None else self.values[name], self.edges[name])


def _owner(out: Tensor) -> Tensor:
    """The tensor whose node survives in-place changes: an op's result may be a view of what it computed."""
    base = out._base
    return base if base is not None and base.grad_fn is not None and base.numel() == out.numel() else out


def _repeated(tensor: Tensor, out: Tensor) -> bool:
    """Whether broadcasting repeats ``tensor`` along the leading axis of ``out``."""
    return tensor.ndim < out.ndim or (tensor.ndim > 0 and tensor.shape[0] == 1 != out.shape[0])


def mark_output(module: nn.Module, args: Any, output: Any) -> None:
    """Remember at the node of a module's output that it is one."""
    if isinstance(output, Tensor) and output.grad_fn is not None and not disabled():
        mark_at(output.grad_fn).outputs[module] = output.output_nr, like(output)


def require_output(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module given as ``output=``."""
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            f"`output=` needs a module that returns one tensor, found `{type(module).__name__}` that returns "
            f"`{type(output).__name__}`; pass the tensor itself."
        )
    mark_output(module, args, output)


def disabled() -> bool:
    """Whether recording is switched off by `disable`."""
    return getattr(_local, "disabled", False)


@contextmanager
def disable() -> Iterator[None]:
    """Context manager in which nothing is recorded, extended modules included.

    Example:
        >>> import torch
        >>> from lightning_curv import disable, extend
        >>> model = extend(torch.nn.Linear(3, 2))
        >>> with disable():
        ...     output = model(torch.ones(4, 3))
    """
    before, _local.disabled = disabled(), True
    try:
        yield
    finally:
        _local.disabled = before

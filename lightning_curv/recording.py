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
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import LOSSES, PARTS
from lightning_curv.rules import RULES, Rule, bind, fallback
from lightning_curv.rules.joined import joined

KEY = "lightning_curv"
PURE, TENTATIVE = "pure", "tentative"  # computed from parameters alone / from parameters and tensors without gradient
TRANSPARENT = {F.multi_head_attention_forward}  # Python functions whose inner calls are recorded instead
JOINS = {torch.cat, torch.concat, torch.concatenate, torch.stack}

Module = TypeVar("Module", bound=nn.Module)
_local = threading.local()


@dataclass
class Operand:
    """A parameter, or a tensor computed from parameters, as an argument of a recorded op."""

    tensor: Tensor  # detached where it is derived
    edge: GradientEdge

    @property
    def derived(self) -> bool:
        """Whether the tensor was computed from parameters instead of being one."""
        return not self.tensor.requires_grad


@dataclass
class Use:
    """One call of an op with parameters among its arguments."""

    function: Callable[..., Any]
    rule: Rule
    arguments: dict[str, Any]  # by name; tensors detached, operands included
    operands: dict[str, Operand]  # by argument name
    inputs: dict[str, GradientEdge]  # of the other differentiable arguments
    shape: torch.Size  # of the output
    output_nr: int = 0
    versions: dict[str, int] = field(default_factory=dict)
    couples: bool = False  # a sample's output depends on other samples

    @property
    def name(self) -> str:
        """The op's name in messages."""
        return str(getattr(self.function, "__name__", self.function)).strip("_")

    def check_versions(self) -> None:
        """Raise if a recorded input was modified in place after the op had read it."""
        for name, version in self.versions.items():
            if self.arguments[name]._version != version:
                raise RuntimeError(
                    f"`{self.name}` needs its argument `{name}` as it was in the forward pass, but it was modified "
                    "by an "
                    f"in-place operation afterwards. Modify a copy instead: `{name}.clone()`."
                )


@dataclass
class LossCall:
    """One call of a known loss function."""

    function: Callable[..., Any]
    arguments: dict[str, Any]  # by name; tensors detached
    input: GradientEdge
    shape: torch.Size  # of the output
    output_nr: int = 0
    beside: bool = False  # the node below is the same call once more, for its other input

    @property
    def name(self) -> str:
        """The loss function's name in messages."""
        return str(getattr(self.function, "__name__", self.function))


@dataclass
class Marks:
    """What recording leaves at an autograd node."""

    use: Use | None = None
    loss: LossCall | None = None
    refusal: str | None = None  # why a call of a known loss function is no `LossCall`
    outputs: dict[nn.Module, tuple[int, Tensor]] = field(default_factory=dict)  # modules that returned the node's value
    origin: str | None = None  # PURE or TENTATIVE: the node's value was computed from parameters
    copies: bool = False  # the node's value repeats a parameter: as data, it is what the repetition made


def marks(node: Node) -> Marks | None:
    """What recording left at ``node``."""
    return cast("Marks | None", cast("dict[str, Any]", node.metadata).get(KEY))


def edge_of(tensor: Tensor) -> GradientEdge:
    """The place in the graph where the gradient of ``tensor`` arrives."""
    if tensor.grad_fn is None:
        return torch.autograd.graph.get_gradient_edge(tensor)
    return GradientEdge(tensor.grad_fn, tensor.output_nr)


@dataclass(frozen=True)
class Output:
    """An output of a network, where the curvature of a loss enters.

    Attributes:
        edge: Where it is in the graph.
        like: A tensor of its shape, type and device.
    """

    edge: GradientEdge
    like: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Output:
        """The output that a tensor is now; what changes the tensor in place later does not matter."""
        if not tensor.requires_grad:
            raise ValueError("`output` must be computed from parameters, found a tensor without a graph.")
        return cls(edge_of(tensor), _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes no memory."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


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
            self._hooks.append(self._output.register_forward_hook(_require_output))
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
        call = _Call(func, rule, rule.bind(args, kwargs))
        out = func(*args, **kwargs)
        if rule.outputs and isinstance(out, tuple) and any(rule.holds(k) for k in call.edges):
            whole, out = joined(out, rule.outputs(call.bound))
            call.store(whole)
        elif isinstance(out, Tensor) and out.grad_fn is not None:
            call.store(out)
        return out


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
        _mark(out.grad_fn).refusal = f"`{func.__name__}` whose `{unknown[0]}` requires gradients; detach it"
        return out
    detached = tree_map_only(Tensor, Tensor.detach, arguments)
    for i, name in enumerate(differentiable):
        out = out.view_as(out) if i else out
        mark, part = _mark(out.grad_fn), PARTS[func, name]
        own = {**detached, name: detached["input"], "input": detached[name]}
        mark.loss = mark.loss or LossCall(part, own, edge_of(arguments[name]), out.shape, out.output_nr, i > 0)
    return out


def _record_unknown(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> None:
    """An op without a rule: note what its outputs come from; parameters among its arguments need the fallback."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    origins = [_origin(t) for t in tensors if t.requires_grad]
    if func in JOINS and {*origins} != {PURE}:
        origins = [None if _is_copy(t) else _origin(t) for t in tensors if t.requires_grad]
    if not any(origins) or any(o is t for o in outputs for t in tensors):
        return
    origin = _combined(origins, tensors)
    copies = all(_is_copy(t) for t in tensors if t.requires_grad)
    for out in outputs:
        mark = _mark(cast("Node", out.grad_fn))
        mark.origin, mark.copies = mark.origin or origin, copies
    if PURE in origins and len(outputs) == 1 and not copies:
        _Call(func, *fallback.rule_for(func, args, kwargs)).store(outputs[0])


class _Call:
    """The arguments of a call as they are before it runs (in-place ops change values and history)."""

    def __init__(self, func: Callable[..., Any], rule: Rule, bound: dict[str, Any]) -> None:
        self.func, self.rule, self.bound = func, rule, bound
        self.tensors = {k: v for k, v in bound.items() if isinstance(v, Tensor)}
        self.edges = {k: edge_of(v) for k, v in self.tensors.items() if v.requires_grad}
        self.origins = {k: _origin(self.tensors[k]) for k in self.edges}
        self.reads = {*rule.reads(bound)}
        changed = next(iter(bound)) if rule.inplace(func) else None
        self.values = {
            k: v.detach().clone() if k == changed and k in self.reads else v.detach() for k, v in self.tensors.items()
        }

    def store(self, out: Tensor) -> None:
        """Leave the call at the node of its output."""
        origin = _combined(list(self.origins.values()), list(self.tensors.values()))
        operands = self._operands(out)
        if self.rule.expands and operands and _repeated(self.tensors[operands[0]], out):
            origin = None  # a copy per sample: from here on it is data
        _mark(cast("Node", out.grad_fn)).origin = origin
        _mark(cast("Node", out.grad_fn)).copies = self.rule.expands
        owner = _owner(out) if self.rule.slots else out
        mark = _mark(cast("Node", owner.grad_fn))
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


def _is_copy(tensor: Tensor) -> bool:
    found = marks(tensor.grad_fn) if tensor.grad_fn is not None else None
    return found is not None and found.copies


def _mark(node: Node) -> Marks:
    return cast("Marks", cast("dict[str, Any]", node.metadata).setdefault(KEY, Marks()))


def _origin(tensor: Tensor) -> str | None:
    if tensor.grad_fn is None:
        return PURE if isinstance(tensor, nn.Parameter) else None
    found = marks(tensor.grad_fn)
    return found.origin if found else None


def _combined(origins: list[str | None], tensors: list[Tensor]) -> str | None:
    """What a value computed from ``tensors`` comes from; ``origins``: of those that require gradients."""
    if not origins or None in origins:
        return None
    return PURE if all(o == PURE for o in origins) and len(origins) == len(tensors) else TENTATIVE


def extend(module: Module) -> Module:
    """Record every forward pass of ``module``, a model or a loss module; returns the module itself.

    With an extended model and an extended loss module the forward pass may run outside of `curvature`. Nothing is
    wrapped or replaced: two forward hooks enter and leave `record`.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchGrad, curvature, extend
        >>> model, lossfunc = extend(torch.nn.Linear(3, 2)), extend(torch.nn.MSELoss())
        >>> loss = lossfunc(model(torch.ones(4, 3)), torch.zeros(4, 2))
        >>> with curvature(BatchGrad()):
        ...     loss.backward()
        >>> model.weight.grad_batch.shape
        torch.Size([4, 2, 3])
    """
    if _enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    return module


def _stack() -> list[record]:
    if not hasattr(_local, "stack"):
        _local.stack = []
    return cast("list[record]", _local.stack)


def _enter(module: nn.Module, args: Any) -> None:
    mode = record()
    mode.__enter__()
    _stack().append(mode)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if _stack():
        _stack().pop().__exit__(None, None, None)
    _mark_output(module, args, output)


def _mark_output(module: nn.Module, args: Any, output: Any) -> None:
    """Remember at the node of a module's output that it is one."""
    if isinstance(output, Tensor) and output.grad_fn is not None and not disabled():
        _mark(output.grad_fn).outputs[module] = output.output_nr, _like(output)


def _require_output(module: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            f"`output=` needs a module that returns one tensor, found `{type(module).__name__}` that returns "
            f"`{type(output).__name__}`; pass the tensor itself."
        )
    _mark_output(module, args, output)


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

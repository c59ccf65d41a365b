r"""Recording: tag the autograd node of every op that consumes a parameter, and of every loss call.

`record()` watches the calls of torch functions. An op with a trainable parameter among its
arguments (or a tensor computed from parameters: a cast, `.t()`, a slice, a parametrization)
leaves a `Use` in the `metadata` of its output's autograd node; a known loss function leaves a
`LossCall`. Records live and die with the graph: there is no registry, nothing to clear, and a graph
that is never backpropagated costs nothing once it is dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_curv.differentiation.weight_norm import weight_norm
from lightning_curv.errors import UnsupportedError
from lightning_curv.losses import LOSSES
from lightning_curv.recording.calls import (
    has_origin,
    mark_read,
    overwritten,
    passes_on,
    read_data_alone,
    record_call,
    record_loss,
    record_unknown,
    states_of,
)
from lightning_curv.recording.notes import note_roots
from lightning_curv.recording.provenance import tensors_in
from lightning_curv.recording.records import like, mark_at
from lightning_curv.rules import RULES, Rule, bind
from lightning_curv.rules.packed_outputs import pack_outputs


class _OfThread(threading.local):
    """What is switched on in this thread; a default of the class is found faster than none."""

    disabled = False


_local = _OfThread()


class record(TorchFunctionMode):
    """Context manager that records parameter uses and loss calls in the autograd graph.

    Run the forward pass and the loss inside it; `curvature` and `extend` do so for you. It costs a
    few microseconds per torch call and no memory beyond what autograd keeps.

    Args:
        output: A module whose output is to be found again: `curvature` takes it as `output`.

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

    _records = True

    def __init__(self, output: nn.Module | None = None) -> None:
        super().__init__()
        self._output = output
        self._hook: Any = None

    def __enter__(self) -> record:
        """Start recording."""
        if self._output is not None:
            self._hook = self._output.register_forward_hook(require_output)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop recording."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Any:
        """Run `func`, or what is given for it, and record what it consumed."""
        # This runs at every call of a torch function: the usual cases come first.
        kwargs = kwargs or {}
        if not self._records:
            return self._unrecorded(func, args, kwargs)
        run = run or func
        recording = torch.is_grad_enabled() and not _local.disabled
        rule = RULES.get(func)
        if recording and rule is not None:
            return _run_by_rule(func, args, kwargs, run, rule)
        if func in LOSSES:
            out = run(*args, **kwargs)
            return record_loss(func, args, kwargs, out) if recording else out
        if _local.disabled:
            return run(*args, **kwargs)
        if func in self._intercepted:
            return self._intercepted[func](self, func, args, kwargs)
        out = run(*args, **kwargs)
        if isinstance(out, Tensor):
            if out.grad_fn is None:
                note_roots(func, args, kwargs, [out], tensors_in((*args, *kwargs.values())))
            elif rule is not None:  # in place, where gradients are switched off
                mark_read(out, tensors_in((*args, *kwargs.values())))
            elif recording and not passes_on((*args, *kwargs.values()), out):
                record_unknown(func, args, kwargs, out)
        elif rule is not None:
            pass
        elif isinstance(out, (tuple, list, dict)) and type(out) is not torch.Size:
            if free := _without_gradient(out):
                note_roots(func, args, kwargs, free, tensors_in((*args, *kwargs.values())))
            elif recording:
                record_unknown(func, args, kwargs, out)
        elif func is Tensor.__setitem__ and not args[0].requires_grad:
            note_roots(func, args, kwargs, [args[0]], tensors_in(args))
        return out

    def _unrecorded(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call where nothing is recorded at all."""
        return func(*args, **kwargs)

    def _record_nothing(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What this returns is connected to the ops that were recorded."""
        return func(*args, **kwargs)

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
        record_unknown(func, args, kwargs, out)
        return out

    def _record_watched(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Somebody looks at the gradient of a value, and would see that of our passes too."""
        value = args[0]
        if value.grad_fn is not None:
            mark = mark_at(value.grad_fn)
            mark.watched = [*(mark.watched or ()), ref(value)]
        return func(*args, **kwargs)

    _intercepted: Mapping[Callable[..., Any], Callable[..., Any]] = {
        Tensor.register_hook: _record_watched,
        Tensor.retain_grad: _record_watched,
        F.multi_head_attention_forward: _record_inside,
        torch._weight_norm: _record_weight_norm,
        torch.autograd.grad: _record_nothing,
    }


def _run_by_rule(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[..., Any],
    rule: Rule,
) -> Any:
    """The result of a call of an op that has a rule."""
    if not rule.parameters:
        if not kwargs and read_data_alone(args):
            out = run(*args)
            if isinstance(out, Tensor) and out.grad_fn is None:
                note_roots(func, args, kwargs, [out], tensors_in(args))
            return out
        if not has_origin((*args, *kwargs.values())):
            out = run(*args, **kwargs)
            if isinstance(out, Tensor):
                tensors = tensors_in((*args, *kwargs.values()))
                if out.grad_fn is None:
                    note_roots(func, args, kwargs, [out], tensors)
                else:
                    mark_read(out, tensors)
            return out
    # This is `rule.bind`.
    if rule.binds is None:
        arguments = bind(rule.function, args, kwargs)
    else:
        arguments = rule.binds(args, kwargs)
    # Before the call: an op in place changes what its arguments are.
    states = states_of(arguments)
    before = overwritten(rule, arguments) if rule.inplace(func) else None
    out = run(*args, **kwargs)
    if rule.outputs and any(map(rule.holds, states)):
        first = out[0] if isinstance(out, tuple) else out
        arguments["output"] = first.detach(), first._version
        if isinstance(out, tuple):
            whole, out = pack_outputs(out, rule.outputs(arguments))
            record_call(func, rule, arguments, states, whole)
            return out
    if isinstance(out, Tensor):
        if out.grad_fn is None:
            note_roots(func, args, kwargs, [out], tensors_in((*args, *kwargs.values())))
        else:
            record_call(func, rule, arguments, states, out, before)
    return out


def _recording() -> bool:
    return torch.is_grad_enabled() and not _local.disabled


def _without_gradient(out: Any) -> list[Tensor]:
    """The results of a call that returns several, if they are tensors without a graph."""
    if isinstance(out, dict):
        return []
    free = all(isinstance(result, Tensor) and result.grad_fn is None for result in out)
    return list(out) if free else []


def _undispatched(function: FunctionType) -> FunctionType:
    """`function` without the hand-over to a torch function mode that its first lines make."""
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


def mark_output(module: nn.Module, args: Any, output: Any) -> None:
    """Remember at the node of a module's output that it is one."""
    if isinstance(output, Tensor) and output.grad_fn is not None and not disabled():
        mark = mark_at(output.grad_fn)
        others = mark.outputs or {}
        mark.outputs = {**others, module: (output.output_nr, like(output))}


def require_output(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module given as `output=`."""
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            f"`output=` needs a module that returns one tensor, found `{type(module).__name__}` "
            f"that returns `{type(output).__name__}`; pass the tensor itself."
        )
    mark_output(module, args, output)


def disabled() -> bool:
    """Whether recording is switched off by `disable`."""
    return _local.disabled


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

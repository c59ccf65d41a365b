"""The table of rules and the decorator that fills it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_curv.terms.term import Term

RULES: dict[Callable[..., Any], Rule] = {}


@dataclass(frozen=True)
class Call:
    """What a rule sees of a recorded call besides its arguments.

    Example:
        >>> import torch
        >>> call = Call(shape=torch.Size([3, 4, 2]), operands=("weight",), axis=1)
        >>> call.rows(torch.zeros(3, 4, 5)).shape  # four samples with three positions each
        torch.Size([4, 3, 5])

    Attributes:
        shape: The output's shape as recorded.
        operands: Names of the arguments that are parameters (or computed from parameters).
        axis: The axis of the output that carries the samples.
        lead: How many leading axes of the output make up its rows together; more than one where
            every position of a sequence has a sample of its own.
        chosen: The rows that are asked for, `[R]`; `None`: all. A rule may return terms of
            these alone.
    """

    shape: torch.Size
    operands: tuple[str, ...]
    axis: int = 0
    lead: int = 1
    chosen: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """Move the sample axis of a tensor to the front.

        Args:
            tensor: A tensor whose leading axes are those of the output.

        Returns:
            The tensor as `[N, *]`, a view.
        """
        if self.lead > 1:
            return tensor.flatten(0, self.lead - 1)
        if self.axis:
            return tensor.movedim(self.axis, 0)
        return tensor


def repeated(tensor: Tensor, out: Tensor) -> bool:
    """Whether broadcasting repeats `tensor` along the leading axis of `out`."""
    if tensor.ndim < out.ndim:  # broadcasting adds leading axes
        return True
    return tensor.ndim > 0 and tensor.shape[0] == 1 != out.shape[0]


def first_axis(call: Call, arguments: dict[str, Any]) -> Iterable[int]:
    """Axes that may carry samples: only the first, as in a convolution."""
    return (0,)


def leading_axes(features: int) -> Callable[[Call, dict[str, Any]], Iterable[int]]:
    """Axes that may carry samples: all but the last `features`."""
    return lambda call, arguments: range(len(call.shape) - features)


# What the fields of a rule were called in version 0.1.0.
RENAMED = {
    "slots": "parameters",
    "reads": "needs_values",
    "expands": "broadcasts",
    "couples": "mixes_samples",
    "accepts": "is_parameter",
    "bulky": "defers",
}


@dataclass(frozen=True)
class Rule:
    """How one op contributes to the per-sample Jacobians of its parameters.

    Example:
        >>> import torch
        >>> linear = RULES[torch.nn.functional.linear]
        >>> linear.bind((torch.zeros(4, 3), torch.zeros(2, 3)), {}).keys()
        dict_keys(['input', 'weight', 'bias'])
        >>> linear.holds("weight"), linear.holds("input")
        (True, False)

    Attributes:
        function: `function(call, g, **arguments)` returns the `Term` of each parameter argument
            by name.
        parameters: Names of the arguments that hold parameters; empty: any argument may (`x + p`,
            `p + x`). `params` covers `params0`, `params1` too.
        axes: `axes(call, arguments)` gives the axes of the output that may carry samples.
        keeps: `keeps(call, arguments)` gives the axes of the output, those with entries of the
            parameter included, whose entry n reads entry n of the data and no other one.
        needs_values: `needs_values(arguments)` gives the names of the tensors whose values the
            terms need.
        broadcasts: Whether the op does nothing but repeat its argument (`expand`).
        mixes_samples: `mixes_samples(arguments)` says whether a sample's output depends on other
            samples; `None`: never.
        is_parameter: For ops that name no parameters: whether a tensor that was computed from
            parameters and constants is a parameter of this call (name, tensor, output) or data.
        binds: `binds(args, kwargs)` gives the arguments of a call by name; by default those of
            `function`.
        outputs: For ops that return a tuple: `outputs(arguments)` gives the axis of every output
            that carries the samples. The rule gets the cotangents of all outputs as the rows of one
            tensor, `[V, N, K]`. `None`: ragged rows, see
            `lightning_curv.rules.packed_outputs.rows`.
        groups: For ops whose output has several rows of every sample, not the same number of all:
            `groups(arguments)` gives the index of the term's sample n that every row belongs to,
            `[R]`; `None`: not so in this call. The rule then gets the cotangents of the rows,
            `[V, R, K]`, in the order of the output, and returns terms of N samples.
        affine: Whether the op is affine in each of its parameters.
        defers: Whether the terms take more memory than the arguments: in the user's backward pass
            they are then made when that of the op is through and has freed what it saved.
    """

    function: Callable[..., dict[str, Term]]
    parameters: Collection[str] = ()
    axes: Callable[[Call, dict[str, Any]], Iterable[int]] = first_axis
    keeps: Callable[[Call, dict[str, Any]], Iterable[int]] = lambda call, arguments: ()
    needs_values: Callable[[dict[str, Any]], Collection[str]] = dict.keys
    broadcasts: bool = False
    mixes_samples: Callable[[dict[str, Any]], bool] | None = None
    is_parameter: Callable[[str, Tensor, Tensor], bool] = lambda name, tensor, out: False
    binds: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]] | None = None
    outputs: Callable[[dict[str, Any]], Sequence[int | None] | None] | None = None
    groups: Callable[[dict[str, Any]], Tensor | None] | None = None
    affine: bool = True
    defers: bool = False

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the arguments of a call the names that the rule knows them by.

        Args:
            args: The positional arguments of the call.
            kwargs: Its arguments by name.

        Returns:
            All arguments by name, defaults included.
        """
        return self.binds(args, kwargs) if self.binds else bind(self.function, args, kwargs)

    def holds(self, name: str) -> bool:
        """Tell whether an argument is one of the parameters.

        Args:
            name: The name of the argument, with its number where the op takes several.

        Returns:
            Whether the argument holds a parameter.
        """
        parameters = self.parameters
        # `name` ends in a letter as a rule, and there is nothing to be left out.
        return name in parameters or (
            not name[-1:].isalpha() and name.rstrip("0123456789") in parameters
        )

    @staticmethod
    @cache
    def inplace(function: Callable[..., Any]) -> bool:
        """Whether `function` overwrites its first argument."""
        name = getattr(function, "__name__", "")
        # `add_`, but not `__add__`; and `__iadd__`.
        method = name.endswith("_") and not name.endswith("__")
        operator = name.startswith("__i")
        return method or operator


def rule(
    *functions: Callable[..., Any],
    **attributes: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the rule of `functions`.

    The decorated function takes a `Call`, the cotangent `g` of shape `[V, N, *]` (output with
    the sample axis moved to the front, behind the axis of backpropagated columns) and then the
    arguments of the op by their names; it returns a dict from the names of the parameter arguments
    to their `Term`.

    Args:
        functions: The torch functions as a `TorchFunctionMode` sees them, for example `F.linear`.
        attributes: The other fields of `Rule`.

    Returns:
        The decorator, which returns the function that it is given.

    Example:
        A layer `scale(x, w) = x * w` written as one function of its own:

        >>> import torch
        >>> from torch.overrides import handle_torch_function, has_torch_function
        >>> from lightning_curv import SumGradSquared, curvature, rule
        >>> from lightning_curv.terms.term import Term
        >>> def scale(x, w):
        ...     if has_torch_function((x, w)):
        ...         return handle_torch_function(scale, (x, w), x, w)
        ...     return x * w
        >>> @rule(scale, parameters=("w",))
        ... def _(call, g, x, w):
        ...     return {"w": Term("d", "d", "d", g, x)}
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> with curvature(SumGradSquared()):
        ...     scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), w).sum().backward()
        >>> w.sum_grad_squared
        tensor([10., 20.])
    """
    for old, new in RENAMED.items():
        if old in attributes:
            warnings.warn(
                f"`{old}` of a rule is called `{new}` since version 0.2; the old name ends in 0.3.",
                DeprecationWarning,
                stacklevel=2,
            )
            attributes[new] = attributes.pop(old)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(functions, Rule(function, **attributes)))
        return function

    return register


@cache
def _names(function: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the arguments of a rule's op, and their defaults."""
    names = []
    defaults = {}
    for parameter in signature(function).parameters.values():
        filled_in = parameter.name in ("call", "g", "scale")  # by the engine
        if filled_in or parameter.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL):
            continue
        names.append(parameter.name)
        if parameter.default is not Parameter.empty:
            defaults[parameter.name] = parameter.default
    return tuple(names), defaults


def bind(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Give the arguments of a call the names that its rule knows them by.

    Args:
        function: The function of the rule.
        args: The positional arguments of the call.
        kwargs: Its arguments by name.

    Returns:
        All arguments by name: those that were given, then the defaults of the others.

    Example:
        >>> def scale(call, g, x, factor=2.0):
        ...     "A rule."
        >>> bind(scale, (1.0,), {})
        {'x': 1.0, 'factor': 2.0}
    """
    names, defaults = _names(function)
    given = dict(zip(names, args, strict=False))
    if kwargs:
        given.update(kwargs)
    if len(given) < len(names):
        for name, default in defaults.items():
            given.setdefault(name, default)
    return given

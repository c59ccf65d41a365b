"""What the quantities are by definition, in plain autograd: the library is not used here.

Per-sample gradients are N backward passes, of each sample as a batch of its own. The columns of the
GGN are those of the square root of the loss' Hessian, one backward pass each: at the inputs of
known loss functions, and of all other summands at the outputs of the last modules with parameters.
Products with the Hessian are double backward passes, or central differences of gradients where
torch has no second derivative. Attention is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from zoo.network import Problem

LOSSES = (
    F.cross_entropy,
    F.mse_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.soft_margin_loss,
    F.poisson_nll_loss,
)
MOST_COLUMNS = 1500  # more entries of the loss' input than this are not taken apart


def largest(tensor: Tensor) -> float:
    """The largest absolute value; 0 if there is none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


class NoReferenceError(Exception):
    """Plain autograd does not tell what is right."""


class _LossCalls(TorchFunctionMode):
    """The inputs and outputs of all loss functions that are called.

    Attributes:
        found: both, of those whose input depends on parameters.
        constant: numbers of calls that are taken for constants.
    """

    def __init__(self, constant: Sequence[int] = ()) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        self.constant = constant

    def __torch_function__(
        self,
        func: Callable,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in LOSSES:
            input = args[0] if args else kwargs.pop("input")
            if input.requires_grad:
                kept = len(self.found) not in self.constant
                # On a view of its own nothing but this call depends.
                input = input.view_as(input) if kept else input.detach()
                output = func(input, *args[1:], **kwargs)
                self.found.append((input, output))
                return output
            args = (input, *args[1:])
        if func is torch.sparse_coo_tensor and args[1].requires_grad:
            return _scattered(*args)
        if func is torch._weight_norm:
            return _normed(*args)
        return func(*args, **kwargs)


def _normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Weight norm, written out: the second derivative of torch's op is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _scattered(places: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    """A sparse tensor as a dense one: torch's own gradient by its values leaves no graph."""
    zeros = values.new_zeros(*size)
    return zeros.index_put(tuple(places.long()), values, accumulate=True)


class _Outputs:
    """The outputs of all modules with parameters of their own."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            module for module in model.modules() if [*module.parameters(recurse=False)]
        ]
        self.found: dict[Any, Tensor] = {}  # by their nodes

    def __enter__(self) -> _Outputs:
        self._handles = [module.register_forward_hook(self._marked) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _marked(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return output
        output = output.view_as(output)
        self.found[output.grad_fn] = output
        return output

    def above(self, loss: Tensor) -> list[Tensor]:
        """Those that the loss depends on by no other one of them.

        Raises:
            NoReferenceError: It depends on parameters around them, or on one by another one too.
        """
        first = self._first(loss.grad_fn)
        for output in first:
            below = {node for node, _ in output.grad_fn.next_functions if node is not None}
            if any(other in self._below(below) for other in (t.grad_fn for t in first)):
                raise NoReferenceError("an output of the network depends on another one")
        return first

    def _first(self, root: Any) -> list[Tensor]:
        stack, seen, first = [root], set(), []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self.found:
                first.append(self.found[node])
            elif isinstance(getattr(node, "variable", None), nn.Parameter):
                raise NoReferenceError("a parameter enters the loss by no module")
            else:
                stack += [after for after, _ in node.next_functions]
        return first

    @staticmethod
    def _below(nodes: set[Any]) -> set[Any]:
        seen, stack = set(), [*nodes]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [after for after, _ in node.next_functions]
        return seen


class Reference:
    """The quantities of a problem; each is computed when it is asked for.

    Attributes:
        problem: the network, its batch and its loss.
        parameters: those that the loss depends on, by name.
        tolerance: how much may be off, of the largest entry.
        hidden: names of those whose gradients appear only when a backward pass is run, inside of
            some op.
        chosen: names of some of them, for products.
    """

    def __init__(self, problem: Problem, products: int = 6) -> None:
        self.problem = problem
        single = any(p.dtype == torch.float32 for p in problem.parameters.values())
        self.tolerance = (
            3e-3 if single else 1e-5
        )  # networks in float64 compute in float32 here and there
        loss, self._calls, self._outputs = self._forward()
        self._loss = loss
        whole = torch.autograd.grad(
            loss, list(problem.parameters.values()), retain_graph=True, allow_unused=True
        )
        self.gradient = {name: g for name, g in zip(problem.parameters, whole) if g is not None}
        for name, g in self.gradient.items():
            if not g.isfinite().all():
                raise NoReferenceError(f"the gradient of {name} is not finite")
        self.parameters = {name: problem.parameters[name] for name in self.gradient}
        self.hidden = self._hidden()
        self._largest = max(map(largest, self.gradient.values()))
        names = list(self.parameters)
        self.chosen = (
            [names[i * len(names) // products] for i in range(products)]
            if len(names) > products
            else names
        )

    def _forward(
        self, constant: Sequence[int] = ()
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], _Outputs]:
        """The loss, its calls of loss functions, some of which are constants, and outputs of modules."""
        with (
            sdpa_kernel(SDPBackend.MATH),
            _LossCalls(constant) as calls,
            _Outputs(self.problem.model) as outputs,
        ):
            return self.problem(), calls.found, outputs

    def _hidden(self) -> list[str]:
        """Names of parameters that some op runs a backward pass of its own for."""
        self._loss.backward(retain_graph=True)
        hidden = [
            name
            for name, p in self.problem.parameters.items()
            if p.grad is not None and name not in self.gradient
        ]
        self.problem.model.zero_grad(set_to_none=True)
        return hidden

    def _derivative(
        self, output: Tensor | Sequence[Tensor], cotangent: Any = None, batched: bool = False
    ) -> Any:
        """Gradients by all parameters, in their order."""
        gradients = torch.autograd.grad(
            output,
            list(self.parameters.values()),
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
            materialize_grads=not batched,
        )
        rows = [len(cotangent[0])] if batched else []
        return [
            p.new_zeros(*rows, *p.shape) if g is None else g.detach()
            for p, g in zip(self.parameters.values(), gradients)
        ]

    def vector(self, name: str) -> Tensor:
        """A random vector to multiply with."""
        shape = self.parameters[name].shape
        vector = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return vector.to(self.parameters[name].dtype)

    @cached_property
    def grad_batch(self) -> dict[str, Tensor]:
        """Gradients of the samples' shares of the loss, ``[N, *p]``."""
        with sdpa_kernel(SDPBackend.MATH):
            losses = [self.problem.sample(n) for n in range(self.problem.samples)]
        shares = self._shares([float(loss) for loss in losses])
        rows = [self._derivative(loss) for loss in losses]
        gradients = {
            name: torch.stack([share * g for share, g in zip(shares, row)])
            for name, row in zip(self.parameters, zip(*rows))
        }
        for name, g in gradients.items():
            if largest(g.sum(0) - self.gradient[name]) > self.tolerance * self._largest:
                raise NoReferenceError(
                    f"gradients of samples on their own do not add up to the gradient of {name}"
                )
        return gradients

    def _shares(self, losses: list[float]) -> list[float]:
        """What every sample's loss weighs in the loss of the batch."""
        count = len(losses)
        candidates = [
            [c / max(sum(counts), 1) for c in counts]
            for counts in [[1] * count, *self.problem.counts]
        ]
        for shares in [*candidates, [1.0] * count]:
            total = sum(share * loss for share, loss in zip(shares, losses) if share)
            if abs(total - float(self._loss)) < 0.1 * self.tolerance * max(1, abs(total)):
                return shares
        raise NoReferenceError(
            f"losses of samples on their own do not make up the loss: {losses}, {float(self._loss)}"
        )

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """Columns of the square root of the GGN, ``[V, *p]``."""
        parts = self._parts
        entries = sum(z.numel() for _, inputs in parts for z in inputs)
        if entries > MOST_COLUMNS:
            raise NoReferenceError(f"{entries} entries at the loss")
        found = [columns for part in parts if (columns := self._columns_of(*part)) is not None]
        if not found:
            raise NoReferenceError("the loss has no curvature to speak of")
        return {name: torch.cat(columns) for name, columns in zip(self.parameters, zip(*found))}

    @property
    def _parts(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Functions that add up to the loss, and what each is a function of.

        Calls of known loss functions that enter the loss linearly are one, all else is another one.
        """
        if self.curvature_defined:
            return [(self._loss, [input for input, _ in self._calls])]
        linear = [i for i, (_, output) in enumerate(self._calls) if self._is_summand(output)]
        rest, _, outputs = self._forward(constant=linear)
        return [
            (self._loss, [self._calls[i][0] for i in linear]),
            (rest, outputs.above(rest)),
        ]

    def _is_summand(self, output: Tensor) -> bool:
        """Whether the derivative of the loss by the output of a loss function is a constant."""
        (weight,) = torch.autograd.grad(
            self._loss, output, retain_graph=True, create_graph=True, materialize_grads=True
        )
        return not weight.requires_grad

    def _columns_of(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor] | None:
        """The columns of a function of some inputs, by parameter; `None`: it has no curvature."""
        if not inputs:
            return None
        sizes = [z.numel() for z in inputs]
        by_inputs = partial(self._by_inputs, inputs=inputs)
        gradient = torch.cat([g.flatten() for g in by_inputs(loss, create_graph=True)])
        if not gradient.requires_grad:
            return None
        hessian = torch.stack(
            [torch.cat([h.flatten() for h in by_inputs(entry)]) for entry in gradient]
        )
        values, vectors = torch.linalg.eigh((hessian + hessian.T) / 2)
        if values.abs().max() < 1e-12:
            return None
        kept = values > self.tolerance**2 * values.abs().max()
        root = (vectors * values.clamp(min=0).sqrt()).T[kept]
        cotangents = [g.unflatten(1, z.shape) for g, z in zip(root.split(sizes, 1), inputs)]
        try:
            return self._derivative(inputs, cotangents, batched=True)
        except RuntimeError:
            rows = [self._derivative(inputs, [g[v] for g in cotangents]) for v in range(len(root))]
            return [torch.stack(row) for row in zip(*rows)]

    @staticmethod
    def _by_inputs(
        output: Tensor, inputs: list[Tensor], create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output,
            inputs,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    @cached_property
    def curvature_defined(self) -> bool:
        """Whether all of the loss' dependence on the parameters goes through inputs of known loss functions."""
        inputs = [input for input, _ in self._calls]
        if not inputs:
            return False
        through = self._derivative(inputs, self._by_inputs(self._loss, inputs))
        distances = [largest(g - self.gradient[name]) for name, g in zip(self.parameters, through)]
        return max(distances) < self.tolerance * self._largest

    @cached_property
    def diag_ggn(self) -> dict[str, Tensor]:
        """Diagonal of the GGN."""
        return {name: columns.square().sum(0) for name, columns in self.columns.items()}

    @cached_property
    def ggnmp(self) -> dict[str, Tensor]:
        """Blocks of the GGN times vectors."""
        flat = {
            name: self.columns[name].reshape(len(self.columns[name]), -1) for name in self.chosen
        }
        return {
            name: (g.T @ (g @ self.vector(name).flatten())).view(self.columns[name].shape[1:])
            for name, g in flat.items()
        }

    @cached_property
    def hmp(self) -> dict[str, Tensor]:
        """Blocks of the Hessian times vectors."""
        parameters = [self.parameters[name] for name in self.chosen]
        try:
            gradients = torch.autograd.grad(self._loss, parameters, create_graph=True)
            return {
                name: torch.autograd.grad(
                    g, p, self.vector(name), retain_graph=True, materialize_grads=True
                )[0].detach()
                if g.requires_grad
                else self._lost(name)
                for name, p, g in zip(self.chosen, parameters, gradients)
            }
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            return {name: self._extrapolated(name) for name in self.chosen}

    def _lost(self, name: str) -> Tensor:
        """Where a gradient has no graph: it depends on nothing, or an op of torch has lost it."""
        if largest(self._difference(name, 1e-5)) < self.tolerance * self._largest:
            return torch.zeros_like(self.parameters[name])
        return self._extrapolated(name)

    def _extrapolated(self, name: str) -> Tensor:
        """Central differences of two gradients, extrapolated from two steps.

        Raises:
            NoReferenceError: Other steps say otherwise, as where a part of the loss is computed in
                float32, whose rounding errors are divided by the step.
        """
        fine, coarse = (
            (4 * self._difference(name, step) - self._difference(name, 2 * step)) / 3
            for step in (1e-5, 4e-5)
        )
        if largest(fine - coarse) > self.tolerance * largest(fine):
            raise NoReferenceError(f"differences of gradients of {name} depend on the step")
        return fine

    def _difference(self, name: str, step: float) -> Tensor:
        """Central difference of two gradients along a vector."""
        parameter, vector = self.parameters[name], self.vector(name)
        kept, sides = parameter.detach().clone(), []
        try:
            for sign in (1, -1):
                parameter.data.copy_(kept + sign * step * vector)
                sides.append(torch.autograd.grad(self._forward()[0], parameter)[0])
        finally:
            parameter.data.copy_(kept)
        return (sides[0] - sides[1]) / (2 * step)

"""`curvature(...)`: the context in which `loss.backward()` gives more than the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curv.distributed.failures import told
from lightning_curv.engine.backprop import Backprop, reads_root_alone
from lightning_curv.engine.extension_hook import ExtensionHook
from lightning_curv.errors import UnsupportedError
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.recording.record import disabled, record
from lightning_curv.recording.records import Output
from lightning_curv.samples.batch import Batch


class curvature(record):
    r"""Context manager in which `loss.backward()` also computes `extensions`.

    The results are attributes of the parameters, named by each extension's `savefield`; every
    backward pass overwrites them. The forward pass runs inside the context, or before it inside
    `record` or with modules given to `extend`.

    Args:
        extensions: What to compute, for example `Variance(), KFAC()`.
        generator: Draws the targets of Monte-Carlo quantities; default: one of our own that follows
            `torch.manual_seed` and never touches the global random state.
        batch_size: Number of samples N; by default the leading axis of what the network reads
            first. The graph verifies it: the rows of different samples must not meet.
        check: Compare the sum of the per-sample gradients with the gradient of every parameter, and
            verify that samples do not influence each other; costs one more backward pass.
        output: Where the network ends and the loss begins, instead of where the last parameters
            enter (see below): a module that is called once inside the context (earlier: inside
            `record(output=module)`, or extended), or a tensor; its leading axis holds the
            samples. All that follows is differentiated at this output, known loss functions too,
            and its second derivatives must not mix samples. Known loss functions that do not depend
            on the output add their own curvature. Inside Lightning a submodule's name is turned
            into the module by `pl_module.get_submodule(name)`.
        extension_hook: A function that is called during the backward pass as soon as a parameter
            has all its quantities and its `.grad`: it may reduce them and delete them from the
            parameter, so that they are never in memory all at once. Parameters of modules given to
            `extend` come with their module, `extension_hook(module)`, once for every module that
            holds parameters itself, when all of `module.parameters(recurse=False)` that the loss
            reaches are there (a parameter of several modules comes with the first of them); all
            other parameters come alone, `extension_hook(parameter)`. Parameters left out of
            `backward(inputs=)` come after the pass. An error in the function ends the pass.

    **The curvature of the loss.** Summands that are known loss functions of torch, times factors,
    have the curvature of their likelihood. All else (nonlinear functions of known losses too) is a
    function of the network's outputs: the results of the last ops with parameters, above which
    there are none. Its Hessian $H_n$ by these outputs, several together where a summand
    depends on several, is found by differentiation for every sample, and the GGN is
    $\sum_n J_n^\top H_n^+ J_n$ with the positive part $H_n^+$ (negative eigenvalues are
    set to zero): for a loss that is convex in the outputs the usual one, for a piecewise linear
    loss (quantile, hinge) zero. Hessian quantities take $H_n$ as it is. Monte-Carlo
    quantities draw $\sqrt{H_n^+} \varepsilon$ with standard normal ε. Products, Kronecker
    factors and their kind take a loss that mixes samples as one function of the batch.
    Cost: at most one differentiation of the loss, not of the network, per output entry of a sample;
        fewer where the
    entries fall into separate blocks (pixels, tokens).

    The backward pass is `loss.backward()`, or `torch.autograd.backward(loss)` in versions of
    torch that hand it to function modes (2.13 does, 2.6 does not); `torch.autograd.grad` computes
    no extensions. After `loss.backward(create_graph=True)` first-order quantities are as
    differentiable as `.grad`, for penalties on the variance of the gradient and the like; each
    per-sample gradient is then a pass of its own through its op, and time and memory grow with N².
    All other quantities, and extensions that are not `Differentiable`, are constants.

    Raises:
        UnsupportedError: In `backward`: a parameter, an op or the loss is not covered (a loss
            that is differentiated has no second derivative, or mixes samples where they must be
            apart); the message says what to do.
        RuntimeError: In `backward`: a recorded input was modified in place, or the check failed.

    Example:
        >>> import torch
        >>> from lightning_curv import BatchGrad, BatchL2Grad, DiagGGNExact, curvature
        >>> layer = torch.nn.Linear(2, 3)
        >>> with curvature(BatchL2Grad(), DiagGGNExact()):
        ...     output = layer(torch.ones(5, 2))
        ...     loss = torch.nn.functional.cross_entropy(output, torch.tensor([0, 1, 2, 0, 1]))
        ...     loss.backward()
        >>> layer.weight.batch_l2.shape, layer.weight.diag_ggn_exact.shape
        (torch.Size([5]), torch.Size([3, 2]))

        Per-sample gradients of one parameter at a time:

        >>> norms = []
        >>> def norm(parameter):
        ...     norms.append(parameter.grad_batch.flatten(1).norm(dim=1))
        ...     del parameter.grad_batch
        >>> with curvature(BatchGrad(), extension_hook=norm):
        ...     layer(torch.ones(5, 2)).sum().backward()
        >>> [tuple(found.shape) for found in norms], hasattr(layer.weight, "grad_batch")
        ([(5,), (5,)], False)
    """

    def __init__(
        self,
        *extensions: Extension | GraphExtension,
        generator: torch.Generator | None = None,
        batch_size: int | Batch | None = None,
        check: bool = False,
        output: nn.Module | Tensor | None = None,
        extension_hook: ExtensionHook | None = None,
    ) -> None:
        super().__init__(output if isinstance(output, nn.Module) else None)
        for extension in extensions:
            if not isinstance(extension, (Extension, GraphExtension)):
                raise TypeError(
                    f"`curvature` expects extensions, found {extension!r}; pass instances, for "
                    "example `Variance()`."
                )
        if not isinstance(output, (nn.Module, Tensor, type(None))):
            raise TypeError(
                f"`output` must be a module or a tensor, found {output!r}; a name is turned into a "
                "module by `model.get_submodule(name)`."
            )
        if isinstance(batch_size, int) and batch_size < 0:
            raise ValueError(
                f"Expected `batch_size` >= 0, found {batch_size}; leave it out to have it found."
            )
        if not (extension_hook is None or callable(extension_hook)):
            raise TypeError(
                "`extension_hook` must be a function of a module or parameter that has its "
                f"quantities, found {extension_hook!r}."
            )
        self.extensions = extensions
        # What is recorded costs a few microseconds per call, and would be read by nobody.
        self._records = bool(
            output is not None or extension_hook or check or not reads_root_alone(extensions)
        )
        self._options: dict[str, Any] = {
            "generator": generator,
            "batch_size": batch_size,
            "check": check,
            "output": Output.of(output) if isinstance(output, Tensor) else output,
            "hook": extension_hook,
        }

    def _unrecorded(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if func in _BACKWARD and not disabled():
            return self._compute(func, args, kwargs)
        return func(*args, **kwargs)

    def _compute(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Compute the extensions around a backward pass."""
        if not self.extensions:
            return func(*args, **kwargs)
        loss, kwargs = _BACKWARD[func](*args, **kwargs)
        gradient = kwargs.get("gradient")
        create_graph = bool(kwargs.get("create_graph"))
        backprop = Backprop(
            loss,
            self.extensions,
            gradient=gradient,
            create_graph=create_graph,
            **self._options,
        )
        if True in [extension.keeps_graph for extension in self.extensions]:
            kwargs["retain_graph"] = True
        try:
            backprop.before()
            backprop.run(**kwargs)
            backprop.after()
        except BaseException as error:
            backprop.abort()
            told(error)
            raise

    _intercepted: Mapping[Any, Callable[..., Any]] = {
        **record._intercepted,
        Tensor.backward: _compute,
        torch.autograd.backward: _compute,
    }


def _of_tensor(
    loss: Tensor,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss and the arguments of `Tensor.backward` by name."""
    return loss, {
        **dict(
            zip(("gradient", "retain_graph", "create_graph", "inputs"), arguments, strict=False)
        ),
        **named,
    }


def _of_tensors(
    tensors: Any,
    grad_tensors: Any = None,
    *arguments: Any,
    **named: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """The same for `torch.autograd.backward`."""
    losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if len(losses) != 1 or not isinstance(losses[0], Tensor):
        raise UnsupportedError(
            f"`curvature` expects one loss in `torch.autograd.backward`, found {len(losses)}; call "
            "it on their sum."
        )
    if isinstance(grad_tensors, (tuple, list)):
        gradient = grad_tensors[0]
    else:
        gradient = grad_tensors
    return _of_tensor(losses[0], gradient, *arguments, **named)


_BACKWARD: dict[Callable[..., Any], Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    Tensor.backward: _of_tensor,
    torch.autograd.backward: _of_tensors,
}

"""What is not covered is refused, with the parameter, the op and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_curv.errors import UnsupportedError, describe
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.graph import Tape
from lightning_curv.losses import PARTS


def refuse_uncovered(tape: Tape, extensions: Sequence[Extension | GraphExtension]) -> None:
    """Raise `UnsupportedError` if some extension would be wrong on the recorded graph."""
    for name in tape.hidden:
        raise UnsupportedError(
            f"Every op must be in the graph before the backward pass, found `{name}`, which runs its ops during it. "
            "Use `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
        )
    if tape.stray and not tape.uses and not tape.losses and not tape.mapped:
        parameter, op = tape.stray[0]
        raise UnsupportedError(
            f"Parameter {describe(parameter)} reaches the loss through `{op or 'the root'}`, and no op was recorded. "
            "Run the forward pass inside `curvature(...)` or `record()`, or `extend` the model."
        )
    known_loss = tape.losses and not tape.outside
    for extension in extensions:
        if extension.independent and extension.needs_samples and not extension.batchwise:
            _refuse_coupled(tape, extension)
        if not known_loss and extension.needs_likelihood:
            _refuse_unknown_loss(tape, extension)


def _refuse_coupled(tape: Tape, extension: Extension | GraphExtension) -> None:
    for use in tape.uses.values():
        if use.couples:
            raise UnsupportedError(
                f"{extension} needs samples that do not influence each other, found `{use.name}` with statistics of "
                "the batch. Put the layer into evaluation mode (`.eval()`), or use GroupNorm or LayerNorm."
            )


def _refuse_unknown_loss(tape: Tape, extension: Extension | GraphExtension) -> None:
    known = ", ".join(sorted({function.__name__ for function, _ in PARTS}))
    found = tape.refusals[0] if tape.refusals else f"a loss that is none of {known}"
    around = f"; `{tape.uses[next(iter(tape.outside))].name}` reaches it around the others" if tape.losses else ""
    raise UnsupportedError(
        f"{extension} needs the curvature of the loss function, found {found}{around}. Use one of these, inside "
        "`curvature(...)` or `record()` or as an extended module; or say where the network ends, "
        "`curvature(..., output=...)`, and the Hessian of everything after it is found by differentiation. First-order "
        "quantities work with any loss."
    )

"""What is not covered is refused, with the parameter, the op and the way out."""

from __future__ import annotations

from lightning_curv.distributed.shards import find_shards, is_sharded
from lightning_curv.errors import describe
from lightning_curv.extensions.base import Extension, GraphExtension
from lightning_curv.graph.tape import Tape


def refusal(
    tape: Tape,
    extension: Extension | GraphExtension,
    output: bool = False,
) -> str | None:
    """Say why an extension would be wrong on the recorded graph.

    Args:
        tape: The graph.
        extension: What is to be computed.
        output: Whether the user says where the network ends.

    Returns:
        The message of an `UnsupportedError`; ``None``: nothing speaks against it.
    """
    if reason := _sharded(tape):
        return reason
    for name in tape.hidden:
        return (
            f"Every op must be in the graph before the backward pass, found `{name}`, which runs "
            "its ops during it. Use `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
        )
    if tape.nested:
        return (
            "Quantities need tensors whose samples have one shape, found a nested tensor as the "
            f"value of `{tape.nested[0]}`. Pad it before the network "
            "(`torch.nested.to_padded_tensor`) or pack it (`torch.nn.utils.rnn.pack_sequence`)."
        )
    unrecorded = tape.stray and not tape.uses and not tape.losses and not tape.mapped
    if unrecorded and (extension.needs_samples or extension.needs_likelihood):
        parameter, op = tape.stray[0]
        return (
            f"{extension} needs the ops and the losses of a forward pass, found no record of any: "
            f"parameter {describe(parameter)} reaches the loss through `{op or 'the root'}`, and "
            "no op was recorded. Run the forward pass inside `curvature(...)` or `record()`, or "
            "`extend` the model. Where all of it runs inside of transforms of `torch.func` (`jvp`, "
            "`jacrev`), which leave no record, use `HMP`, which needs none."
        )
    if extension.independent and extension.needs_samples and not extension.batchwise:
        for use in tape.uses.values():
            if use.couples:
                return (
                    f"{extension} needs samples that do not influence each other, found "
                    f"`{use.name}` with statistics of the batch. Put the layer into evaluation "
                    "mode (`.eval()`), or use GroupNorm or LayerNorm."
                )
    if output and tape.outside and extension.needs_likelihood:
        name = tape.uses[next(iter(tape.outside))].name
        return (
            f"{extension} with `output=` needs a loss that depends on the network by this output "
            f"alone, found that `{name}` reaches it around the output. Leave `output=` out: all "
            "outputs are then found."
        )
    return None


def _sharded(tape: Tape) -> str | None:
    """Parameters of which this process has a part only: their results would reach nobody."""
    parameters = tape.all_parameters
    for parameter in parameters:
        if is_sharded(parameter):
            return (
                "Quantities need whole parameters in the forward pass, found a `DTensor` of shape "
                f"{tuple(parameter.shape)}, as tensor parallelism has them. Train the model with "
                "data parallelism (`DistributedDataParallel`)."
            )
    if find_shards(parameters) or any(hasattr(p, "_is_flat_param") for p in parameters):
        return (
            "Quantities need whole parameters, found a model under FSDP, whose parameters are "
            "gathered for the while of a pass alone: results would be left where nobody looks. "
            "Train it with `DistributedDataParallel`."
        )
    return None

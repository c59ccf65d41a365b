"""What is not covered is refused, with the parameter, the op and the way out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_curv.distributed.failures import processes
from lightning_curv.distributed.shards import Shard, is_sharded
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
        The message of an `UnsupportedError`; `None`: nothing speaks against it.
    """
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
            if use.mixes_samples:
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


def sharded_refusal(
    tape: Tape,
    extension: Extension | GraphExtension,
    shards: Mapping[Tensor, Shard],
    stays: bool,
) -> str | None:
    """Say why an extension would be wrong where processes share the parameters among each other.

    Args:
        tape: The graph.
        extension: What is to be computed.
        shards: The parameters under FSDP2.
        stays: Whether results are left on the parameters when the pass is through, without a graph.
    """
    if processes() == 1 and not shards:
        return None
    parameters = tape.all_parameters
    for parameter in parameters:
        if is_sharded(parameter):
            return (
                f"{extension} needs whole parameters in the forward pass, found a `DTensor` of "
                f"shape {tuple(parameter.shape)}, as tensor parallelism has them. Train the model "
                "with data parallelism (`fully_shard`, `DistributedDataParallel`)."
            )
    if any(hasattr(p, "_is_flat_param") for p in parameters):
        return (
            f"{extension} needs parameters that are known one by one, found the flat ones of "
            "`FullyShardedDataParallel`. Shard the model with its successor, `fully_shard`."
        )
    for shard in shards.values():
        if shard.processes != processes():
            return (
                f"{extension} needs all {processes()} processes to share the batch, found a mesh "
                f"of {shard.processes} of them under `fully_shard`. Use a mesh of all processes."
            )
    if shards and (extension.keeps_graph or not stays):
        return (
            f"{extension} needs the parameters of its graph after the pass, or is handed over "
            "during it, found a model under `fully_shard`, which frees them as it goes. Train it "
            "with `DistributedDataParallel`, or compute first-order quantities, diagonals, "
            "Kronecker factors, traces or eigenvalues."
        )
    return None

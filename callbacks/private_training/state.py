"""What changes in a module besides the steps of its private optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_curv.distributed.shards import find_shards, local, version
from lightning_curv.optimizers.privacy.optimizer import DPOptimizer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STATE = "optimizer."
_Version = tuple[int, int]
_Seen = tuple[int, _Version, Tensor | None]  # identity, version, fingerprint


class StateWatch:
    """Compares parameters, buffers and the state of the optimizer with what they were.

    A change is found by the version that torch counts for every tensor, and that of a buffer by its
    values too: writing back what was there is no change. Changes through `.data` have no version;
    they are found where values of all tensors are compared. What was not there before is a change.
    Momenta and the like, which the inner optimizer keeps of a parameter, are named
    `optimizer.<parameter>.<key>`.

    Args:
        pl_module: The module.
        optimizer: Its private optimizer: what its steps change is expected.
        expected: Patterns of names of what else may change.
    """

    def __init__(
        self, pl_module: LightningModule, optimizer: DPOptimizer, expected: Sequence[str]
    ) -> None:
        self._root = pl_module
        self._look_up_modules()
        self._optimizer, self._expected = optimizer, expected
        self._steady: set[str] = set()
        self._seen: dict[str, _Seen] = {}
        self._empty: set[str] = set()  # names without a tensor, or with one that has no values yet
        self._hook = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def close(self) -> None:
        """Stop listening to the optimizer."""
        self._hook.remove()

    def allow(self, names: set[str]) -> None:
        """These change without regard to the data."""
        self._steady |= names

    def begin(self, values: bool) -> None:
        """Remember everything as it is.

        Args:
            values: Whether the values of parameters are compared too, once.
        """
        before, self._seen = self._seen, {}
        self._empty = {name for *_, name, tensor in self._entries() if not _has_values(tensor)}
        for name, tensor in self._tensors():
            # Both: a tensor that was put in the place of another one may have the same version.
            now = id(tensor), version(tensor)
            known = before.get(name)
            if values:
                print_of = fingerprint(tensor)
            elif self._is_trained(name, tensor):
                print_of = None
            else:  # read again only if its version says so
                print_of = (
                    known[2] if known is not None and known[:2] == now else fingerprint(tensor)
                )
            self._seen[name] = *now, print_of

    def changed(self) -> set[str]:
        """Names of what is not as it was, and must not change."""
        names = set()
        for name, tensor in self._tensors():
            if name not in self._seen:
                names.add(name)
                continue
            identity, its_version, known = self._seen[name]
            moved = (identity, its_version) != (id(tensor), version(tensor))
            if known is None:
                differs = moved
            else:
                suspected = moved or self._is_trained(name, tensor)
                # Lightning has everything back on the processor when the last hook runs.
                differs = suspected and not torch.equal(known.cpu(), fingerprint(tensor).cpu())
            if differs:
                names.add(name)
        return self.unexpected(names)

    @contextmanager
    def without(self, names: set[str]) -> Iterator[None]:
        """Take away those of some tensors that were not there when everything was remembered."""
        taken = [
            (tensors, key, name, tensor)
            for tensors, key, name, tensor in self._entries()
            if name in names and name not in self._seen and _has_values(tensor)
        ]
        for tensors, key, name, _ in taken:
            if name in self._empty:
                tensors[key] = None
            else:
                del tensors[key]
        try:
            yield
        finally:
            for tensors, key, _, tensor in taken:
                tensors[key] = tensor

    def unexpected(self, names: set[str]) -> set[str]:
        """Those that must not change."""
        expected = {
            name for name in names if any(fnmatchcase(name, pattern) for pattern in self._expected)
        }
        return names - expected - self._steady

    def _stepped(self) -> None:
        """What the optimizer has just changed is as it is now."""
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for name, tensor in self._tensors():
            known = self._seen.get(name)
            # A state that is new was made by the step.
            if name.startswith(_STATE) or (id(tensor) in own and known is not None):
                compared = known is not None and known[2] is not None
                self._seen[name] = (
                    id(tensor),
                    version(tensor),
                    fingerprint(tensor) if compared else None,
                )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        entries = [(name, tensor) for *_, name, tensor in self._entries()]
        # What FSDP has gathered for a while is a copy. All at once: a search takes its time.
        shards = find_shards(t for _, t in entries if isinstance(t, torch.nn.Parameter))
        for name, tensor in entries:
            if tensor is not None and _has_values(tensor):
                yield name, shards[tensor].registered if tensor in shards else tensor

    def _entries(self) -> Iterator[tuple[dict[str, Any], str, str, Tensor | None]]:
        """Where every parameter and buffer is kept, under which key, and its name."""
        if self._children() != self._known_children:
            self._look_up_modules()
        for prefix, module in self._modules:
            for tensors in (module._parameters, module._buffers):
                for key, tensor in [*tensors.items()]:
                    yield tensors, key, f"{prefix}.{key}" if prefix else key, tensor
        names = {id(p): name for name, p in self._root.named_parameters()}
        for parameter, state in self._optimizer.state.items():
            for key, value in [*state.items()]:
                if isinstance(value, Tensor):
                    name = names.get(id(parameter), "parameter")
                    yield state, key, f"{_STATE}{name}.{key}", value

    @staticmethod
    def _is_trained(name: str, tensor: Tensor) -> bool:
        """Whether every step changes it: its values are then read on some batches only."""
        return isinstance(tensor, torch.nn.Parameter) or name.startswith(_STATE)

    def _look_up_modules(self) -> None:
        self._modules = list(self._root.named_modules())
        self._known_children = self._children()

    def _children(self) -> list[int]:
        return [id(child) for _, module in self._modules for child in module._modules.values()]


def _has_values(tensor: Tensor | None) -> bool:
    return tensor is not None and not is_lazy(tensor)


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A sum of the bits of all entries, which changes with values, but not with their places.

    Of a sharded tensor those that this process has.
    """
    tensor = local(tensor.detach())
    if tensor.is_sparse or tensor.is_quantized:
        return torch.zeros((), dtype=torch.int64)
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.contiguous().flatten().view(_INTEGERS[real.element_size()])
    # Integers add exactly in any order, and wrap around: equal entries have equal sums.
    return bits.sum(dtype=torch.int64)

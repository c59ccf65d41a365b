"""Holders: does a module, or the cache of a function, hold a tensor that the network reads?

A table that a module holds is the same for all samples. The batch is not, also where a module
remembers it as an
attribute (`self.last_input = x`): what is no parameter and no buffer counts only if it has not N
    rows.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lightning_curv.recording.provenance import Root, pointer_of

_CACHE = type(cache(repr))


class Holders:
    """The modules and caches of the process, and what they hold by its place in memory.

    To look at every object takes some tenths of a second: it is done where a parameter of the graph
    belongs to no module that is known. Else only the known ones are looked at again.
    """

    def __init__(self) -> None:
        self._holders: WeakSet[Any] = WeakSet()
        self._registered: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._others: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._looked_for: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def hold(self, root: Root, count: int, parameters: Iterable[Tensor]) -> bool:
        """Whether a tensor is held, as a parameter or buffer or as something that has not N rows.

        Args:
            root: The tensor.
            count: N.
            parameters: Those of the graph.
        """
        others = root.ndim == 0 or len(root) != count
        if self._known(root, others):
            return True
        unknown = [parameter for parameter in parameters if parameter not in self._looked_for]
        if unknown:
            self._looked_for.update((parameter, None) for parameter in unknown)
            self._look_everywhere()
        else:
            self._look(self._holders)
        return self._known(root, others)

    def _look_everywhere(self) -> None:
        """Look at every object of the process."""
        objects = gc.get_objects()
        # There are hundreds of thousands of objects, of few types.
        kinds = {kind for kind in set(map(type, objects)) if _may_hold(kind)}
        holders = [holder for holder in objects if type(holder) in kinds and _holds(holder)]
        self._holders = WeakSet(holders)
        self._look(holders)

    def _known(self, root: Root, others: bool) -> bool:
        tensors = [
            self._registered.get(root.pointer),
            self._others.get(root.pointer) if others else None,
        ]
        return any(tensor is not None and pointer_of(tensor) == root.pointer for tensor in tensors)

    def _look(self, holders: Any) -> None:
        tensors: dict[type, bool] = {}  # whether objects of a type are tensors
        for holder in holders:
            if isinstance(holder, nn.Module):
                for tensor in (*holder._parameters.values(), *holder._buffers.values()):
                    if tensor is not None:
                        self._registered[pointer_of(tensor)] = tensor
            for value in _values(holder):
                kind = type(value)
                is_tensor = tensors.get(kind)
                if is_tensor is None:
                    is_tensor = tensors[kind] = issubclass(kind, Tensor)
                if is_tensor:
                    self._others[pointer_of(value)] = value


def _may_hold(kind: type) -> bool:
    return kind is _CACHE or issubclass(kind, nn.Module)


def _holds(holder: Any) -> bool:
    return type(holder) is _CACHE or "_buffers" in holder.__dict__


def _values(holder: Any) -> Iterator[Any]:
    """What else a module or the cache of a function holds, also in a dictionary or a list."""
    if isinstance(holder, nn.Module):
        held = list(holder.__dict__.values())
    else:
        own = vars(holder)  # leads to the function, and to all that its module has
        held = [link for link in gc.get_referents(holder) if link is not own]
        held += [
            value
            for link in held
            if isinstance(link, dict)
            for value in gc.get_referents(*link.values())
        ]
    yield from held
    for value in held:
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


HOLDERS = Holders()

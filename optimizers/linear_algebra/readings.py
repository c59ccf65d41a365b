"""What the host reads of a step: flags and numbers, each at once or all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_curv.devices import on_one_device

Tell = Callable[[list[bool]], None]


class Surprise(Exception):
    """A flag that was taken to hold does not."""


class Answer:
    """What the host has asked for.

    Attributes:
        numbers: The entries of the tensor in nested lists of its shape; known from `Readings.read`
            or `Readings.receive` on.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.numbers: Any = []


class Readings:
    """Flags and numbers of one step that the host wants to know.

    Args:
        at_once: Whether every question waits for its answer. Else flags are taken to hold until
            `read`, or `send` and `receive`, bring everything that was asked in one transfer.

    >>> readings = Readings(at_once=False)
    >>> answer = readings.ask(torch.tensor([2.0, 3.0]))
    >>> readings.finite([torch.tensor([1.0]), torch.tensor([math.nan])])
    [True, True]
    >>> readings.sound
    tensor(False)
    >>> readings.send()
    >>> readings.receive(), answer.numbers
    (False, [2.0, 3.0])
    """

    def __init__(self, at_once: bool = True) -> None:
        self.at_once = at_once
        self._clear()

    def _clear(self) -> None:
        self._flags: list[Tensor] = []
        self._told: list[Tell | None] = []
        self._answers: list[Answer] = []
        self._sent: tuple[Tensor, torch.Event | None] | None = None

    def finite(
        self,
        tensors: Sequence[Tensor],
        tell: Tell | None = None,
        norms: Sequence[Tensor] | None = None,
    ) -> list[bool]:
        """Whether each tensor is finite.

        Args:
            tensors: On any devices.
            tell: Called by `receive` with the flags if some tensor is not.
            norms: Of the tensors, [] each, where they are known.
        """
        if not tensors:
            return []
        if not self.at_once:
            # The largest magnitude is NaN where some entry is.
            largest = torch._foreach_norm([*tensors], math.inf)
            return self.hold(torch.stack(on_one_device(largest)).isfinite(), tell)
        # A norm is finite only if all entries are; one kernel for all tensors.
        found = torch._foreach_norm([*tensors]) if norms is None else norms
        numbers = torch.stack(on_one_device(found)).tolist()
        # A norm may overflow where its tensor does not.
        return [
            math.isfinite(norm) or bool(tensor.isfinite().all())
            for norm, tensor in zip(numbers, tensors, strict=True)
        ]

    def hold(self, flags: Tensor, tell: Tell | None = None) -> list[bool]:
        """Whether each of some flags holds.

        Args:
            flags: Booleans, [F].
            tell: As in `finite`.
        """
        if self.at_once:
            read: list[bool] = flags.tolist()
            return read
        self._flags.append(flags)
        self._told.append(tell)
        return [True] * len(flags)

    def ask(self, tensor: Tensor) -> Answer:
        """Ask for the entries of a tensor."""
        answer = Answer(tensor)
        if self.at_once:
            answer.numbers = tensor.tolist()
        else:
            self._answers.append(answer)
        return answer

    @property
    def sound(self) -> Tensor:
        """Whether all holds that was taken to hold since the last reading, [] on the device."""
        return torch.cat(on_one_device(self._flags)).all()

    def read(self) -> None:
        """Wait for everything that was asked.

        Raises:
            Surprise: A flag that was taken to hold does not.
        """
        if self.at_once:
            return
        flags = self._understood(self._packed().cpu())
        self._clear()
        if not all(flags):
            raise Surprise

    def send(self) -> None:
        """Let the device send everything that was asked, without waiting for it."""
        packed = self._packed()
        if packed.device.type == "cpu":
            self._sent = packed, None
            return
        arriving = packed.to("cpu", non_blocking=True)
        event = torch.Event(packed.device)
        event.record()
        self._sent = arriving, event

    def receive(self) -> bool:
        """Wait for what was sent; whether all holds. Where something does not, it is told."""
        assert self._sent is not None
        arrived, event = self._sent
        if event is not None:
            event.synchronize()
        flags = self._understood(arrived)
        remaining = iter(flags)
        for asked, tell in zip(self._flags, self._told, strict=True):
            of_question = [next(remaining) for _ in range(len(asked))]
            if tell is not None and not all(of_question):
                tell(of_question)
        self._clear()
        return all(flags)

    def _packed(self) -> Tensor:
        """All flags and all numbers, one behind the other."""
        tensors = [*self._flags, *(answer.tensor.flatten() for answer in self._answers)]
        if not tensors:
            return torch.empty(0)
        return torch.cat(on_one_device(tensors))

    def _understood(self, packed: Tensor) -> list[bool]:
        """Give every question its numbers, and return the flags."""
        sizes = [answer.tensor.numel() for answer in self._answers]
        flags, *numbers = packed.split([sum(map(len, self._flags)), *sizes])
        for answer, found in zip(self._answers, numbers, strict=True):
            answer.numbers = found.view(answer.tensor.shape).tolist()
        return [bool(flag) for flag in flags.tolist()]

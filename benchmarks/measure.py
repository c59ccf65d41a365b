"""Time and memory of steps that take turns in one process.

Time is the process' own (user and system), which other processes on the machine do not add to; on a
GPU it is the wall clock between two synchronizations. Memory is counted at the allocator of torch:
the largest sum of live bytes during a step, above what was alive before it. So counted it is the
same in every run, and does not depend on what the operating system gives back when; buffers that
kernels get around the allocator are not in it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SHORTEST = 0.01  # seconds: shorter steps are measured several times in a row


@dataclass
class Contender:
    """A step, what to do after it, and what was measured.

    Attributes:
        step: what is measured.
        clear: frees its results.
        seconds: of one step, one entry per round.
        bytes: peak memory.
        skipped: why there are no measurements.
    """

    step: Callable[[], Any]
    clear: Callable[[], None]
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    skipped: str = ""

    def report(self) -> dict[str, Any]:
        """For JSON."""
        if self.skipped:
            return {"skipped": self.skipped}
        return {"seconds": [float(f"{s:.4g}") for s in self.seconds], "bytes": self.bytes}


def compare(
    contenders: dict[str, Contender], rounds: int, limit: float, device: str = "cpu"
) -> None:
    """Measure contenders in turn; each round starts with the next one.

    Args:
        contenders: by name.
        rounds: measurements of each.
        limit: seconds (of the clock on the wall) that a step may take; slower ones are skipped.
        device: ``"cpu"`` or ``"cuda"``.
    """
    calls = {}
    for name, contender in contenders.items():
        try:
            with bounded(limit):
                contender.step()
                contender.clear()
            calls[name] = max(1, round(SHORTEST / max(clocked(contender, device), 1e-4)))
            contender.bytes = peak_bytes(contender, device)
        except Exception as error:
            contender.skipped = reason(error)
            contender.clear()
            gc.collect()
    for turn in range(rounds):
        gc.collect()
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clocked(
                contenders[name], device
            )  # with what others have left of the caches and of the memory: not counted
            times = [clocked(contenders[name], device) for _ in range(calls[name])]
            contenders[name].seconds.append(sum(times) / len(times))


def reason(error: Exception) -> str:
    """Why a step could not be measured, in one line."""
    if isinstance(error, NotImplementedError):
        return "unsupported"
    if (
        isinstance(error, MemoryError)
        or "allocate memory" in str(error)
        or "out of memory" in str(error)
    ):
        return "out of memory"
    if isinstance(error, TimeoutError):
        return str(error)
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        if str(error)
        else type(error).__name__
    )


@contextmanager
def bounded(limit: float) -> Iterator[None]:
    """Stop what runs longer than ``limit`` seconds of the process' time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"> {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit if math.isfinite(limit) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clocked(contender: Contender, device: str) -> float:
    """Seconds of one step, without its clearing."""
    if device == "cpu":
        start = time.process_time()
        contender.step()
        seconds = time.process_time() - start
    else:
        torch.cuda.synchronize()
        start = time.perf_counter()
        contender.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    contender.clear()
    return seconds


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to blocks of 32 MiB and 1 GiB in all.

    Otherwise it gives some back to the system, depending on how blocks happen to lie, and to map
    them anew takes up to a fifth of a step, of one contender in one run and of another in the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30)):
        if mallopt is not None:
            mallopt(parameter, value)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the profiler's native code writes to the standard error."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def peak_bytes(contender: Contender, device: str) -> int:
    """Peak memory of a step above what was alive before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.step()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            contender.step()
        alive = peak = 0
        for event in profiler.profiler.kineto_results.events():  # in the order of time
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
    contender.clear()
    return peak

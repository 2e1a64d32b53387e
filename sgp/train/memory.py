"""Peak memory of a piece of work on the CPU, from the allocator's own events."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Held:
    """The most bytes that were allocated at one time; None while unknown."""

    peak_bytes: int | None = None


@contextmanager
def cpu_peak() -> Iterator[Held]:
    """Measure the most bytes that CPU tensors held at one time, above what there was before.

    PyTorch counts peak memory on CUDA only. On a CPU its profiler records every allocation and
    every release with a signed size; the largest running sum of these is the peak. Memory that a
    library takes by itself, such as a matmul's workspace, is not seen.

    Example:
        >>> with cpu_peak() as held:
        ...     _ = torch.zeros(1024).exp().sum()
        >>> held.peak_bytes
        8192
    """
    held = Held()
    with _quiet_kineto():
        profile: Any = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
        with profile:
            yield held
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    held.peak_bytes = peak


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep the profiler's library from writing "USDT: ... profiler_start" to standard error."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)

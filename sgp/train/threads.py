"""As many threads as there are cores to run them.

PyTorch's threads wait for one another by spinning. Where another program has one of the cores,
each of the many small steps of a training step waits until that program is interrupted: with four
busy processes on 2 cores the default run took 250 s on 2 threads and 54 s on 1.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SHORTEST = 1.0  # seconds; the kernel counts idle time in hundredths


class FreeCores:
    """Counts the cores that other programs leave free, from its creation to `count()`.

    Example:
        >>> free = FreeCores()
        >>> free.count() is None  # too early to tell
        True
    """

    def __init__(self) -> None:
        self._start = self._now()

    def count(self) -> float | None:
        """Return idle cores plus those that this process used; None where that is unknown."""
        start, now = self._start, self._now()
        if start is None or now is None or now[0] - start[0] < _SHORTEST:
            return None
        wall, own, idle = (b - a for a, b in zip(start, now, strict=True))
        return (own + idle) / wall

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall time, this process's time, all cores' idle time, in seconds; Linux only."""
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
            ticks = sum(map(int, line.split()[4:6]))  # idle and waiting for a disk
            idle = ticks / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError, AttributeError):
            return None
        return time.perf_counter(), time.process_time(), idle


@contextmanager
def at_most(free: float | None) -> Iterator[int]:
    """Let PyTorch use no more threads than there are free cores; at least one.

    Yields the number of threads, and restores the earlier one afterwards. None changes nothing.

    Example:
        >>> with at_most(1.2) as count:
        ...     count, torch.get_num_threads()
        (1, 1)
    """
    before = torch.get_num_threads()
    count = before if free is None else max(1, min(before, round(free)))
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)

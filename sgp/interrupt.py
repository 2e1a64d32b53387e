"""Ctrl-C in a command: exit code 130, and one plain line that says what stands on disk.

`import sgp` loads this module first. Most of a command's start is the import of PyTorch, where
Python answers Ctrl-C with a traceback, or not at all: PyTorch's C code drops the KeyboardInterrupt
of its own import of NumPy. Only the standard library is imported here.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_Handler = Callable[[int, FrameType | None], object] | int | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the text goes on after "interrupted" and says what stands on disk."""


def watch_start() -> None:
    """While the command `sgp` starts, Ctrl-C ends the process; does nothing in other programs."""
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default and _is_command() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def raising() -> Iterator[None]:
    """While a command works, Ctrl-C raises; from its end to that of the process it ends this.

    Does nothing where `watch_start` did nothing.
    """
    watched = signal.getsignal(signal.SIGINT) is _leave
    if watched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if watched:  # all was said; what is left is Python's own shutdown
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def _is_command() -> bool:
    """Whether the process is the script `sgp` or `python -m sgp`."""
    if sys.argv[:1] == ["-m"]:  # so while Python imports the package of the module to run
        return sys.orig_argv[-len(sys.argv)] == "sgp"
    return Path(*sys.argv[:1]).name in ("sgp", "sgp.exe")


def _leave(*_: Any) -> None:
    """End the process at once: an exception would meet foreign C code and half-made modules."""
    words = ["sgp", *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    line = f"{' '.join(words)}: interrupted while it started; nothing was written\n"
    os.write(2, line.encode(errors="replace"))
    os._exit(INTERRUPTED)


class StopRequest:
    """Turns Ctrl-C into a request that the training loop reads between two steps.

    While training, the first Ctrl-C sets `requested` and the second interrupts at once. After
    `protect()` further ones are only noted, so that files are written whole; after `release()`
    Ctrl-C interrupts as usual. It does nothing outside the main thread, where Python has no
    signals, and where Ctrl-C is ignored, as it is for what a script runs in the background.

    Example:
        >>> with StopRequest(print) as stop:
        ...     while not stop.requested:
        ...         signal.raise_signal(signal.SIGINT)  # someone presses Ctrl-C
        ...     stop.protect()
        stopping after this step; Ctrl-C again stops at once
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say = say
        self._on_signal = self._while_training
        self._words: str | None = None
        self._previous: _Handler = None
        self._installed = False

    def __enter__(self) -> "StopRequest":  # noqa: PYI034  # typing.Self needs Python 3.11
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._previous = signal.signal(signal.SIGINT, lambda *_: self._on_signal())
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous or signal.SIG_DFL)

    def protect(self, words: str | None = "saving; one moment") -> None:
        """From now on Ctrl-C waits until what follows is done, and is answered with these words."""
        self._words = words
        self._on_signal = self._while_saving

    def release(self) -> None:
        """From now on Ctrl-C raises `KeyboardInterrupt`."""
        self._on_signal = self._raise

    def _while_training(self) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping after this step; Ctrl-C again stops at once")

    def _while_saving(self) -> None:
        self.requested = True
        if self._words is not None:
            self._say(self._words)

    def _raise(self) -> None:
        self.requested = True
        raise KeyboardInterrupt

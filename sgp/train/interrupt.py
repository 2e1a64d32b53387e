"""Ctrl-C that keeps what was trained."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Turns Ctrl-C into a request that the training loop reads between two steps.

    While training, the first Ctrl-C sets `requested` and the second interrupts at once. After
    `protect()` further ones are only noted, so that files are written whole; after `release()`
    Ctrl-C interrupts as usual. Outside the main thread, where Python has no signals, it does
    nothing.

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
        self._previous: _Handler = None
        self._installed = False

    def __enter__(self) -> "StopRequest":  # noqa: PYI034  # typing.Self needs Python 3.11
        if threading.current_thread() is threading.main_thread():
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

    def protect(self) -> None:
        """From now on Ctrl-C waits until the files are written."""
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
        self._say("saving; one moment")

    def _raise(self) -> None:
        self.requested = True
        raise KeyboardInterrupt

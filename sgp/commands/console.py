"""A console that goes on when the pipe is closed."""

import os
import sys

from rich.console import Console


class Steady(Console):
    """Where a pipe is closed (`sgp audit data.jsonl | head`), the work goes on unread."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def steady(*, stderr: bool = False) -> Steady:
    """Plain text as it is passed: brackets, numbers and colons mean nothing.

    What the terminal's encoding lacks is escaped.
    """
    stream = sys.stderr if stderr else sys.stdout
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return Steady(highlight=False, markup=False, emoji=False, stderr=stderr)

"""Warnings that name a line of the user's, whatever stands between it and this package."""

from __future__ import annotations

import inspect
import sys
import warnings

BETWEEN = {"torch", "accelerate", "datasets", "lightning", "peft", "pytorch_lightning"} | {
    "transformers", "trl"
}  # fmt: skip
"""Packages that call this one for their user: a DataLoader, a Trainer."""


def warn(message: str) -> None:
    """Warn at the innermost call that is neither of this package nor of those between.

    A count of frames would depend on who calls, and on the Python version, some of which give a
    comprehension a frame of its own. Where no frame is the user's (a worker process that was not
    forked, a thread of autograd), it is the outermost.
    """
    passed = BETWEEN | {__name__.partition(".")[0]} | sys.stdlib_module_names
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in passed:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

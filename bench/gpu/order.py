"""Which phases there are, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.gpu import distil, phases
from bench.gpu.phases import Phase


class Plan(NamedTuple):
    """A phase, and what it may take."""

    run: Callable[[Phase], None]
    seconds: float
    what: str
    interpreted: bool = False  # in a dry run


PHASES = {
    "env": Plan(phases.env, 15, "the card, copy bandwidth, matmul rate"),
    "smoke": Plan(
        phases.smoke, 50, "first calls: dtypes, in place, strided, graphs, offsets above 2^31"
    ),
    "rows": Plan(
        phases.rows, 40, "the row kernel alone, beside others' kernels and a copy", interpreted=True
    ),
    "calls": Plan(phases.calls, 60, "whole calls from logits, forward and backward, beside others"),
    "head": Plan(phases.head, 50, "the linear head: time and extra memory, beside others"),
    "host": Plan(phases.host, 45, "microseconds of Python a call, and calls in a loop"),
    "train": Plan(phases.train, 45, "a training step of a small Qwen2"),
    "logprobs": Plan(
        phases.logprobs, 40, "log-probabilities, from logits and through the head"
    ),
    "distil": Plan(
        distil.distil, 60, "the kernel of two rows, and a teacher's head beside a student's",
        interpreted=True,
    ),
    "sweep": Plan(
        phases.sweep, 50, "lines that could take the place of the launch table's", interpreted=True
    ),
    "verify": Plan(phases.verified, 25, "a part of sgp verify", interpreted=True),
}  # fmt: skip

"""Which form and which block a row gets, and the launches themselves.

Nothing here waits for the device: every choice is made from shapes, dtypes and the options that
are on. `python -m bench resources` compiles every line of the table ahead of time.
"""

import os
from typing import Any, NamedTuple

import torch
import triton

from sgp.kernels.arithmetic import Options, Statistics
from sgp.kernels.factor import multiply_rows
from sgp.kernels.layout import Matrix, alignment
from sgp.kernels.row_backward import row_backward
from sgp.kernels.row_resident import row_resident
from sgp.kernels.row_streaming import row_streaming

__all__ = [
    "Call",
    "Line",
    "Options",
    "Statistics",
    "choose",
    "multiply",
    "row_forward",
    "row_gradient",
    "runs_interpreted",
]


class Line(NamedTuple):
    """One line of the launch table."""

    form: str  # "resident" | "streaming"
    BV: int  # columns in a block
    threads: int


# The table. Registers, stack and access widths of every line on sm_80, sm_90, sm_100 and gfx942
# are in bench/results/resources.json, written by `python -m bench resources`: no line spills, and
# where V is a multiple of 8 and contiguous, accesses are 16 bytes wide. Not timed on any GPU yet.
#
# A thread holds 8 or 16 columns: one to four 16-byte accesses in flight, and room for every option
# in its registers. A streaming row gets 1024 threads where the options leave room for that, so
# that few rows share a multiprocessor and the second loop finds the row in L2; with softcap,
# smoothing, class weights or statistics on it gets 512, which have twice the registers.
RESIDENT = (
    Line("resident", 256, 32),
    Line("resident", 1_024, 64),
    Line("resident", 2_048, 128),
    Line("resident", 4_096, 256),
    Line("resident", 8_192, 512),
)
STREAMING_PLAIN = Line("streaming", 16_384, 1_024)
STREAMING_HALVING = Line("streaming", 8_192, 1_024)  # 16 384 spilled 2 registers on sm_90
STREAMING = Line("streaming", 8_192, 512)
STREAMING_NARROW = Line("streaming", 4_096, 512)  # accesses of one element need more registers
RESIDENT_LIMIT = RESIDENT[-1].BV
RESIDENT_NARROW_LIMIT = RESIDENT[-2].BV  # 8 191 odd columns spilled on sm_80 with every option on

# Contracting x * scale - max into one rounding would make the largest exponent a rounding error
# instead of 0 (3e-5 at logits near 1000), so every kernel forbids it.
COMPILE = {"enable_fp_fusion": False}


def choose(
    V: int, *, plain: bool, narrow: bool, halving: bool = False, form: str | None = None
) -> Line:
    """The line for rows of V columns; `form` or SGP_ROW_FORM forces resident or streaming.

    Args:
        V: the vocabulary.
        plain: no softcap, smoothing, class weights or statistics.
        narrow: accesses narrower than 16 bytes: V or a stride that 8 does not divide, or a
            vocabulary that is not contiguous.
        halving: a bf16 or fp16 gradient of float32 logits.
        form: "auto", "resident" or "streaming"; None asks SGP_ROW_FORM.

    Raises:
        ValueError: if the form is unknown, or resident for a row that one program cannot hold.
    """
    form = form or os.environ.get("SGP_ROW_FORM", "auto")
    if form not in ("auto", "resident", "streaming"):
        raise ValueError(
            f"sgp: SGP_ROW_FORM = {form!r}; expected 'auto', 'resident' or 'streaming'"
        )
    limit = RESIDENT_NARROW_LIMIT if narrow else RESIDENT_LIMIT
    if form == "resident" and V > limit:
        raise ValueError(
            f"sgp: SGP_ROW_FORM = 'resident' holds rows of at most {limit} columns"
            f"{' of this layout' if narrow else ''}, got {V}; use 'auto' or 'streaming'"
        )
    if form == "streaming" or V > limit:
        if narrow:
            return STREAMING_NARROW
        if not plain:
            return STREAMING
        return STREAMING_HALVING if halving else STREAMING_PLAIN
    return next(line for line in RESIDENT if line.BV >= V)


class Call(NamedTuple):
    """A kernel and everything that it is called with."""

    kernel: Any
    grid: tuple[int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def launch(self) -> None:
        """Put the kernel on the current stream, unless there are no rows."""
        if self.grid[0]:
            self.kernel[self.grid](*self.arguments, **self.constants)


def row_forward(
    logits: Matrix,
    dlogits: Matrix | None,
    target: torch.Tensor,
    loss: torch.Tensor,
    saved: torch.Tensor | None,
    stats: Statistics | None,
    opt: Options,
    *,
    V: int,
    ignore_index: int,
    warp_size: int | None = None,
) -> Call:
    """Loss and, where asked for, statistics and gradient of every row."""
    align = alignment(V, logits, dlogits)
    plain = stats is None and opt.is_plain
    line = choose(
        V,
        plain=plain,
        narrow=_is_narrow(align, logits, dlogits),
        halving=_is_halving(logits, dlogits),
    )
    kernel = row_resident if line.form == "resident" else row_streaming
    arguments = (logits, dlogits, target, loss, saved, stats, opt, ignore_index, V)
    constants = _constants(line, align, warp_size)
    return Call(kernel, (target.numel(),), arguments, constants)


def row_gradient(
    logits: Matrix,
    dlogits: Matrix,
    target: torch.Tensor,
    saved: torch.Tensor,
    opt: Options,
    *,
    V: int,
    ignore_index: int,
    warp_size: int | None = None,
) -> Call:
    """The gradient of every row from its saved statistics."""
    align = alignment(V, logits, dlogits)
    line = choose(
        V,
        plain=opt.is_plain,
        narrow=_is_narrow(align, logits, dlogits),
        halving=_is_halving(logits, dlogits),
    )
    arguments = (logits, dlogits, target, saved, opt, ignore_index, V)
    constants = _constants(line, align, warp_size)
    return Call(row_backward, (target.numel(),), arguments, constants)


def multiply(
    dlogits: Matrix,
    target: torch.Tensor | None,
    factor: torch.Tensor,
    *,
    N: int,
    V: int,
    ignore_index: int,
    warp_size: int | None = None,
) -> Call:
    """Multiply the N rows of dlogits by factor (0-d, fp32, on the device), except ignored ones."""
    align = alignment(V, dlogits)
    line = choose(V, plain=True, narrow=_is_narrow(align, dlogits), form="auto")  # it has one form
    arguments = (dlogits, target, factor, ignore_index, V)
    constants = _constants(line, align, warp_size)
    return Call(multiply_rows, (N,), arguments, constants)


def runs_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1."""
    return not isinstance(row_streaming, triton.runtime.JITFunction)


def _is_narrow(align: int, *matrices: Matrix | None) -> bool:
    return align < 8 or any(m is not None and m.col_stride != 1 for m in matrices)


def _is_halving(logits: Matrix, dlogits: Matrix | None) -> bool:
    return dlogits is not None and dlogits.ptr.dtype != logits.ptr.dtype


def _constants(line: Line, align: int, warp_size: int | None) -> dict[str, Any]:
    if warp_size is None:
        warp_size = 64 if torch.version.hip else 32
    constants = {"BV": line.BV, "ALIGN": align, **COMPILE}
    if warp_size == 64:  # AMD: half the columns a thread, at most 1024 threads
        return {**constants, "num_warps": min(16, line.threads // 32)}
    # All the registers that so many threads can have: ptxas alone sometimes stops at half of them
    # and spills (seen with Triton 3.9 for sm_80, sm_90 and sm_100).
    maxnreg = min(255, 65_536 // line.threads)
    return {**constants, "num_warps": line.threads // 32, "maxnreg": maxnreg}

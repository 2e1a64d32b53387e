"""Which form and which block a row gets, and the launches themselves.

Nothing here waits for the device: every choice is made from shapes, dtypes and the options that
are on. `python -m bench.resources` compiles every line of the table ahead of time.
"""

import os
from typing import NamedTuple

import torch
import triton

from sgp.kernels.arithmetic import Options, Statistics
from sgp.kernels.factor import multiply_rows
from sgp.kernels.layout import Matrix, alignment
from sgp.kernels.row_backward import row_backward
from sgp.kernels.row_resident import row_resident
from sgp.kernels.row_streaming import row_streaming

# Contracting x * scale - max into one rounding would make the largest exponent a rounding error
# instead of 0 (3e-5 at logits near 1000), so every kernel forbids it.
COMPILE = {"enable_fp_fusion": False}

RESIDENT_LIMIT = 16_384  # the largest vocabulary that one program holds


class Launch(NamedTuple):
    """One line of the table."""

    form: str  # "resident" | "streaming"
    BV: int  # columns in a block
    num_warps: int


# Registers, stack and access widths of every line, for sm_80, sm_90, sm_100 and gfx942, are in
# bench/results/resources.json; no line spills. None of them has been timed: no GPU was at hand.
# Every line gives a thread 16 or 32 columns, so that two to eight 16-byte accesses are in flight;
# a streaming row gets as many warps as fit, so that few rows share a multiprocessor and the second
# loop finds the row in L2.
RESIDENT = {  # columns: warps
    128: 1,
    256: 1,
    512: 1,
    1_024: 2,
    2_048: 4,
    4_096: 8,
    8_192: 16,
    16_384: 32,
}
STREAMING = Launch("streaming", 8_192, 16)


def choose(V: int, form: str | None = None) -> Launch:
    """The line for a row of V columns; `form` or SGP_ROW_FORM forces one.

    Raises:
        ValueError: if the form is unknown, or resident for a row that one program cannot hold.
    """
    form = form or os.environ.get("SGP_ROW_FORM", "auto")
    if form not in ("auto", "resident", "streaming"):
        raise ValueError(f"SGP_ROW_FORM = {form!r}; expected 'auto', 'resident' or 'streaming'")
    if form == "resident" and V > RESIDENT_LIMIT:
        raise ValueError(
            f"SGP_ROW_FORM = 'resident' holds rows of at most {RESIDENT_LIMIT} columns, got {V}; "
            "use 'auto' or 'streaming'"
        )
    if form == "streaming" or V > RESIDENT_LIMIT:
        return STREAMING
    BV = next(columns for columns in RESIDENT if columns >= V)
    return Launch("resident", BV, RESIDENT[BV])


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
) -> None:
    """Loss and, where asked for, statistics and gradient of every row: one launch."""
    if target.numel() == 0:
        return
    line = choose(V)
    kernel = row_resident if line.form == "resident" else row_streaming
    kernel[(target.numel(),)](
        logits, dlogits, target, loss, saved, stats, opt, ignore_index, V,
        BV=line.BV, ALIGN=alignment(V, logits, dlogits), num_warps=line.num_warps, **COMPILE,
    )  # fmt: skip


def row_gradient(
    logits: Matrix,
    dlogits: Matrix,
    target: torch.Tensor,
    saved: torch.Tensor,
    opt: Options,
    *,
    V: int,
    ignore_index: int,
) -> None:
    """The gradient of every row from its saved statistics: one launch."""
    if target.numel() == 0:
        return
    line = choose(V)
    row_backward[(target.numel(),)](
        logits, dlogits, target, saved, opt, ignore_index, V,
        BV=line.BV, ALIGN=alignment(V, logits, dlogits), num_warps=line.num_warps, **COMPILE,
    )  # fmt: skip


def multiply(
    dlogits: Matrix, target: torch.Tensor, factor: torch.Tensor, *, V: int, ignore_index: int
) -> None:
    """Multiply the kept rows of dlogits by factor (0-d, fp32, on the device) in place."""
    if target.numel() == 0:
        return
    line = choose(V)
    multiply_rows[(target.numel(),)](
        dlogits, target, factor, ignore_index, V,
        BV=line.BV, ALIGN=alignment(V, dlogits), num_warps=line.num_warps, **COMPILE,
    )  # fmt: skip


__all__ = ["Launch", "Options", "Statistics", "choose", "multiply", "row_forward", "row_gradient"]


def runs_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1."""
    return not isinstance(row_streaming, triton.runtime.JITFunction)

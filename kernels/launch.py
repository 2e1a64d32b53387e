"""The launches: a kernel, its arguments, and the line of the table that it runs by.

Nothing here waits for the device: every choice is made from shapes, dtypes and the options that
are on (table.py).
"""

from typing import Any, NamedTuple

import torch
import triton

from sgp.kernels import table
from sgp.kernels.arithmetic import INTERPRETED, Options, Statistics
from sgp.kernels.factor import multiply_rows
from sgp.kernels.layout import Matrix, alignment
from sgp.kernels.row_backward import row_backward
from sgp.kernels.row_blockwise import row_blockwise
from sgp.kernels.row_resident import row_resident
from sgp.kernels.row_streaming import row_streaming
from sgp.kernels.table import Line, Row, Target

__all__ = [
    "Call",
    "Options",
    "Statistics",
    "multiply",
    "row_forward",
    "row_gradient",
    "runs_interpreted",
]

# Contracting x * scale - max into one rounding would make the largest exponent a rounding error
# instead of 0 (3e-5 at logits near 1000), so every kernel forbids it.
COMPILE = {"enable_fp_fusion": False}


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
    on: Target | None = None,
    form: str | None = None,
    line: Line | None = None,
) -> Call:
    """Loss and, where asked for, statistics and gradient of every row.

    `on` is what to compile for where that is not the tensors' own device; `form` forces one, and
    `line` a line that the table need not have.
    """
    row = _row(V, opt, logits, dlogits, stats=stats is not None)
    on = on or table.target_of(logits.ptr.device)
    line = line or table.choose(row, on, form)
    first = (logits, dlogits, target, loss, saved, stats, opt)
    N = target.numel()
    if line.form == "resident":
        constants = {"PIECES": line.pieces, **_constants(line, row, on)}
        if line.programs > 1:
            constants["num_ctas"] = line.programs
        return Call(row_resident, (N,), (*first, opt, ignore_index, V), constants)
    constants = {**_lanes(line, row, on), **_constants(line, row, on)}
    if line.form == "blockwise":
        return Call(row_blockwise, (N,), (*first, ignore_index, V), constants)
    constants |= {
        "BV_2": line.BV_2 or line.BV,
        "EDGES": row.edges,
        "DESCENDS": line.descends,
        "STAYS": line.stays,
    }
    programs = min(N, on.multiprocessors * line.per_multiprocessor) if line.stays else N
    return Call(row_streaming, (programs,), (*first, ignore_index, N, V), constants)


def row_gradient(
    logits: Matrix,
    dlogits: Matrix,
    target: torch.Tensor,
    saved: torch.Tensor,
    opt: Options,
    *,
    V: int,
    ignore_index: int,
    on: Target | None = None,
) -> Call:
    """The gradient of every row from its saved statistics."""
    row = _row(V, opt, logits, dlogits)
    on = on or table.target_of(logits.ptr.device)
    line = table.one_pass(row, on)
    constants = {"EDGES": row.edges, **_lanes(line, row, on), **_constants(line, row, on)}
    arguments = (logits, dlogits, target, saved, opt, ignore_index, V)
    return Call(row_backward, (target.numel(),), arguments, constants)


def multiply(
    dlogits: Matrix,
    target: torch.Tensor | None,
    factor: torch.Tensor,
    *,
    N: int,
    V: int,
    ignore_index: int,
    on: Target | None = None,
) -> Call:
    """Multiply the N rows of dlogits by factor (0-d, fp32, on the device), except ignored ones."""
    row = _row(V, Options(), dlogits, None)
    on = on or table.target_of(dlogits.ptr.device)
    line = table.one_pass(row, on)
    constants = {"EDGES": row.edges, **_lanes(line, row, on), **_constants(line, row, on)}
    arguments = (dlogits, target, factor, ignore_index, V)
    return Call(multiply_rows, (N,), arguments, constants)


def runs_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1."""
    return not isinstance(row_streaming, triton.runtime.JITFunction)


def _row(
    V: int, opt: Options, logits: Matrix, dlogits: Matrix | None, *, stats: bool = False
) -> Row:
    light = opt.softcap is None and opt.weight is None
    quiet = opt.label_smoothing is None and opt.entropy_weight is None and not stats
    matrices = (logits,) if dlogits is None else (logits, dlogits)
    align = alignment(V, *matrices)
    contiguous = all(m.col_stride == 1 for m in matrices)
    halving = dlogits is not None and dlogits.ptr.dtype != logits.ptr.dtype
    begins = all(m.ptr.data_ptr() % 16 == 0 for m in matrices)
    # A row of logits and its gradient begin alike between two accesses.
    alike = len({(m.outer_stride % 8, m.inner_stride % 8, m.inner) for m in matrices}) == 1
    edges = begins and align < 8 and contiguous and alike and not halving
    return Row(
        V=V,
        light=light,
        quiet=quiet,
        wide=begins and (align >= 8 or edges),
        edges=edges,
        contiguous=contiguous,
        itemsize=logits.ptr.dtype.itemsize,
        halving=halving,
        gradient=dlogits is not None,
        align=align,
    )


def _constants(line: Line, row: Row, on: Target) -> dict[str, Any]:
    constants = {"BV": line.BV, "ALIGN": row.align, **COMPILE}
    if on.backend == "hip":  # half the columns a thread, at most 1024 threads
        return {**constants, "num_warps": min(16, line.threads // 32)}
    # All the registers that so many threads can have: ptxas alone sometimes stops at half of them
    # and spills (seen with Triton 3.9 for sm_80, sm_90 and sm_100).
    return {**constants, "num_warps": line.threads // 32, "maxnreg": line.registers}


def _lanes(line: Line, row: Row, on: Target) -> dict[str, int]:
    """How a block of a row is shared out: as many lanes as threads, of one access each."""
    vector = 16 // row.itemsize if row.wide and row.contiguous else 1
    if row.halving and vector > 1 and line.BV_2 in (0, line.BV):
        vector = 8  # the compiler lays both loops out for the gradient's accesses
    threads = line.threads if on.backend == "cuda" else 64 * min(16, line.threads // 32)
    if INTERPRETED.value:  # no threads, and a joining of lanes takes its time
        threads = 64
    smallest = min(line.BV, line.BV_2 or line.BV)
    return {"LANES": max(32, min(threads, smallest // vector)), "VECTOR": vector}

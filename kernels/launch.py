"""The launches: a kernel, its arguments, and the line of the table that it runs by.

Nothing here waits for the device: every choice is made from shapes, dtypes and the options that
are on (table.py).
"""

from typing import Any, NamedTuple

import torch
import triton

from sgp.kernels import table
from sgp.kernels.arithmetic import Options, Statistics
from sgp.kernels.factor import multiply_rows
from sgp.kernels.layout import Matrix, alignment
from sgp.kernels.row_backward import row_backward
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
) -> Call:
    """Loss and, where asked for, statistics and gradient of every row.

    `on` is what to compile for where that is not the tensors' own device; `form` forces one.
    """
    align = alignment(V, logits, dlogits)
    row = _row(V, align, opt, logits, dlogits, stats=stats is not None)
    on = on or table.target_of(logits.ptr.device)
    line = table.choose(row, on, form)
    first = (logits, dlogits, target, loss, saved, stats, opt)
    constants = _constants(line, align, on)
    if line.form == "streaming":
        return Call(row_streaming, (target.numel(),), (*first, ignore_index, V), constants)
    constants |= {"PIECES": line.pieces}
    if line.programs > 1:
        constants |= {"num_ctas": line.programs}
    return Call(row_resident, (target.numel(),), (*first, opt, ignore_index, V), constants)


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
    align = alignment(V, logits, dlogits)
    row = _row(V, align, opt, logits, dlogits)
    on = on or table.target_of(logits.ptr.device)
    arguments = (logits, dlogits, target, saved, opt, ignore_index, V)
    constants = _constants(table.blocks(row, on), align, on)
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
    align = alignment(V, dlogits)
    row = _row(V, align, Options(), dlogits, None)
    on = on or table.target_of(dlogits.ptr.device)
    arguments = (dlogits, target, factor, ignore_index, V)
    return Call(multiply_rows, (N,), arguments, _constants(table.blocks(row, on), align, on))


def runs_interpreted() -> bool:
    """Whether the kernels were defined under TRITON_INTERPRET=1."""
    return not isinstance(row_streaming, triton.runtime.JITFunction)


def _row(
    V: int, align: int, opt: Options, logits: Matrix, dlogits: Matrix | None, *, stats: bool = False
) -> Row:
    light = opt.softcap is None and opt.weight is None
    quiet = opt.label_smoothing is None and opt.entropy_weight is None and not stats
    matrices = (logits,) if dlogits is None else (logits, dlogits)
    return Row(
        V=V,
        light=light,
        plain=light and quiet,
        wide=align >= 8 and all(m.ptr.data_ptr() % 16 == 0 for m in matrices),
        contiguous=all(m.col_stride == 1 for m in matrices),
        itemsize=logits.ptr.dtype.itemsize,
        halving=dlogits is not None and dlogits.ptr.dtype != logits.ptr.dtype,
        gradient=dlogits is not None,
    )


def _constants(line: Line, align: int, on: Target) -> dict[str, Any]:
    constants = {"BV": line.BV, "ALIGN": align, **COMPILE}
    if on.backend == "hip":  # half the columns a thread, at most 1024 threads
        return {**constants, "num_warps": min(16, line.threads // 32)}
    # All the registers that so many threads can have: ptxas alone sometimes stops at half of them
    # and spills (seen with Triton 3.9 for sm_80, sm_90 and sm_100).
    return {**constants, "num_warps": line.threads // 32, "maxnreg": line.registers}

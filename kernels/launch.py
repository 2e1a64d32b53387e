"""The launches: a kernel, its arguments, and the line of the table that it runs by.

What was launched before is kept and repeated (`put`), for the choice and Triton's look at every
argument take the host longer than the launch.

Nothing here waits for the device: every choice is made from shapes, dtypes and the options that
are on (table.py).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel

from sgp.kernels import table
from sgp.kernels.arithmetic import Options, Statistics
from sgp.kernels.divisor import mean_scale as mean_scale_kernel
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
    "mean_scale",
    "multiply",
    "put",
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
    compiled: Any = None  # by an earlier call that needs the same binary; None: Triton finds it
    most_programs: int | None = None  # of the grid, however many rows there are; None: one a row

    def launch(self) -> Any:
        """Put the kernel on the current stream, unless there are no rows.

        Returns what Triton compiled; None without rows and under the interpreter.
        """
        if not self.grid[0]:
            return None
        if self.compiled is None:
            return self.kernel[self.grid](*self.arguments, **self.constants)
        binary, runtime = self.compiled, triton.knobs.runtime
        names = self.kernel.arg_names[len(self.arguments) :]  # of the constexprs, which come last
        arguments = (*self.arguments, *[self.constants[name] for name in names])
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            binary[(*self.grid, 1, 1)](*arguments)
        else:
            # The same without what Triton makes for hooks, which costs more than the launch.
            active = triton.runtime.driver.active
            stream = active.get_current_stream(active.get_current_device())
            binary.run(
                self.grid[0], 1, 1, stream, binary.function, binary.packed_metadata,
                None, None, None, *arguments,
            )  # fmt: skip
        return binary


MOST_KEPT = 1024  # then all are forgotten: somebody changes an option at every step
_kept: dict[Hashable, Call] = {}  # without their arguments


def put(
    key: Hashable,
    tensors: Sequence[torch.Tensor | None],
    N: int,
    arguments: tuple[Any, ...],
    choose: Callable[[], Call],
) -> None:
    """Launch what a call of the same key compiled; without one, launch and keep what is chosen.

    Triton looks at every argument of every launch to find the binary that it needs: at dtypes, at
    which integers are 1 or divisible by 16, at which tensors begin at 16 bytes. Where all that is
    known to be as before, so is the binary.

    Args:
        key: of everything that the choice and Triton look at, except where tensors begin: device,
            dtypes, integers, and which arguments are None.
        tensors: those of the arguments that may begin anywhere; a launch is kept, and a kept one
            used, only where all begin at 16 bytes.
        N: rows, a program each up to the most that was chosen.
        arguments: what the kernel is called with, as for `arranged`.
        choose: makes the Call where nothing is kept.
    """
    bits = 0
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    kept = None if bits % 16 else _kept.get(key)
    if kept is not None:
        programs = N if kept.most_programs is None else min(N, kept.most_programs)
        in_order = arranged(kept.kernel, arguments)
        Call(kept.kernel, (programs,), in_order, kept.constants, kept.compiled).launch()
        return
    call = choose()
    compiled = call.launch()
    # AMD's compiler asks for the sizes of tensors too, which no key knows.
    if not bits % 16 and isinstance(compiled, CompiledKernel) and torch.version.hip is None:
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[key] = call._replace(arguments=(), compiled=compiled)


def arranged(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as this kernel takes them.

    Those of a row's forward begin (logits, dlogits, target, loss, saved, stats, opt); a resident
    row takes the options twice.
    """
    if kernel is row_resident:
        return (*arguments[:7], *arguments[6:])
    return arguments


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
    arguments = (logits, dlogits, target, loss, saved, stats, opt, ignore_index, V)
    constants = _constants(line, align, on)
    if line.form == "streaming":
        return Call(row_streaming, (target.numel(),), arguments, constants)
    constants |= {"PIECES": line.pieces}
    if line.programs > 1:
        constants |= {"num_ctas": line.programs}
    in_order = arranged(row_resident, arguments)
    return Call(row_resident, (target.numel(),), in_order, constants)


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


def mean_scale(
    target: torch.Tensor,
    weight: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    scale: torch.Tensor,
    *,
    V: int,
    ignore_index: int,
) -> Call:
    """1 / sum over kept rows of row_weight * weight[target] into scale (), by one program."""
    arguments = (target, weight, row_weight, scale, ignore_index, target.numel(), V)
    # 16 warps are 1024 threads on AMD, the most; no spill on sm_80, sm_90, sm_100 and gfx942.
    return Call(mean_scale_kernel, (1,), arguments, {"BN": 8_192, "num_warps": 16, **COMPILE})


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

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
from sgp.kernels.arithmetic import INTERPRETED, Options, Statistics
from sgp.kernels.divergence import Pair
from sgp.kernels.divisor import mean_scale as mean_scale_kernel
from sgp.kernels.factor import multiply_rows
from sgp.kernels.layout import Matrix, alignment
from sgp.kernels.probabilities import probabilities
from sgp.kernels.row_backward import row_backward
from sgp.kernels.row_blockwise import row_blockwise
from sgp.kernels.row_resident import row_resident
from sgp.kernels.row_streaming import row_streaming
from sgp.kernels.table import Line, Row, Target
from sgp.kernels.two_rows import two_rows_backward, two_rows_forward, two_rows_mixture

__all__ = [
    "Call",
    "Options",
    "Pair",
    "Statistics",
    "mean_scale",
    "multiply",
    "probability_rows",
    "put",
    "row_forward",
    "row_gradient",
    "runs_interpreted",
    "two_rows_gradient",
    "two_rows_loss",
    "two_rows_terms",
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
            used, only where all begin at 16 bytes. Outputs that were allocated for the call do.
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

    Those of a row's forward are (logits, dlogits, target, loss, saved, stats, argmax, opt,
    ignore_index, V, N): a resident row takes the options twice, and only a streamed one takes N.
    """
    if kernel is row_resident:
        return (*arguments[:8], *arguments[7:-1])
    return arguments[:-1] if kernel is row_blockwise else arguments


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
    argmax: torch.Tensor | None = None,
    on: Target | None = None,
    form: str | None = None,
    line: Line | None = None,
) -> Call:
    """Loss and, where asked for, statistics and gradient of every row.

    `argmax` (N,) int64 takes the column of the largest score; only together with `stats`.
    `on` is what to compile for where that is not the tensors' own device; `form` forces one, and
    `line` a line that the table need not have.
    """
    row = _row(V, opt, logits, dlogits, stats=stats is not None, argmax=argmax is not None)
    on = on or table.target_of(logits.ptr.device)
    line = line or table.choose(row, on, form)
    N = target.numel()
    arguments = (logits, dlogits, target, loss, saved, stats, argmax, opt, ignore_index, V, N)
    constants = _constants(line, row, on)
    if line.form == "resident":
        constants |= {"PIECES": line.pieces}
        if line.programs > 1:
            constants |= {"num_ctas": line.programs}
        return Call(row_resident, (N,), arranged(row_resident, arguments), constants)
    constants |= _lanes(line, row, on)
    if line.form == "blockwise":
        return Call(row_blockwise, (N,), arranged(row_blockwise, arguments), constants)
    constants |= {
        "BV_2": line.BV_2 or line.BV,
        "EDGES": row.edges,
        "DESCENDS": line.descends,
        "STAYS": line.stays,
    }
    if not line.stays:
        return Call(row_streaming, (N,), arguments, constants)
    most = on.multiprocessors * line.per_multiprocessor
    return Call(row_streaming, (min(N, most),), arguments, constants, most_programs=most)


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


def two_rows_loss(
    logits: Matrix,
    teacher: Matrix,
    dlogits: Matrix | None,
    target: torch.Tensor,
    index: torch.Tensor | None,
    loss: torch.Tensor | None,
    saved: torch.Tensor | None,
    stats: Statistics | None,
    opts: tuple[Options, Options, Pair],
    *,
    kind: str,
    V: int,
    ignore_index: int,
    which: int = 0,
    on: Target | None = None,
) -> Call:
    """Divergence and, where asked for, statistics and gradient of every row of the teacher.

    Without `loss`, the sums of some columns alone, into `saved`.
    """
    quiet = loss is not None and stats is None
    constants = _of_two_rows(V, (logits, teacher), dlogits, opts, on, kind, quiet=quiet)
    rows = (logits, teacher, dlogits, target, index, loss, saved, stats)
    arguments = (*rows, *opts, ignore_index, which, V)
    return Call(two_rows_forward, (target.numel(),), arguments, {"KIND": kind, **constants})


def two_rows_terms(
    logits: Matrix,
    teacher: Matrix,
    target: torch.Tensor,
    saved: torch.Tensor,
    terms: torch.Tensor,
    opts: tuple[Options, Options, Pair],
    *,
    V: int,
    ignore_index: int,
    on: Target | None = None,
) -> Call:
    """What some columns add to the jsd of every row, from the sums of all columns."""
    arguments = (logits, teacher, target, saved, terms, *opts, ignore_index, V)
    constants = _of_two_rows(V, (logits, teacher), None, opts, on, "jsd")
    return Call(two_rows_mixture, (target.numel(),), arguments, constants)


def two_rows_gradient(
    logits: Matrix,
    teacher: Matrix,
    dlogits: Matrix,
    target: torch.Tensor,
    index: torch.Tensor | None,
    saved: torch.Tensor,
    opts: tuple[Options, Options, Pair],
    *,
    kind: str,
    V: int,
    ignore_index: int,
    which: int = 0,
    on: Target | None = None,
) -> Call:
    """The gradient of every row of the teacher from what the forward saved."""
    constants = _of_two_rows(V, (logits, teacher), dlogits, opts, on, kind)
    arguments = (logits, teacher, dlogits, target, index, saved, *opts, ignore_index, which, V)
    return Call(two_rows_backward, (target.numel(),), arguments, {"KIND": kind, **constants})


def probability_rows(
    logits: Matrix,
    target: Matrix,
    dlogits: Matrix | None,
    dtarget: Matrix | None,
    loss: torch.Tensor | None,
    saved: torch.Tensor | None,
    opt: Options,
    *,
    N: int,
    V: int,
    on: Target | None = None,
) -> Call:
    """Loss and gradients of N rows whose target is a distribution; without `loss`, from `saved`."""
    row = _row(V, opt, logits, dlogits, others=(target, dtarget))
    on = on or table.target_of(logits.ptr.device)
    line = table.probabilities(row)
    constants = {
        "BV_2": line.BV_2 or line.BV,
        "EDGES": row.edges,
        **_lanes(line, row, on),
        **_constants(line, row, on),
    }
    arguments = (logits, target, dlogits, dtarget, loss, saved, opt, V)
    return Call(probabilities, (N,), arguments, constants)


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
    V: int,
    opt: Options,
    logits: Matrix,
    dlogits: Matrix | None,
    *,
    stats: bool = False,
    argmax: bool = False,
    others: tuple[Matrix | None, ...] = (),
) -> Row:
    light = opt.softcap is None and opt.weight is None
    quiet = opt.label_smoothing is None and opt.entropy_weight is None and not stats
    matrices = tuple(m for m in (logits, dlogits, *others) if m is not None)
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
        itemsize=min(m.ptr.dtype.itemsize for m in (logits, *others) if m is not None),
        halving=halving,
        gradient=dlogits is not None,
        argmax=argmax,
        align=align,
    )


def _of_two_rows(
    V: int,
    rows: tuple[Matrix, Matrix],
    dlogits: Matrix | None,
    opts: tuple[Options, Options, Pair],
    on: Target | None,
    kind: str,
    *,
    quiet: bool = True,
) -> dict[str, Any]:
    """What a kernel of two rows is compiled with."""
    row = _row(V, opts[0], rows[0], dlogits, others=(rows[1],))
    light = row.light and opts[1].softcap is None and opts[2] == Pair()
    light = light and kind == "forward_kl"
    row = row._replace(light=light, quiet=quiet)
    on = on or table.target_of(rows[0].ptr.device)
    line = table.two_rows(row, on)
    return {"EDGES": row.edges, **_lanes(line, row, on), **_constants(line, row, on)}


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

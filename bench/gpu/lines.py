"""The row kernel by any line, whether or not the launch table has it: launched, checked, built.

`python -m bench gpu` times them in its phases `rows` and `sweep`. Nothing is timed that was not
checked: before each launch the loss and the gradient are filled with NaN; afterwards none may be
left anywhere, ignored rows must be zero, and rows from all over the matrix are compared with
float64, of which they may be no further than PyTorch's rows in the same dtype.

Clusters need Triton 3.8: for a machine with an older one `build` compiles them elsewhere, and
`cubin.py` launches them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from bench.against import right
from bench.proof import binary, cubin, kernel_cases
from sgp import tolerance
from sgp.kernels import launch, table
from sgp.kernels.layout import matrix
from sgp.kernels.table import Line, Row, Target

VOCABULARIES = (151_936, 32_000, 128_256, 262_144, 50_264)
DATA = {  # logits, gradient
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "head": (torch.float32, torch.bfloat16),  # in place, as in a chunk of the linear head
}
IGNORE = -100
# Threads of a program, 16-bit columns a thread in the first loop, programs a multiprocessor, 16-bit
# columns a thread in the second loop, and what else. What won on an H100 and an H200 in prototypes
# comes first; bench/results/gpu-*.jsonl has them all.
STREAMED: tuple[tuple[int, int, int, int, dict[str, Any]], ...] = (
    (1_024, 32, 1, 32, {}),
    (512, 32, 2, 16, {}),
    (1_024, 32, 1, 32, {"stays": True}),
    (512, 32, 2, 16, {"stays": True}),
    (1_024, 32, 1, 16, {}),
    (1_024, 32, 1, 16, {"descends": True}),
    (256, 32, 4, 16, {}),
    (1_024, 16, 1, 16, {}),
    (512, 16, 2, 16, {}),
    (512, 32, 1, 16, {}),
)
CLUSTERS = ((256, 2), (512, 1), (256, 1))  # threads, programs a multiprocessor


# -- lines -----------------------------------------------------------------------------------------


def row_of(V: int, data: str) -> Row:
    """What the table is asked about a plain loss of contiguous rows."""
    logits, gradient = DATA[data]
    halving, align = gradient != logits, math.gcd(V, 16)
    edges = align < 8 and not halving
    return Row(
        V,
        wide=align >= 8 or edges,
        edges=edges,
        itemsize=logits.itemsize,
        halving=halving,
        align=align,
    )


def candidates(row: Row, target: Target) -> list[Line]:
    """The table's line, then others that could take its place, the likeliest first."""
    forms = ("auto", "streaming", "staying") if target.backend == "cuda" else ("auto",)
    found = [table.choose(row, target, form) for form in forms]
    for threads, first, held, second, more in STREAMED:
        BV, BV_2 = (2 * columns * threads // row.itemsize for columns in (first, second))
        if BV < 2 * row.V:
            options = more if BV_2 == BV else more | {"BV_2": BV_2}
            found.append(Line("streaming", BV, threads, per_multiprocessor=held, **options))
    found.append(table.choose(row, target, "blockwise"))
    in_clusters = target.has_clusters and row.halving and row.align >= 8
    for programs, (threads, held) in itertools.product((2, 4, 8) if in_clusters else (), CLUSTERS):
        BV = 8 * threads * programs
        pieces = next((k for k in table.PIECES if BV * k >= row.V), None)
        if pieces and BV * (pieces // 2) < row.V:
            found.append(Line("resident", BV, threads, pieces, programs, held))
    return list(dict.fromkeys(found))


def source(line: Line) -> str:
    """The line as kernels/table.py has it, to be pasted."""
    defaults = Line._field_defaults
    given = [repr(v) for k, v in line._asdict().items() if k not in defaults]
    given += [f"{k}={v!r}" for k, v in line._asdict().items() if v != defaults.get(k, v)]
    return f"Line({', '.join(given)})"


def file_of(line: Line, V: int, data: str) -> str:
    """The name of its cubin."""
    return "-".join(map(str, (data, V, *line))) + ".cubin"


# -- launches --------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Tensors of one size; on the meta device where nothing is to be run."""

    logits: Tensor  # (N, V)
    gradient: Tensor  # (N, V); of the head, the first half of each row of the logits
    target: Tensor  # (N,)
    loss: Tensor  # (N,)
    scale: Tensor  # (): the upstream factor


def problem(N: int, V: int, data: str, kept: float, device: torch.device | str) -> Problem:
    """N rows, every 1 / kept of them scored."""
    logits_dtype, gradient_dtype = DATA[data]
    logits = torch.empty(N, V, dtype=logits_dtype, device=device)
    gradient = torch.empty_like(logits) if data != "head" else logits.view(gradient_dtype)[:, :V]
    target = torch.empty(N, dtype=torch.int64, device=device)
    scale = torch.full((), 0.5, device=device)
    if logits.device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
        logits.normal_(0.0, 2.0, generator=generator)
        target.random_(V, generator=generator)
        target[torch.arange(N, device=device) % round(1 / kept) != 0] = IGNORE
    return Problem(logits, gradient, target, torch.empty(N, device=device), scale)


def call_of(line: Line, p: Problem, on: Target) -> Any:
    """The launch of a line, whether or not the table would choose it."""
    logits, gradient = matrix(p.logits), matrix(p.gradient)
    assert logits is not None, "one stride between rows"  # noqa: S101
    return launch.row_forward(
        logits, gradient, p.target, p.loss, None, None, launch.Options(scale=p.scale),
        V=p.logits.shape[1], ignore_index=IGNORE, on=on, line=line,
    )  # fmt: skip


def runner(
    line: Line, p: Problem, on: Target, data: str, folder: Path | None = None
) -> Callable[[], Any]:
    """A function that launches the line on a problem, a cluster from `folder` where one is given.

    Raises:
        FileNotFoundError: if the folder has no such kernel.
    """
    call = call_of(line, p, on)
    if folder is None or line.programs == 1:
        return call.launch  # type: ignore[no-any-return]
    path = folder / file_of(line, p.logits.shape[1], data)
    if not path.exists():
        raise FileNotFoundError(f"{path.name} was not built; --build makes it")
    launcher = cubin.Launcher(cubin.Cubin.load(path))
    return lambda: launcher(call)


# -- checks ----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Whether a launch did what it should."""

    status: str  # "ok", or what is wrong
    loss_error: float
    gradient_error: float

    @property
    def ok(self) -> bool:
        """Whether it may be timed."""
        return self.status == "ok"


class Trial:
    """A problem with the truth of some of its rows, and the limits that PyTorch sets."""

    def __init__(self, p: Problem, *, interpreted: bool = False) -> None:
        self.p = p
        self.in_place = p.gradient.data_ptr() == p.logits.data_ptr()
        self.pristine = p.logits.clone() if self.in_place else p.logits
        N = len(p.target)
        places = torch.linspace(0, N - 1, min(N, 5)).long().tolist()
        kept, ignored = (rows.nonzero()[:, 0] for rows in (p.target != IGNORE, p.target == IGNORE))
        edges = torch.cat([kept[:2], kept[-1:], ignored[:1], ignored[-1:]])
        self.rows = torch.cat([edges, torch.tensor(places, device=edges.device)]).unique()
        self.true = self._outcome(torch.float64)
        plain = self._outcome(self.pristine.dtype)
        rounded = plain[0], plain[1].to(p.gradient.dtype)
        errors = map(tolerance.relative_error, rounded, self.true)
        dtypes = torch.float32, p.gradient.dtype
        self.allowed = right.Errors(
            *(
                tolerance.bound(error, dtype, interpreted=interpreted)
                for error, dtype in zip(errors, dtypes, strict=True)
            )
        )

    def _outcome(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the rows by PyTorch; 16-bit logits are converted, as users do."""
        logits = self.pristine[self.rows].to(dtype).requires_grad_()
        scored = logits if dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(
            scored, self.p.target[self.rows], reduction="none", ignore_index=IGNORE
        )
        (gradient,) = torch.autograd.grad(loss, logits, self.p.scale.to(loss.dtype).expand_as(loss))
        return loss.detach(), gradient

    def check(self, run: Callable[[], Any]) -> Outcome:
        """Run it once; what it wrote, and what it did not."""
        p = self.p
        p.loss.fill_(torch.nan)
        if self.in_place:
            p.logits.copy_(self.pristine)
        else:
            p.gradient.fill_(torch.nan)
        run()
        return self.judge(p.loss, p.gradient)

    def judge(self, loss: Tensor, gradient: Tensor) -> Outcome:
        """Loss (N,) and gradient (N, V), wherever they come from."""
        found = loss[self.rows], gradient[self.rows]
        errors = right.Errors(*map(tolerance.relative_error, found, self.true))
        status = "ok"
        if unwritten := [
            name for name, x in (("loss", loss), ("gradient", gradient)) if right.has_nan(x)
        ]:
            status = f"wrong: NaN, or not written, in the {' and the '.join(unwritten)}"
        elif wrong := [
            f"{name} {error:.1e}, {most:.1e} is allowed"
            for name, error, most in zip(errors._fields, errors, self.allowed, strict=True)
            if not error <= most
        ]:
            status = f"wrong: error of the {'; '.join(wrong)}"
        elif self._ignored_is_touched(gradient):
            status = "wrong: ignored rows are not zero"
        return Outcome(status, *errors)

    def _ignored_is_touched(self, gradient: Tensor) -> bool:
        ignored = (self.p.target == IGNORE).nonzero()[:, 0]
        parts = ignored.split(max(1, right.PART // gradient.shape[1]))
        return any(bool(gradient[part].any()) for part in parts)


# -- kernels for an older Triton -------------------------------------------------------------------


def to_build(on: Target) -> Iterator[tuple[int, str, Line]]:
    """Every cluster that the sweep would try."""
    for V, data in itertools.product(VOCABULARIES, DATA):
        for line in candidates(row_of(V, data), on):
            if line.programs > 1:
                yield V, data, line


def build(folder: Path, name: str) -> int:
    """Compile every cluster for a named target; those that spill are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    on = kernel_cases.target_of(name)
    triton.runtime.driver.set_active(binary.NamedTarget(kernel_cases.TARGETS[name]))
    built = 0
    for V, data, line in to_build(on):
        call = call_of(line, problem(64, V, data, 1.0, "meta"), on)
        kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
        if found := binary.read_nvidia(kernel, wide=False)["stack"]:
            print(f"{data} V = {V}, {source(line)}: {found} bytes of stack, left out")
            continue
        cubin.build(call).save(folder / file_of(line, V, data))
        built += 1
    print(f"{built} kernels for {name} in {folder}; there: python -m bench gpu --cubins {folder}")
    return 0

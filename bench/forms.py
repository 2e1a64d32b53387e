"""Time resident rows against streaming and against a copy of memory, on a GPU.

    python -m bench forms                              # the lines that the table chooses
    python -m bench forms --tune                       # and others that could take their place
    python -m bench forms --build DIR --target sm_90   # no GPU: compile them for elsewhere
    python -m bench forms --cubins DIR                 # launch what was built, whatever Triton

It ends with the fastest resident line of each size, as source for kernels/table.py.

With `--cubins` the machine's own Triton may be older than 3.8, which knows no clusters. Each form's
loss and gradient are compared with the streaming form's before it is timed. A row kernel's floor is
`(1 + f) N V` elements at the speed of a copy, measured in the same run, which moves `2 N V`; "of
copy" is that floor over the time. Times are medians; every number is written to a results file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table

from bench import binary, cubin, kernel_cases
from sgp.kernels import launch, table
from sgp.kernels.layout import matrix
from sgp.kernels.table import Line, Row, Target

RESULTS = Path(__file__).parent / "results"
VOCABULARIES = (32_000, 50_264, 128_256, 151_936, 262_144)
DATA = {  # logits, gradient
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "head": (torch.float32, torch.bfloat16),  # as in a chunk of the linear head
}
KEPT = (1.0, 0.25)
IGNORE = -100


class Contestant(NamedTuple):
    """A line of the launch table, or one that could be, on rows of V columns."""

    V: int
    data: str
    line: Line

    @property
    def words(self) -> str:
        """The line as the table's source has it."""
        line = self.line
        if line.form == "streaming":
            return f"streaming {line.BV} x {line.threads}"
        where = f"{line.BV} x {line.pieces}, {line.programs} programs of {line.threads}"
        return f"resident {where}, {line.per_multiprocessor} a multiprocessor"

    @property
    def file(self) -> str:
        """The name of its cubin."""
        return "-".join(map(str, (self.data, self.V, *self.line))) + ".cubin"


def contestants(V: int, data: str, target: Target, *, tune: bool) -> Iterator[Contestant]:
    """Streaming, the resident line of the table, and with `tune` others of its kind."""
    logits, gradient = DATA[data]
    row = Row(V, wide=V % 8 == 0, itemsize=logits.itemsize, halving=gradient != logits)
    yield Contestant(V, data, table.choose(row, target, "streaming"))
    chosen = table.choose(row, target, "auto")
    found = [chosen] if chosen.form == "resident" else []
    shapes = ((128, 2), (128, 4), (256, 1), (256, 2), (512, 1), (512, 2))
    for programs, (threads, held) in itertools.product((1, 2, 4, 8, 16), shapes if tune else ()):
        BV = 8 * threads * programs
        pieces = next((k for k in table.PIECES if BV * k >= V), None)
        if pieces and programs <= target.largest_cluster and BV * (pieces // 2) < V:
            found.append(Line("resident", BV, threads, pieces, programs, held))
    yield from (Contestant(V, data, line) for line in dict.fromkeys(found))


class Problem(NamedTuple):
    """Tensors of one size; on the meta device where nothing is to be run."""

    logits: torch.Tensor
    gradient: torch.Tensor
    target: torch.Tensor
    loss: torch.Tensor
    scale: torch.Tensor


def problem(N: int, V: int, data: str, kept: float, device: str) -> Problem:
    """N rows, every 1 / kept of them scored."""
    logits_dtype, gradient_dtype = DATA[data]
    logits = torch.empty(N, V, dtype=logits_dtype, device=device)
    gradient = torch.empty_like(logits) if data != "head" else logits.view(gradient_dtype)[:, :V]
    target = torch.empty(N, dtype=torch.int64, device=device)
    if device != "meta":
        logits.normal_(0.0, 2.0)
        target.random_(V)
        target[torch.arange(N, device=device) % round(1 / kept) != 0] = IGNORE
    loss = torch.empty(N, device=device)
    return Problem(logits, gradient, target, loss, torch.ones((), device=device))


def call_of(contestant: Contestant, p: Problem, on: Target) -> launch.Call:
    """The launch of a line, whether or not the table would choose it."""
    logits, gradient = matrix(p.logits), matrix(p.gradient)
    assert logits is not None, "one stride between rows"  # noqa: S101
    line = contestant.line
    call = launch.row_forward(
        logits, gradient, p.target, p.loss, None, None, launch.Options(scale=p.scale),
        V=contestant.V, ignore_index=IGNORE, on=on, form=line.form,
    )  # fmt: skip
    if line.form == "streaming":
        return call
    constants = call.constants | {
        "BV": line.BV,
        "PIECES": line.pieces,
        "num_ctas": line.programs,
        "num_warps": line.threads // 32,
        "maxnreg": line.registers,
    }
    return call._replace(constants=constants)


def build(folder: Path, name: str, *, tune: bool) -> int:
    """Compile every resident contestant for a named target; those that spill are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    on = kernel_cases.target_of(name)
    triton.runtime.driver.set_active(binary.NamedTarget(kernel_cases.TARGETS[name]))
    built = 0
    for V, data in itertools.product(VOCABULARIES, DATA):
        for contestant in contestants(V, data, on, tune=tune):
            if contestant.line.form == "streaming":
                continue
            call = call_of(contestant, problem(64, V, data, 1.0, "meta"), on)
            kernel = call.kernel.warmup(*call.arguments, grid=call.grid, **call.constants)
            if found := binary.read_nvidia(kernel, wide=False)["stack"]:
                print(f"{data} V = {V}, {contestant.words}: {found} bytes of stack, left out")
                continue
            cubin.build(call).save(folder / contestant.file)
            built += 1
    print(f"{built} kernels for {name} in {folder}; there: python -m bench forms --cubins {folder}")
    return 0


def measure(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call, with the L2 cache emptied before each."""
    return float(triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median"))


def copy_speed(x: torch.Tensor) -> float:
    """Bytes per millisecond of a copy, read and written."""
    copied = torch.empty_like(x)
    return 2 * x.nbytes / measure(lambda: copied.copy_(x))


def runner(contestant: Contestant, p: Problem, on: Target, folder: Path | None) -> Any:
    """A function that launches the contestant on a problem; None where it cannot be built here."""
    call = call_of(contestant, p, on)
    if contestant.line.form == "streaming" or folder is None:
        return call.launch
    path = folder / contestant.file
    if not path.exists():
        return None
    launcher = cubin.Launcher(cubin.Cubin.load(path))
    return lambda: launcher(call)


def compare(contestant: Contestant, truth: Contestant, on: Target, folder: Path | None) -> float:
    """The worst relative difference of loss and gradient from the streaming form's, on 64 rows."""
    outcomes = []
    for each in (truth, contestant):
        torch.manual_seed(0)
        p = problem(64, each.V, each.data, 0.5, "cuda")
        if p.gradient.data_ptr() != p.logits.data_ptr():
            p.gradient.fill_(torch.nan)
        p.loss.fill_(torch.nan)
        run = runner(each, p, on, folder)
        if run is None:
            return float("nan")
        run()
        outcomes.append((p.loss.double(), p.gradient.double()))
    return max(
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(outcomes[1], outcomes[0], strict=True)
    )


def run_here(N: int, folder: Path | None, output: Path, *, tune: bool) -> int:
    """Check, time, print and write; 1 if a form disagrees."""
    here = table.target_of(torch.device("cuda", torch.cuda.current_device()))
    on = here if folder is None else here._replace(triton=(3, 9))
    records: list[dict[str, Any]] = []
    for V, data in itertools.product(VOCABULARIES, DATA):
        speed = copy_speed(problem(N, V, data, 1.0, "cuda").logits)
        field = list(contestants(V, data, on, tune=tune))
        for kept, each in itertools.product(KEPT, field):
            difference = compare(each, field[0], on, folder)
            if difference != difference:  # noqa: PLR0124  (NaN: not built)
                continue
            p = problem(N, V, data, kept, "cuda")
            ms = measure(runner(each, p, on, folder))
            floor = N * V * (p.logits.itemsize * kept + p.gradient.itemsize)
            records.append(
                each._asdict()
                | {"line": each.line._asdict(), "words": each.words, "N": N, "kept": kept}
                | {"ms": ms, "of_copy": floor / speed / ms, "copy_GB_s": speed / 1e6}
                | {"difference": difference}
            )
            del p
    header = {
        "device": torch.cuda.get_device_name(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cubins": folder is not None,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record) for record in records)
    output.write_text(f'{json.dumps(header)[:-1]}, "records": [\n{lines}\n]}}\n')
    report(records, header)
    return 1 if any(record["difference"] > 1e-3 for record in records) else 0


def report(records: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """A table, and for each size the fastest resident line as launch-table source."""
    console = Console()
    shown = Table(title=f"{header['device']}, {header['date']}, Triton {header['triton']}")
    for name in ("V", "data", "kept", "line", "ms", "of copy", "to streaming"):
        shown.add_column(name, justify="left" if name == "line" else "right")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["V"], record["data"], record["kept"])
        groups.setdefault(key, []).append(record)
    fastest = []
    for (V, data, kept), group in groups.items():
        streaming = next(r["ms"] for r in group if r["line"]["form"] == "streaming")
        for r in sorted(group, key=lambda r: float(r["ms"])):
            cells = (f"{r['ms']:.3f}", f"{r['of_copy']:.0%}", f"{r['ms'] / streaming:.2f}")
            shown.add_row(str(V), data, f"{kept:.2f}", r["words"], *cells)
        resident = [r for r in group if r["line"]["form"] == "resident"]
        if resident and kept == max(KEPT):
            best = min(resident, key=lambda r: float(r["ms"]))
            numbers = ", ".join(repr(value) for value in best["line"].values())
            timed = f"{best['ms']:.3f} ms, {best['of_copy']:.0%} of copy, {header['device']}"
            fastest.append(f"Line({numbers}),  # V = {V}, {data}: {timed}, {header['date']}")
    console.print(shown)
    for line in fastest:
        console.print(line, soft_wrap=True)


def main() -> int:
    """Build, or check and time."""
    parser = argparse.ArgumentParser(
        prog="python -m bench forms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=8_192, help="rows of logits (default 8192)")
    parser.add_argument(
        "--tune", action="store_true", help="also lines that could replace the table's"
    )
    parser.add_argument("--build", type=Path, metavar="DIR", help="compile only, without a GPU")
    parser.add_argument(
        "--target",
        choices=("sm_90", "sm_100"),
        default="sm_90",
        help="what to --build for (default sm_90: H100, H200)",
    )
    parser.add_argument("--cubins", type=Path, metavar="DIR", help="launch what was built")
    parser.add_argument("--output", type=Path, help="results file (default: bench/results/)")
    arguments = parser.parse_args()
    if launch.runs_interpreted():
        parser.error("TRITON_INTERPRET=1 is set; unset it to compile")
    if arguments.build:
        return build(arguments.build, arguments.target, tune=arguments.tune)
    if not torch.cuda.is_available():
        parser.error("no GPU is visible; --build DIR compiles for one, elsewhere")
    if arguments.cubins and not arguments.cubins.is_dir():
        parser.error(f"--cubins {arguments.cubins}: no such folder; --build makes it")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    output = arguments.output or RESULTS / f"forms-{name}-{today}.json"
    return run_here(arguments.rows, arguments.cubins, output, tune=arguments.tune)


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of a linear head and its loss, forward and backward, side by side in one run.

    python -m bench head           # table and results file; on a GPU, if there is one

Contestants take turns, so that a machine that slows down slows down all of them; times are medians,
ratios are to the first line. Peak memory is the most bytes held at one time beyond the inputs and
the gradients. On a CPU the sizes fit two cores; on a GPU they are those of a large model, and the
three matmuls alone, without any loss, are the first line.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import sgp
from sgp.chunks import default_chunk_rows, extra_bytes
from sgp.train.memory import cpu_peak

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20


class Size(NamedTuple):
    """One problem: N rows of which every 1 / kept is scored."""

    N: int
    V: int
    D: int
    kept: float
    dtype: str


class Inputs(NamedTuple):
    """What every contestant reads; `hidden` and `weight` require grad."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,) int64
    selection: sgp.Selection


class Line(NamedTuple):
    """One contestant's result."""

    name: str
    milliseconds: float | None  # None: not run for time
    peak_bytes: int


CPU_SIZES = (Size(768, 32_768, 256, 0.25, "float32"),)
# Memory alone: twice the rows, and twice again; what does not fit a budget would show.
CPU_MEMORY_SIZES = tuple(Size(N, 131_072, 64, 1.0, "float32") for N in (512, 1_024, 2_048))
GPU_SIZES = (
    Size(8_192, 151_936, 4_096, 1.0, "bfloat16"),
    Size(8_192, 151_936, 4_096, 0.25, "bfloat16"),
)


def matmuls(x: Inputs) -> tuple[Tensor, Tensor]:
    """The three matmuls of the kept rows and nothing else: what no loss can be faster than."""
    with torch.no_grad():
        hidden = x.hidden[x.selection.rows]
        logits = hidden @ x.weight.t()
        return logits @ x.weight, logits.t() @ hidden


def all_rows(x: Inputs) -> Tensor:
    """PyTorch, as it is usually written."""
    return F.cross_entropy(F.linear(x.hidden, x.weight), x.labels)


def kept_rows(x: Inputs) -> Tensor:
    """PyTorch on rows gathered by hand."""
    return F.cross_entropy(F.linear(x.hidden[x.selection.rows], x.weight), x.selection.target)


def chunked(x: Inputs) -> Tensor:
    """PyTorch's own chunked head, on all rows, with its default options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


def logits_form(x: Inputs) -> Tensor:
    """`sgp.cross_entropy` on rows gathered by hand."""
    return sgp.cross_entropy(F.linear(x.hidden[x.selection.rows], x.weight), x.selection.target)


def linear_form(x: Inputs) -> Tensor:
    """`sgp.linear_cross_entropy`."""
    return sgp.linear_cross_entropy(x.hidden, x.weight, x.selection)


def contestants(device: torch.device) -> Iterator[tuple[str, Callable[[Inputs], Tensor]]]:
    """Name and loss of each contestant that this PyTorch has, the yardstick first."""
    if device.type == "cuda":
        yield "three matmuls alone", matmuls  # type: ignore[misc]
    yield "PyTorch, all rows", all_rows
    yield "PyTorch, kept rows", kept_rows
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        yield "PyTorch, chunked", chunked
    yield "sgp, kept rows", logits_form
    yield "sgp, linear", linear_form


def make_inputs(size: Size, device: torch.device) -> Inputs:
    """Random inputs of one size, the same for every contestant."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, size.dtype)
    hidden = torch.randn(size.N, size.D, generator=generator)
    weight = torch.randn(size.V, size.D, generator=generator) / size.D**0.5
    labels = torch.randint(size.V, (size.N,), generator=generator)
    labels[torch.arange(size.N) % round(1 / size.kept) != 0] = -100
    return Inputs(
        hidden.to(device, dtype).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
        labels.to(device),
        sgp.Selection.from_labels(labels).to(device),
    )


def step(loss: Callable[[Inputs], Tensor], x: Inputs) -> tuple[Tensor, ...]:
    """Loss and both gradients."""
    if loss is matmuls:
        return matmuls(x)
    return torch.autograd.grad(loss(x), (x.hidden, x.weight))


def measure(size: Size, device: torch.device, *, repetitions: int) -> list[Line]:
    """Every contestant on one size: time by turns, then peak memory."""
    x = make_inputs(size, device)
    heads = dict(contestants(device))
    times: dict[str, list[float]] = {name: [] for name in heads}
    for repetition in range(repetitions + 2):  # two to warm up
        for name, loss in heads.items():
            slow = loss is chunked and device.type == "cpu"  # seconds: run twice, at the end
            if slow and repetition < repetitions:
                continue
            _synchronize(device)
            start = time.perf_counter()
            step(loss, x)
            _synchronize(device)
            if repetition >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return [
        Line(name, statistics.median(times[name]), peak_bytes(loss, x))
        for name, loss in heads.items()
    ]


def peak_bytes(loss: Callable[[Inputs], Tensor], x: Inputs) -> int:
    """The most bytes held at one time, beyond the inputs and the two gradients."""
    gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.weight))
    if x.hidden.is_cuda:
        device = x.hidden.device
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(loss, x)
        return torch.cuda.max_memory_allocated(device) - before - gradients
    with cpu_peak() as held:
        step(loss, x)
    return (held.peak_bytes or 0) - gradients


def record(size: Size, lines: list[Line]) -> dict[str, object]:
    """One size and its lines, with the formula of the linear form's memory, for the file."""
    M = round(size.N * size.kept)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    itemsize = getattr(torch, size.dtype).itemsize
    chunk_rows = default_chunk_rows(size.V, device)
    return {
        **size._asdict(),
        "M": M,
        "kept_logits_bytes": 4 * M * size.V,
        "chunk_rows": chunk_rows,
        "formula_bytes": extra_bytes(
            M, size.N, size.V, size.D, chunk_rows=chunk_rows, itemsize=itemsize
        ),
        "lines": [line._asdict() for line in lines],
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(entry: dict[str, object], lines: list[Line]) -> Table:
    e = entry
    table = Table(
        title=f"N = {e['N']}, V = {e['V']}, D = {e['D']}, {e['dtype']}, {e['M']} rows kept",
        caption="Memory: peak beyond inputs and gradients;\nof the linear form, by its formula: "
        f"{int(str(e['formula_bytes'])) / MIB:.0f} MiB.",
    )
    for name in ("head", "ms", "ratio", "memory\nMiB", "of the kept\nrows' logits"):
        table.add_column(name, justify="left" if name == "head" else "right", no_wrap=True)
    first = lines[0].milliseconds
    for line in lines:
        timed = line.milliseconds is not None and first
        table.add_row(
            line.name,
            f"{line.milliseconds:.0f}" if timed else "not timed",
            f"{line.milliseconds / first:.2f}" if timed else "",  # type: ignore[operator]
            f"{line.peak_bytes / MIB:.0f}",
            f"{line.peak_bytes / int(str(e['kept_logits_bytes'])):.2f}",
        )
    return table


def main() -> int:
    """Measure, print the tables, write the results file."""
    parser = argparse.ArgumentParser(prog="python -m bench head", description=__doc__)
    parser.add_argument("--output", type=Path, help="results file (JSON)")
    parser.add_argument("--repetitions", type=int, default=15, help="timed runs of each")
    arguments = parser.parse_args()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} cores"
    entries = []
    for size in GPU_SIZES if on_gpu else CPU_SIZES:
        lines = measure(size, device, repetitions=arguments.repetitions)
        entries.append(record(size, lines))
        console.print(_table(entries[-1], lines))
    for size in () if on_gpu else CPU_MEMORY_SIZES:
        x = make_inputs(size, device)
        lines = [Line("sgp, linear", None, peak_bytes(linear_form, x))]
        entries.append(record(size, lines))
        console.print(_table(entries[-1], lines))
    output = arguments.output or RESULTS / f"head-{name.replace(' ', '-').lower()}-{today}.json"
    content = {
        "machine": name,
        "platform": platform.machine(),
        "date": today,
        "torch": torch.__version__.split("+")[0],
        "sizes": entries,
    }
    output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Count what loss and backward ask of memory, in units of N V elements; no GPU, no estimate.

    python -m bench traffic            # table, results file, exit code 1 if a budget breaks
    python -m bench traffic --quick    # of the long vocabularies, a few cases alone

The interpreter executes every load and store with real addresses; each is counted when asked for,
and each byte once when touched. N rows, V columns, kept fraction f. The least any implementation
can touch is (1 + f) N V: read the kept logits, write every gradient. The budget: touch at most
1.02 of that; ask for at most 1.02 of that too in the resident form, of (1 + 2 f) N V where a row
is streamed. The forms are the launch table's own choice (resident up to 4096 columns, streaming
beyond) and programs that stay, forced.

Then the same of class probabilities, in units of N V of each dtype: logits and probabilities are
asked for twice and the gradient is written, 5 N V, of which 3 N V are touched.

Of two rows, the student's and a teacher's, units are N V of the student's elements. The least is
(1 + 2 f) N V, and 2 f N V of a loss without a gradient. A KL's budget is to ask for each kept logit
of both twice at most, once without a gradient; a jsd's three times, and twice.

A last table has what the Triton kernels of other libraries ask for, where they are installed
(`pip install -e ".[rivals]"`; rival_traffic.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
from rich.console import Console
from rich.table import Table

import sgp
from bench import files, tables
from bench.proof import rival_traffic
from bench.proof.interpreter import watch_accesses
from bench.proof.rival_traffic import RivalCount
from sgp.kernels.table import ONE_BLOCK

RESULTS = files.RESULTS / "traffic.json"
VOCABULARIES = (
    *(1_000, 8_192, 8_193, 32_000, 32_896, 50_257),
    *(128_256, 131_072, 151_936, 248_320, 262_144),
)
PROBABILITIES = (1_000, 8_193, 50_257, 151_936)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMS = ("auto", "staying")
# Vocabularies of a student and a teacher, and kept rows: interpreted, long ones take seconds.
TWO_ROWS = (*itertools.product((1_000, 8_193), (0, 1, 4)), (50_257, 1), (151_936, 1))
READS = {"forward_kl": 2, "reverse_kl": 2, "jsd": 3}  # of a logit, with a gradient
N = 4
QUICK = 10_000  # the least vocabulary of which `--quick` counts a few cases alone
SLACK = 1.02


class Count(NamedTuple):
    """Elements of logits and gradient in units of N V, for loss and backward."""

    form: str
    V: int
    dtype: str
    kept: float
    asked: float
    touched: float
    least: float
    other_bytes_per_row: float

    @property
    def within_budget(self) -> bool:
        """Whether both stated budgets hold."""
        reads = 1 if self.form == "resident" else 2
        asked = self.asked <= SLACK * (1 + reads * self.kept)
        return asked and self.touched <= SLACK * self.least


class Compared(NamedTuple):
    """Elements of a student's logits, a teacher's and the gradient, in units of N V."""

    divergence: str
    V: int
    dtype: str
    kept: float
    gradient: bool  # whether it is wanted
    asked: float
    touched: float
    least: float
    other_bytes_per_row: float

    @property
    def within_budget(self) -> bool:
        """Whether both stated budgets hold, and no ignored row is read."""
        reads = READS[self.divergence] - (not self.gradient)
        asked = self.asked <= SLACK * (self.gradient + 2 * reads * self.kept)
        return asked and self.touched <= SLACK * self.least


def count(form: str, V: int, dtype: str, kept_rows: int) -> Count:
    """The traffic of `sgp.cross_entropy(...).backward()` on N rows, kept_rows of them kept."""
    os.environ["SGP_ROW_FORM"] = form
    if form == "auto":
        form = "resident" if ONE_BLOCK[-1].columns >= V else "streaming"
    logits = torch.randn(N, V).to(DTYPES[dtype]).requires_grad_()
    target = torch.full((N,), -100)
    target[:kept_rows] = torch.arange(kept_rows) % V
    with watch_accesses(distinct=True) as seen:
        sgp.cross_entropy(logits, target).backward()
    assert logits.grad is not None, "logits require grad"  # noqa: S101
    regions = [seen.of(logits), seen.of(logits.grad)]
    unit = N * V * DTYPES[dtype].itemsize
    touched = sum(seen.distinct(logits)) + sum(seen.distinct(logits.grad))
    others = [r for r in seen.regions.values() if r not in regions]
    f = kept_rows / N
    return Count(
        form=form,
        V=V,
        dtype=dtype,
        kept=f,
        asked=sum(r.loaded + r.stored for r in regions) / unit,
        touched=touched / unit,
        least=1 + f,
        other_bytes_per_row=sum(r.loaded + r.stored for r in others) / N,
    )


def compare(divergence: str, V: int, dtype: str, kept_rows: int, *, gradient: bool) -> Compared:
    """The traffic of `sgp.distillation` of N rows, kept_rows of them kept, and of its backward."""
    kind, f = DTYPES[dtype], kept_rows / N
    logits = torch.randn(N, V).to(kind).requires_grad_(gradient)
    teacher = torch.randn(N, V).to(kind)
    target = torch.full((N,), -100)
    target[:kept_rows] = torch.arange(kept_rows) % V
    with watch_accesses(distinct=True) as seen:
        loss = sgp.distillation(logits, teacher, target, divergence=divergence)
        if gradient:
            loss.backward()
    matrices = [logits, teacher] if logits.grad is None else [logits, teacher, logits.grad]
    regions = [seen.of(x) for x in matrices]
    unit = N * V * kind.itemsize
    others = [r for r in seen.regions.values() if r not in regions]
    return Compared(
        divergence,
        V,
        dtype,
        f,
        gradient,
        asked=sum(r.loaded + r.stored for r in regions) / unit,
        touched=sum(sum(seen.distinct(x)) for x in matrices) / unit,
        least=gradient + 2 * f,
        other_bytes_per_row=sum(r.loaded + r.stored for r in others) / N,
    )


class ProbabilityCount(NamedTuple):
    """Elements of logits, probabilities and gradient in units of N V, all of one dtype."""

    V: int
    dtype: str
    asked: float
    touched: float

    @property
    def within_budget(self) -> bool:
        """Whether both budgets hold."""
        return self.asked <= SLACK * 5 and self.touched <= SLACK * 3


def count_probabilities(V: int, dtype: str) -> ProbabilityCount:
    """The traffic of `sgp.cross_entropy(...).backward()` on N rows of class probabilities."""
    logits = torch.randn(N, V).to(DTYPES[dtype]).requires_grad_()
    target = torch.randn(N, V).softmax(1).to(DTYPES[dtype])
    with watch_accesses(distinct=True) as seen:
        sgp.cross_entropy(logits, target).backward()
    assert logits.grad is not None, "logits require grad"  # noqa: S101
    tensors = (logits, target, logits.grad)
    unit = N * V * DTYPES[dtype].itemsize
    asked = sum(seen.of(x).loaded + seen.of(x).stored for x in tensors)
    touched = sum(sum(seen.distinct(x)) for x in tensors)
    return ProbabilityCount(V, dtype, asked / unit, touched / unit)


def main() -> int:
    """Count every case, print the table, write the results file."""
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="results file (JSON)")
    parser.add_argument(
        "--quick", action="store_true", help="of vocabularies over 10 000, a few cases alone"
    )
    arguments = parser.parse_args()
    files.must_be_writable(arguments.output)
    os.environ["SGP_BACKEND"] = "triton"
    counts = [
        count(*c)
        for c in itertools.product(FORMS, VOCABULARIES, DTYPES, (0, 1, 2, 4))
        if not arguments.quick or c[1] < QUICK or c[3] == 1
    ]
    table = tables.make(
        "Loss and backward, upstream factor 1, in units of N V elements; other: bytes a row",
        ["form"],
        ["V", "dtype", "kept", "asked for", "touched", "least", "other bytes/row", ""],
    )
    for c in counts:
        verdict = "[green]ok" if c.within_budget else "[red]OVER"
        numbers = (f"{c.asked:.4f}", f"{c.touched:.4f}", f"{c.least:.2f}")
        other = f"{c.other_bytes_per_row:.0f}"
        table.add_row(c.form, str(c.V), c.dtype, f"{c.kept:.2f}", *numbers, other, verdict)
    console = Console()
    console.print(table)
    os.environ["SGP_ROW_FORM"] = "auto"
    spread = [count_probabilities(*c) for c in itertools.product(PROBABILITIES, DTYPES)]
    console.print(_of_probabilities(spread))
    pairs = [
        compare(kind, V, dtype, kept_rows, gradient=gradient)
        for kind, (V, kept_rows), dtype in itertools.product(READS, TWO_ROWS, DTYPES)
        for gradient in (True, False)
        if not arguments.quick or V < QUICK or (dtype == "bf16" and gradient)
    ]
    console.print(_of_two_rows(pairs))
    others = rival_traffic.count_all()
    console.print(_beside_others(others))
    arguments.output.write_text(
        f'{{"N": {N}, "records": [\n{_lines(counts)}\n], '
        f'"probabilities": [\n{_lines(spread)}\n], '
        f'"two_rows": [\n{_lines(pairs)}\n], "rivals": [\n{_lines(others)}\n]}}\n'
    )
    ours = [c for c in others if c.name == "sgp"]
    fine = all(c.asked is not None and c.asked <= SLACK * c.budget for c in ours)
    return 0 if fine and all(c.within_budget for c in (*counts, *spread, *pairs)) else 1


def _lines(counts: Sequence[Count | ProbabilityCount | Compared | RivalCount]) -> str:
    """One a line, as JSON; of ours whether it is within its budget."""
    return ",\n".join(
        json.dumps(c._asdict() | ({} if isinstance(c, RivalCount) else {"ok": c.within_budget}))
        for c in counts
    )


def _of_two_rows(counts: list[Compared]) -> Table:
    table = tables.make(
        "A student's rows and a teacher's, in units of N V elements; other: bytes a row",
        ["divergence", "gradient"],
        ["V", "dtype", "kept", "asked for", "touched", "least", "other bytes/row", ""],
    )
    for c in counts:
        verdict = "[green]ok" if c.within_budget else "[red]OVER"
        numbers = (f"{c.asked:.4f}", f"{c.touched:.4f}", f"{c.least:.2f}")
        other = f"{c.other_bytes_per_row:.0f}"
        gradient = "yes" if c.gradient else "no"
        size = (str(c.V), c.dtype, f"{c.kept:.2f}")
        table.add_row(c.divergence, gradient, *size, *numbers, other, verdict)
    return table


def _of_probabilities(counts: list[ProbabilityCount]) -> Table:
    table = tables.make(
        "Class probabilities, loss and backward, N V elements",
        [],
        ["V", "dtype", "asked for", "touched", ""],
    )
    for c in counts:
        verdict = "[green]ok" if c.within_budget else "[red]OVER"
        table.add_row(str(c.V), c.dtype, f"{c.asked:.4f}", f"{c.touched:.4f}", verdict)
    return table


def _beside_others(counts: list[RivalCount]) -> Table:
    table = tables.make(
        "Beside the Triton kernels of other libraries, N V elements asked for",
        ["library", "version", "task"],
        ["V", "kept", "asked for", "least", "kernels"],
    )
    for c in counts:
        asked = c.status if c.asked is None else f"{c.asked:.4f}"
        numbers = (str(c.V), f"{c.kept:.2f}", asked, f"{c.least:.2f}", str(c.launches))
        table.add_row(c.name, c.version or "", c.task, *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())

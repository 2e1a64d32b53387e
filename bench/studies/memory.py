"""Peak memory of every way of the linear head: what the planner says, and what was counted.

    python -m bench memory                # three minutes of a CPU core; table and results file
    python -m bench memory --device cuda  # 16 bits on a GPU, at a real size, and milliseconds

A way is forced, one call is made forward and backward, and the most bytes that were held at once
are counted, less the gradients: on a CPU from the allocator's events, with the float32 copies of
slices that only a CPU makes kept tiny. There a student's rows are not compared with a teacher's
either, which takes copies of rows that no kernel makes: zeros are written. The last column is
counted divided by planned.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sgp
from bench import files, tables
from bench.against import machine
from sgp.head import chunks, products
from sgp.head.chunks import Plan
from sgp.head.shape import OfTeachers, Shape
from sgp.rows import by_torch, two_rows
from sgp.rows.by_torch import RowOutputs
from sgp.train.memory import cpu_peak

MIB = 1 << 20
WITHIN = 0.05  # of the planned bytes
SIZE = (512, 16_384, 64)
TAUGHT = (768, 4_096, 256)  # wider hidden states, which the teacher has too
LARGE = (8_192, 128_256, 4_096)
TURNS = 7
SMALL = 1 << 13  # elements that are worked on at once where only a CPU makes copies


class Teacher(NamedTuple):
    """What a student is compared with: heads of these widths, or its few largest tokens."""

    widths: tuple[int, ...] = ()  # in eighths of the student's
    dtype: str = ""  # of the heads; "": the student's
    listed: int = 0  # K of an `sgp.TopK`
    options: tuple[tuple[str, Any], ...] = ()

    def told(self, case: Case, size: tuple[int, int, int]) -> OfTeachers:
        """What the planner is told of it."""
        _, classes, width = size
        if self.listed:
            given = dict(self.options)
            copies = ("softcap" in given) + ("temperature" in given)
            return OfTeachers(copies, listed=self.listed, is_listed=True)
        if not self.widths:
            return OfTeachers()
        widths = [x * width // 8 for x in self.widths]
        kept = DTYPES[self.dtype or case.dtype].itemsize
        operand = DTYPES[case.dtype].itemsize if case.dtype == "autocast" else kept
        copied = sum(widths) * classes * operand if case.dtype == "autocast" else 0
        return OfTeachers(1, max(widths), operand, copied)


class Case(NamedTuple):
    """What is differentiated, and of what; `kept` of the tokens carry loss."""

    dtype: str  # "bf16" | "fp16" | "fp32" | "autocast"
    kept: float
    needs: str  # "both" | "input" | "weight"
    reduction: str  # "mean" | "none" | "own": a loss of the caller's
    into: bool = False  # the weight's gradient is added to a tensor of the caller's
    teacher: str = ""  # of TEACHERS; "": a loss of labels

    def shape(self, size: tuple[int, int, int], *, is_cpu: bool) -> Shape:
        """What the planner is told."""
        tokens, classes, width = size
        weight = torch.float32 if self.dtype == "autocast" else DTYPES[self.dtype]
        scaled = self.reduction == "none" and self.needs == "input"
        late = (self.reduction == "none" and not scaled) or self.into
        teacher = TEACHERS[self.teacher]
        return Shape(
            M=round(tokens * self.kept),
            N=tokens + (len(teacher.widths) > 1),  # in another order, so never as they are
            V=classes,
            D=width,
            input_bytes=weight.itemsize,
            weight_bytes=weight.itemsize,
            operand_bytes=DTYPES[self.dtype].itemsize,
            input_grad=self.needs != "weight",
            weight_grad=self.needs != "input",
            late=late,
            scaled=scaled and not late,
            is_half=self.dtype == "fp16",
            wide=self.dtype == "fp16" and not late,
            into=self.into,
            own=self.reduction == "own",
            least=int(self.reduction == "own"),
            is_cpu=is_cpu,
            teachers=teacher.told(self, size),
        )

    def size(self, device: torch.device) -> tuple[int, int, int]:
        """(N, V, D)."""
        if device.type == "cuda":
            return LARGE
        return TAUGHT if self.teacher else SIZE


TEACHERS = {
    "": Teacher(),
    "wider": Teacher((12,)),
    "narrower": Teacher((4,)),
    "float32": Teacher((12,), "fp32"),
    "several": Teacher((12, 12)),
    "top 64": Teacher(listed=64),
    "top 64, capped": Teacher(listed=64, options=(("softcap", 30.0),)),
    "top 64, warm": Teacher(
        listed=64, options=(("temperature", 2.0), ("cross_entropy_weight", 0.5))
    ),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "autocast": torch.bfloat16,
}
CASES = (
    *(Case("bf16", kept, needs, reduction)
      for kept in (1.0, 0.25) for needs in ("both", "input", "weight")
      for reduction in ("mean", "none")),
    *(Case(dtype, kept, "both", reduction)
      for dtype in ("fp16", "fp32", "autocast") for kept in (1.0, 0.25)
      for reduction in ("mean", "none")),
    *(Case(dtype, 1.0, "input", reduction)
      for dtype in ("fp16", "fp32", "autocast") for reduction in ("mean", "none")),
    *(Case(dtype, 1.0, "weight", "none") for dtype in ("fp16", "fp32", "autocast")),
    *(Case("bf16", kept, "both", "mean", into=True) for kept in (1.0, 0.25)),
    *(Case(dtype, kept, "both", "own")
      for dtype in ("bf16", "fp16", "fp32", "autocast") for kept in (1.0, 0.9)),
    *(Case("bf16", 1.0, needs, "own") for needs in ("input", "weight")),
    *(Case(dtype, kept, "both", reduction, teacher="wider")
      for dtype in ("bf16", "fp16", "fp32", "autocast") for kept in (1.0, 0.5)
      for reduction in ("mean", "none")),
    *(Case("bf16", 0.5, needs, reduction, teacher="wider")
      for needs in ("input", "weight") for reduction in ("mean", "none")),
    *(Case("bf16", kept, "both", "mean", teacher=teacher)
      for kept in (1.0, 0.5) for teacher in TEACHERS if teacher not in ("", "wider")),
    *(Case(dtype, 0.5, "both", "none", teacher=teacher)
      for dtype in ("bf16", "fp16") for teacher in ("several", "top 64")),
)  # fmt: skip


def ways(shape: Shape) -> Iterator[Plan]:
    """One of each kind, in pieces that are small beside the whole."""
    M = shape.M
    few = M // 4
    yield chunks.by_rows(shape, M, M)
    yield chunks.by_rows(shape, few, few)
    if not shape.weight_grad:
        return
    if shape.keeps_any():
        yield chunks.by_rows(shape, few, M)
        yield chunks.by_rows(shape, few, M // 2)
    if not shape.wide and not shape.teachers.is_listed:
        yield chunks.by_slices(shape, few, shape.V // 4)
    if shape.late and not shape.teachers.is_on():
        yield chunks.hold(shape, few)


def counted(case: Case, way: Plan, size: tuple[int, int, int], device: torch.device) -> int:
    """Most bytes above the inputs and their gradients, forward and backward."""
    work, leaves = _work(case, way, size, device)
    with (
        forced(way, case, device),
        torch.autocast(device.type, torch.bfloat16, case.dtype == "autocast"),
    ):
        if device.type == "cuda":
            work()  # the first call compiles, and cuBLAS takes its workspace
            for leaf in leaves:
                leaf.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with cpu_peak() as held:
                work()
            peak = held.peak_bytes or 0
    return peak - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


def milliseconds(case: Case, way: Plan, size: tuple[int, int, int], device: torch.device) -> float:
    """The median of some turns, forward and backward, caches emptied before each."""
    work, leaves = _work(case, way, size, device)
    clock = machine.Clock(device)
    with (
        forced(way, case, device),
        torch.autocast(device.type, torch.bfloat16, case.dtype == "autocast"),
    ):
        laps = []
        for _ in range(TURNS + 1):
            for leaf in leaves:
                leaf.grad = None
            clock.start()
            work()
            clock.lap()
            laps += clock.laps()
    return statistics.median(laps[1:])


def _work(
    case: Case, way: Plan, size: tuple[int, int, int], device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
    """One call, forward and backward, and the tensors whose gradients it makes."""
    leaves, selection, upstream = _tensors(case, size, device)
    hidden, head = leaves
    options: dict[str, Any] = {"reduction": case.reduction}
    if case.into:
        options["accumulate_into"] = torch.zeros(head.shape, device=device)
    if way.way == "held":
        options["memory_budget"] = 1 << 60  # or nothing may be held

    teach = _teach(case, size, device)

    def work() -> None:
        if case.reduction == "own":
            sgp.linear_loss(hidden, head, selection, _mean(selection.num_kept)).backward()
            return
        if teach is None:
            loss = sgp.linear_cross_entropy(hidden, head, selection, **options)
        else:
            loss = teach(hidden, head, selection, reduction=case.reduction)
        loss.backward(upstream if loss.dim() else None)

    return work, leaves


def _teach(
    case: Case, size: tuple[int, int, int], device: torch.device
) -> Callable[..., Tensor] | None:
    """`sgp.linear_distillation` with the case's teacher; None: there is none."""
    teacher = TEACHERS[case.teacher]
    tokens, classes, width = size
    options = dict(teacher.options)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    if teacher.listed:
        scores = random(round(tokens * case.kept), classes).log_softmax(1)
        found, ids = scores.topk(teacher.listed)
        options["teacher_input"] = sgp.TopK(ids, found)
    elif teacher.widths:
        kind = torch.float32 if case.dtype == "autocast" else DTYPES[teacher.dtype or case.dtype]
        widths = [x * width // 8 for x in teacher.widths]
        options["teacher_input"] = [random(tokens, x).to(kind) for x in widths]
        options["teacher_weight"] = [random(classes, x).to(kind) / x**0.5 for x in widths]
        # A plan is for the case that all rows have the widest teacher.
        options["teacher_index"] = (torch.arange(tokens, device=device) % 16 == 0).long()
        if len(widths) == 1:
            options |= {"teacher_index": None}
            options |= {name: options[name][0] for name in ("teacher_input", "teacher_weight")}
    else:
        return None
    return functools.partial(sgp.linear_distillation, **options)


def _mean(kept: int) -> Callable[..., Tensor]:
    """A loss of one's own."""

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:  # noqa: ARG001
        return -tokens.log_prob / kept

    return loss_fn


@contextlib.contextmanager
def forced(way: Plan, case: Case, device: torch.device) -> Iterator[None]:
    """The planner chooses this; working copies of a CPU are small, or not made."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (products, "SLICE", SMALL),
            (products, "LEAST_SLICE", 4),
            (by_torch, "CHUNK_ELEMENTS", SMALL),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(chunks, "plan", return_value=way))
        if device.type == "cpu" and TEACHERS[case.teacher].widths:
            # No mock in its place: that would hold the logits which it is called with.
            stack.enter_context(mock.patch.object(two_rows, "implementation", _unseen))
        yield


def _unseen(logits: Tensor) -> type[_Unseen]:  # noqa: ARG001
    return _Unseen


class _Unseen:
    """Two rows that are not compared."""

    @staticmethod
    def forward(
        logits: Tensor,  # noqa: ARG004
        teacher: Tensor,  # noqa: ARG004
        dlogits: Tensor | None,
        *rest: Any,
    ) -> None:
        """Zeros for every number of these rows, the last of the arguments."""
        out: RowOutputs = rest[-1]
        out.zero_()
        if dlogits is not None:
            dlogits.zero_()

    @staticmethod
    def backward(
        logits: Tensor,  # noqa: ARG004
        teacher: Tensor,  # noqa: ARG004
        dlogits: Tensor,
        *rest: Any,  # noqa: ARG004
    ) -> None:
        """A gradient of zeros."""
        dlogits.zero_()


def _tensors(
    case: Case, size: tuple[int, int, int], device: torch.device
) -> tuple[tuple[Tensor, Tensor], sgp.Selection, Tensor]:
    tokens, classes, width = size
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if case.dtype == "autocast" else DTYPES[case.dtype]
    hidden, head = (
        torch.randn(n, width, device=device, generator=generator).to(dtype)
        for n in (tokens, classes)
    )
    target = torch.randint(classes, (tokens,), device=device, generator=generator)
    target[round(tokens * case.kept) :] = -100
    hidden.requires_grad_(case.needs != "weight")
    head.requires_grad_(case.needs != "input")
    return (hidden, head), sgp.Selection.from_labels(target), torch.ones(tokens, device=device)


def study(
    device: torch.device,
    cases: tuple[Case, ...] = CASES,
    size: tuple[int, int, int] | None = None,
) -> list[dict[str, Any]]:
    """A record for each way of each case, of (N, V, D)."""
    given, found = size, []
    for case in cases:
        size = given or case.size(device)
        if device.type == "cuda" and case.dtype == "fp32":
            continue  # ten times the time of the others at that size
        shape = case.shape(size, is_cpu=device.type == "cpu")
        for way in ways(shape):
            bytes_ = counted(case, way, size, device)
            timed = {}
            if device.type == "cuda":
                ms = milliseconds(case, way, size, device)
                timed = {"ms": ms, "predicted_ms": 1e3 * way.seconds()}
            units = way.flops / (way.padded * shape.V * shape.D)
            found.append(
                {
                    **case._asdict(),
                    "way": way.words(),
                    "planned": way.bytes,
                    "counted": bytes_,
                    "by": round(bytes_ / way.bytes, 4),
                    "mvd": round(units, 2),
                    **timed,
                }
            )
    return found


def show(records: list[dict[str, Any]]) -> Table:
    """All of them."""
    table = tables.make(
        "Most MiB beyond inputs and gradients",
        ("dtype, reduction", "gradients", "kept", "way"),
        ("planned", "counted", "by"),
    )
    for r in records:
        into = ", added" if r["into"] else ""
        into += f", {r['teacher']}" if r["teacher"] else ""
        table.add_row(
            f"{r['dtype']}, {r['reduction']}{into}", r["needs"], f"{r['kept']:g}", r["way"],
            f"{r['planned'] / MIB:.2f}", f"{r['counted'] / MIB:.2f}", f"{r['by']:.3f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Count, show, write; 1 if anything is not within 5 %."""
    parser = argparse.ArgumentParser(
        prog="python -m bench memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    device = torch.device(arguments.device)
    described = machine.describe(device)
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    path = arguments.output or files.RESULTS / f"memory-{described.slug}-{today}.json"
    files.must_be_writable(path)
    if device.type == "cpu":
        torch.set_num_threads(1)  # nothing is timed there, and tensors are small
    records = study(device)
    found: dict[str, Any] = {
        "machine": described._asdict(),
        "date": today,
        "commit": machine.commit(),
        "versions": {"torch": torch.__version__},
        "size": dict(zip("NVD", LARGE if device.type == "cuda" else SIZE, strict=True)),
        "size_with_teacher": dict(
            zip("NVD", TAUGHT if device.type == "cpu" else LARGE, strict=True)
        ),
        "records": records,
    }
    files.replace(path, json.dumps(found, indent=1) + "\n")
    Console(width=120).print(show(records))
    wrong = [r for r in records if abs(r["by"] - 1) > WITHIN]
    print(f"{len(records)} ways, {len(wrong)} not within {100 * WITHIN:.0f} %: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

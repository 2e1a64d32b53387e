"""`sgp plan`: the ways to make a head's logits, with their memory and time on paper.

The ways, their arithmetic and the choice are the planner's (`sgp/head/chunks.py`). Here those that
no budget has a use for are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from sgp.head import chunks
from sgp.head.chunks import Plan
from sgp.head.gpus import GPUS, NOMINAL, Gpu
from sgp.head.shape import OfTeachers, Shape

NAME = "sgp plan"
GIB = 1 << 30
PLAIN = "plain PyTorch: float32 logits of every row"
PLAIN_OF_BOTH = "plain PyTorch: float32 logits of every row, both models'"
LADDER = 14  # halves of the default budget that are looked at
# Of float32 operands, outside the matrix units, as PyTorch multiplies them by default; operations a
# second, of the data sheets that chunks.py has bf16's from.
FLOAT32 = {
    "a100": 19.5e12,
    "h100": 67e12,
    "h200": 67e12,
    "b200": 75e12,
    "l40s": 91.6e12,
    "4090": 82.6e12,
}


class Dtypes(NamedTuple):
    """Bytes of an element."""

    hidden: int
    weight: int
    operands: int  # of the matmuls


DTYPES = {
    "bf16": Dtypes(2, 2, 2),
    "fp16": Dtypes(2, 2, 2),
    "fp32": Dtypes(4, 4, 4),
    "autocast": Dtypes(4, 4, 2),
}


def run(arguments: argparse.Namespace) -> int:
    """Print the ways; 1 if none fits the budget."""
    a = arguments
    gpu = GPUS[a.gpu]
    if a.dtype == "fp32":
        gpu = gpu._replace(flops=FLOAT32[a.gpu])
    kept = max(1, round(a.tokens * a.kept))

    def shape(*, budgeted: bool) -> Shape:
        return shape_of(
            a.tokens, kept, a.vocab, a.width, a.dtype,
            frozen=a.frozen_head, per_token=a.per_token, budgeted=budgeted, own=a.own_loss,
            teacher=a.teacher_width,
        )  # fmt: skip

    usual, budgeted = shape(budgeted=False), shape(budgeted=True)
    chosen, refusal = None, ""
    try:
        if a.budget is None:
            chosen = chunks.plan(NAME, usual)
        else:
            budget = min(a.budget, chunks.MOST)
            chosen = chunks.plan(NAME, budgeted, memory_budget=budget)
    except ValueError as error:
        refusal = str(error)
    found = ways_of(budgeted, a.budget)
    shown = worth_showing(found if chosen is None else {*found, chosen}, gpu, chosen)

    console = Console(highlight=False)
    console.print(_what(a, kept, usual), style="bold")
    console.print(_table(shown, chosen, usual, gpu))
    console.print(f"\n{_verdict(a, chosen, usual)}\n\n{_legend(a.dtype, gpu)}")
    if refusal:
        Console(stderr=True, highlight=False).print(refusal, markup=False, soft_wrap=True)
    return 1 if refusal else 0


# -- what is asked ---------------------------------------------------------------------------------


def shape_of(
    tokens: int,
    kept: int,
    vocab: int,
    width: int,
    dtype: str = "bf16",
    *,
    frozen: bool = False,
    per_token: bool = False,
    budgeted: bool = False,
    own: int = 0,
    teacher: int = 0,
) -> Shape:
    """What the planner is asked about a call on a GPU.

    Example:
        >>> chunks.plan("here", shape_of(8192, 2048, 128_256, 4096)).words()
        'gradient kept, chunks of 1024 rows'

    Args:
        tokens, kept: N and M.
        vocab, width: V and D.
        dtype: of DTYPES.
        frozen: whether the head has no gradient.
        per_token: whether gradients come in backward, with a factor a row.
        budgeted: whether the call has a memory_budget. A float16 head's gradients are made in
            backward then, because they would wait for the loss scaler's factor in float32.
        own: of a loss of the caller's own, the tokens with loss that it needs at once.
        teacher: the width of a teacher's head of the same dtype, with which the student's is
            compared.
    """
    of, is_half = DTYPES[dtype], dtype == "fp16"
    late = per_token or (is_half and budgeted and not frozen and not own)
    copied = vocab * teacher * of.operands if of.operands != of.weight else 0
    return Shape(
        M=chunks.padded(kept, tokens),
        N=tokens,
        V=vocab,
        D=width,
        input_bytes=of.hidden,
        weight_bytes=of.weight,
        operand_bytes=of.operands,
        input_grad=True,
        weight_grad=not frozen,
        late=late,
        is_half=is_half,
        wide=is_half and not late,
        own=own > 0,
        least=chunks.padded(min(own, kept), kept),
        teachers=OfTeachers(1, teacher, of.operands, copied) if teacher else OfTeachers(),
    )


# -- ways ------------------------------------------------------------------------------------------


def ways_of(shape: Shape, budget: int | None = None) -> set[Plan]:
    """Those that the planner looks at for this budget, for its default and for smaller ones."""
    default = chunks.default_budget(shape)
    budgets = {default >> k for k in range(LADDER)} | {budget or default}
    return {way for each in budgets if each for way in chunks.ways(shape, each, held=True)}


def frontier(found: Iterable[Plan], gpu: Gpu) -> list[Plan]:
    """The smallest first; none is both larger and slower than another."""
    best: list[Plan] = []
    for way in sorted(found, key=lambda way: (way.bytes, way.seconds(gpu))):
        if not best or way.seconds(gpu) < best[-1].seconds(gpu):
            best.append(way)
    return best


def worth_showing(found: Iterable[Plan], gpu: Gpu, chosen: Plan | None) -> list[Plan]:
    """The frontier, without steps that save less time than the planner takes memory for.

    The fastest stays, and so does the chosen one, wherever it is.
    """
    best = frontier(found, gpu)
    pinned = {best[-1]} if chosen is None else {best[-1], chosen}
    shown: list[Plan] = []
    for way in sorted({*best, *pinned}, key=lambda way: way.bytes):
        last = shown[-1].seconds(gpu) if shown else float("inf")
        if way in pinned or last > chunks.AS_FAST * way.seconds(gpu):
            shown.append(way)
    return shown


def plain(shape: Shape) -> Plan:
    """`F.cross_entropy(F.linear(...).float(), ...)`, by the tensors that autograd has of it.

    At most it holds float32 log-probabilities, their gradient and that of the logits, and none of
    the results yet: 12 bytes a logit. With a teacher, by `F.kl_div`, both log-probabilities, and
    three tensors of their size while it multiplies them: 20.
    """
    s = shape._replace(M=shape.N, late=False, is_half=False, wide=False, into=False, own=False)
    logits, o = s.N * s.V, s.operand_bytes
    results = s.N * s.D * s.input_bytes + s.V * s.D * s.weight_bytes * s.weight_grad
    copy = s.V * s.D * o if o != s.weight_bytes else 0
    casts = 2 * (o + 4) if s.is_narrow() else 0
    moved = o + 8 + 4 + 12 + casts + o * (s.input_grad + s.weight_grad)
    whole = chunks.by_rows(s, s.N, s.N)
    most = max(8 * logits, 12 * logits - results)
    if s.teachers.is_on():  # its logits are written, converted, read, and their logarithms twice
        most = max(most + 4 * logits, 20 * logits - results)
        moved += o + 4 + (o + 4 if s.is_narrow() else 0) + 4 + 6 * 4
    return whole._replace(bytes=most + copy, traffic=moved * logits)


# -- what is printed -------------------------------------------------------------------------------


def _what(a: argparse.Namespace, kept: int, shape: Shape) -> str:
    tokens = f"{a.tokens} tokens, {kept} of them with loss"
    if kept != shape.M:
        tokens += f" (planned as {shape.M})"
    words = [f"{tokens}; V = {a.vocab}, D = {a.width}, {a.dtype}"]
    words += ["frozen head"] * a.frozen_head + ["gradients with a factor a token"] * a.per_token
    if a.own_loss:
        words.append(f"a loss of one's own, {a.own_loss} tokens at once")
    if a.teacher_width:
        words.append(f"a teacher of D = {a.teacher_width}")
    return ", ".join(words)


def _table(shown: list[Plan], chosen: Plan | None, shape: Shape, gpu: Gpu) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column("way")
    for heading in ("GiB", "M V D", "TFLOP", "GB moved", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [(f"{way.words()} (chosen)" if way == chosen else way.words(), way) for way in shown]
    for text, way in rows:
        table.add_row(text, *_cells(way, shape, gpu), style="bold" if way == chosen else None)
    table.add_section()
    both = PLAIN_OF_BOTH if shape.teachers.is_on() else PLAIN
    table.add_row(both, *_cells(plain(shape), shape, gpu))
    return table


def _cells(way: Plan, shape: Shape, gpu: Gpu) -> tuple[str, ...]:
    units = way.flops / (shape.M * shape.V * shape.D)
    tera, giga = way.flops / 1e12, way.traffic / 1e9
    ms = 1e3 * way.seconds(gpu)
    return _short(way.bytes / GIB), f"{units:.3g}", _short(tera), _short(giga), _short(ms)


def _short(x: float) -> str:
    """Three digits.

    Example:
        >>> _short(0.046934), _short(41.19), _short(930.96), _short(2168.6)
        ('0.0469', '41.2', '931', '2169')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".removesuffix(".")


def _verdict(a: argparse.Namespace, chosen: Plan | None, shape: Shape) -> str:
    """Under which budget, and what it leads to."""
    if a.budget is None:
        budget, given = chunks.default_budget(shape), "Without memory_budget= a call may hold"
    else:
        budget, given = a.budget, "With --budget a call may hold"
    size = f"{given} {budget} bytes"
    if budget >= GIB // 1000:
        size = f"{given} {_short(budget / GIB)} GiB ({budget} bytes)"
    if chosen is None:
        return f"{size}: none of these ways fits."
    return (
        f"{size} and takes: {chosen.words()}. Of the ways within {chunks.AS_FAST - 1:.0%} of the "
        f"fastest that fits it is the smallest, by the data sheet of {NOMINAL.name} "
        "whatever the GPU, so that all ranks agree."
    )


def _legend(dtype: str, gpu: Gpu) -> str:
    """What the columns are, and what the times are not."""
    operands = "float32" if dtype == "fp32" else "16-bit"
    return (
        "GiB: the most that is held at once beyond inputs, results and gradients. M V D: "
        "operations of the matmuls, for M tokens with loss. GB moved: logits, their gradient and "
        f"sums. ms: arithmetic, not a measurement, from the data sheet of {gpu.name}: "
        f"{gpu.flops / 1e12:g} TFLOP/s in {operands} matmuls, of which large ones reach "
        f"{gpu.reached:.0%}, and {gpu.bandwidth / 1e12:g} TB/s, of which copies reach "
        f"{gpu.copied:.0%}."
    )

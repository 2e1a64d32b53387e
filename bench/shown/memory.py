"""Memory of the head on docs/how-to/memory.md: what calls take by default, and the frontier.

The ways are the planner's arithmetic, as `sgp plan` prints it; measured points are an H100's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import tables as gpu_tables
from sgp import cli
from sgp.commands import plan
from sgp.head import chunks
from sgp.head.chunks import Plan

GIB = 1 << 30
CARD = "NVIDIA H100 80GB HBM3"
TOKENS, V, D = 8192, 128_256, 4096
FRACTIONS = (1.0, 0.25)
PROTOTYPE = "prototypes of these ways"
OURS, OURS_LATE = "sgp", "sgp, a factor a token"
OTHERS = {  # names of records: names in the picture
    "PyTorch, all rows": "PyTorch",
    "torch.compile": "torch.compile",
    "Liger": "Liger",
    "Liger, float32 sums": "Liger, float32 sums",
    "cut-cross-entropy": "cut-cross-entropy",
}


class Point(NamedTuple):
    """A measured call."""

    who: str  # of OTHERS, or one of ours
    commit: str
    gib: float
    ms: float


def ways(kept: float, *, per_token: bool) -> list[Plan]:
    """The frontier of TOKENS x V x D in bf16 on an H100, by data sheet."""
    shape = plan.shape_of(TOKENS, round(kept * TOKENS), V, D, per_token=per_token, budgeted=True)
    return plan.frontier(plan.ways_of(shape), chunks.NOMINAL)


def default(kept: float, *, per_token: bool) -> Plan:
    """What the same call takes without a budget."""
    shape = plan.shape_of(TOKENS, round(kept * TOKENS), V, D, per_token=per_token)
    return chunks.plan("bench", shape)


def measured() -> tuple[list[gpu_tables.File], dict[float, list[Point]]]:
    """The files of the card, and their points by kept fraction; of equal ones the fastest."""
    of_card = [file for file in gpu_tables.newest() if file[1]["machine"]["name"] == CARD]
    best: dict[tuple[float, str, str, float], float] = {}
    for _, head, records in of_card:
        for r in records:
            who = _who(r["name"])
            size = (r["phase"], r.get("V"), r.get("N"), r.get("D")) == ("head", V, TOKENS, D)
            if size and who and "memory_bytes" in r:
                key = (r["kept"], who, head["commit"], r["memory_bytes"] / GIB)
                best[key] = min(r["both_ms"], best.get(key, float("inf")))
    points: dict[float, list[Point]] = {kept: [] for kept in FRACTIONS}
    for (kept, who, commit, gib), ms in best.items():
        points[kept].append(Point(who, commit, gib, ms))
    return of_card, points


def _who(name: str) -> str:
    """Whose a record is; "" for those that are not shown, such as labels, which wait."""
    if name.endswith("(prototype)"):
        return PROTOTYPE
    if name.startswith("sgp"):
        late = "reduction none" in name
        return "" if "labels" in name else OURS_LATE if late else OURS
    return OTHERS.get(name, "")


def picture() -> Path:
    """Where the frontier is drawn, beside the newest file of the card."""
    path = measured()[0][0][0]
    return path.with_name(f"{path.stem}-frontier.png")


def fingerprint() -> str:
    """Of all that the picture shows."""
    shown = [(ways(f, per_token=x), default(f, per_token=x)) for f in FRACTIONS for x in (0, 1)]
    text = json.dumps([shown, measured()[1]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- blocks ----------------------------------------------------------------------------------------

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all of 8192 tokens carry loss", {}),
    ("a quarter of them", {"kept": 2048}),
    ("all of 32 768", {"tokens": 32_768, "kept": 32_768}),
    ("all of 8192, the head frozen", {"frozen": True}),
    ("all of 8192, a factor a token", {"per_token": True}),
    ("all of 8192, float16", {"dtype": "fp16"}),
    ("all of 8192, autocast", {"dtype": "autocast"}),
)


def defaults(up: str) -> str:
    """What calls take without a budget."""
    del up
    lines = ["| a call where | makes its logits in | GiB | matmuls |", "|---|---|--:|--:|"]
    for name, what in CASES:
        shape = plan.shape_of(**{"tokens": TOKENS, "kept": TOKENS, "vocab": V, "width": D} | what)
        taken = chunks.plan("bench", shape)
        units = taken.flops / (shape.M * V * D)
        gib = f"{taken.bytes / GIB:.2f}"
        lines.append(f"| {name} | {taken.words()} | {gib} | `{units:g} M V D` |")
    source = (
        f"V = {gpu_tables.spaced(V)}, D = {D}; bf16 where nothing else is said. `python -m bench "
        "report` asks the planner."
    )
    return "\n".join([*lines, "", source])


def frontier(up: str) -> str:
    """The picture, and what is in it."""
    of_card, _ = measured()
    sources = "; ".join(
        f"commit {head['commit']}, {head['date']} ([every record]({up}bench/results/{path.name}))"
        for path, head, _ in of_card
    )
    gpu = chunks.NOMINAL
    alt = "Time against memory of the head, every token kept and a quarter"
    text = (
        f"{TOKENS} tokens, V = {gpu_tables.spaced(V)}, D = {D}, bf16. Lines are arithmetic from "
        f"the data sheet of an {gpu.name}, not a measurement. Points were measured on an {CARD}: "
        f"{sources}. A prototype is in no version."
    )
    return f"![{alt}]({up}bench/results/{picture().name})\n\n{text}"


def command(up: str) -> str:
    """What `sgp plan` prints."""
    del up
    words = ["plan", "--tokens", str(TOKENS), "--kept", "0.25", "--vocab", str(V)]
    words += ["--width", str(D)]
    with _columns(100), contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(words)
    lines = [f"$ sgp {' '.join(words)}", "", *said.getvalue().strip().splitlines()]
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """A terminal of this width, for what is printed on none."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


BLOCKS: dict[str, Callable[[str], str]] = {
    "defaults": defaults, "frontier": frontier, "plan": command,
}  # fmt: skip

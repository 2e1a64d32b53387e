"""Memory of the head, way by way: what calls take by default, the frontier, what was measured.

The ways are the planner's arithmetic, as `sgp plan` prints it. They were measured on the card of
the newest `ways-*.jsonl`, and other libraries on an H100.
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

from bench import tables
from bench.gpu import tables as gpu_tables
from bench.shown import page
from sgp import cli
from sgp.commands import plan
from sgp.head import chunks
from sgp.head.chunks import Plan
from sgp.head.gpus import GPUS, Gpu

GIB = 1 << 30
Record = dict[str, Any]
TOKENS, V, D = 8192, 128_256, 4096
FRACTIONS = (1.0, 0.25)
DATA_SHEET = GPUS["h200"]  # of the lines, as of the measured ways
OTHERS_CARD = "NVIDIA H100 80GB HBM3"
OURS, OURS_LATE = "sgp", "sgp, a factor a token"
OTHERS = {  # names of records: names in the picture
    "PyTorch, all rows": "PyTorch",
    "torch.compile": "torch.compile",
    "Liger": "Liger",
    "Liger, float32 sums": "Liger, float32 sums",
    "cut-cross-entropy": "cut-cross-entropy",
}
KINDS = {"mean": "a mean", "none": "a factor a token", "log-probs": "log-probabilities"}
CLOSE = 0.01  # of the planned bytes; what was counted farther away is named


class Point(NamedTuple):
    """A measured call."""

    who: str  # OURS, OURS_LATE or of OTHERS
    gib: float
    ms: float


def frontier_of(kept: float, *, per_token: bool, gpu: Gpu = DATA_SHEET) -> list[Plan]:
    """The frontier of TOKENS x V x D in bf16, by data sheet."""
    shape = plan.shape_of(TOKENS, round(kept * TOKENS), V, D, per_token=per_token, budgeted=True)
    return plan.frontier(plan.ways_of(shape), gpu)


def default(kept: float, *, per_token: bool) -> Plan:
    """What the same call takes without a budget."""
    shape = plan.shape_of(TOKENS, round(kept * TOKENS), V, D, per_token=per_token)
    return chunks.plan("bench", shape)


def studied() -> tuple[Path, Record, list[Record]]:
    """(path, header, records) of the newest file of every way on a GPU."""
    path = max(page.RESULTS.glob("ways-*.jsonl"), key=lambda p: p.stem[-10:])
    head, *records = map(json.loads, gpu_tables.whole_lines(path))
    assert [head["size"][x] for x in "NVD"] == [TOKENS, V, D], path  # noqa: S101
    return path, head, records


def of_others() -> list[gpu_tables.File]:
    """The files in which other libraries are."""
    return [file for file in gpu_tables.newest() if file[1]["machine"]["name"] == OTHERS_CARD]


def measured() -> dict[float, list[Point]]:
    """By kept fraction, ours before others; of equal ones the fastest."""
    best: dict[tuple[float, str, float], float] = {}

    def add(kept: float, who: str, size: int, ms: float) -> None:
        key = (kept, who, size / GIB)
        best[key] = min(ms, best.get(key, float("inf")))

    for r in studied()[2]:
        if r["kind"] in ("mean", "none") and is_shown(r) and r["words"] and not is_frozen(r):
            who = OURS_LATE if r["kind"] == "none" else OURS
            add(r["M"] / TOKENS, who, r["extra_bytes"], r["ms"])
    for _, _, records in of_others():
        for r in records:
            size = (r["phase"], r.get("V"), r.get("N"), r.get("D")) == ("head", V, TOKENS, D)
            if size and r["name"] in OTHERS and "memory_bytes" in r:
                add(r["kept"], OTHERS[r["name"]], r["memory_bytes"], r["both_ms"])
    points: dict[float, list[Point]] = {kept: [] for kept in FRACTIONS}
    for (kept, who, gib), ms in best.items():
        points[kept].append(Point(who, gib, ms))
    return points


def is_frozen(r: Record) -> bool:
    """Whether the head has no gradient."""
    return not all(r.get("needs", (True,)))


def is_shown(r: Record) -> bool:
    """A call whose memory was counted, with the width that the package has inside a matmul."""
    return "extra_bytes" in r and ", weight by " not in r["name"]


def picture() -> Path:
    """Where the frontier is drawn, beside the file of the ways."""
    path = studied()[0]
    return path.with_name(f"{path.stem}-frontier.png")


def fingerprint() -> str:
    """Of all that the picture shows."""
    shown = [
        (frontier_of(f, per_token=x), default(f, per_token=x)) for f in FRACTIONS for x in (0, 1)
    ]
    text = json.dumps([shown, measured()])
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
    path, head, _ = studied()
    theirs = "; ".join(
        f"commit {other['commit']}, {other['date']} ([every record]({up}bench/results/{x.name}))"
        for x, other, _ in of_others()
    )
    alt = "Time against memory of the head, every token kept and a quarter"
    text = (
        f"{TOKENS} tokens, V = {gpu_tables.spaced(V)}, D = {D}, bf16. Lines are arithmetic from "
        f"the data sheet of an {DATA_SHEET.name}, not a measurement. Diamonds are these ways, "
        f"measured on an {head['machine']['name']}: {_origin(head, path, up)}. Crosses are other "
        f"libraries, and were measured on another card, an {OTHERS_CARD}: {theirs}. Compare a time "
        "of one card with one of the other only roughly."
    )
    return f"![{alt}]({up}bench/results/{picture().name})\n\n{text}"


def _origin(head: Record, path: Path, up: str) -> str:
    versions = head["versions"]
    return (
        f"commit {head['commit']}, {head['date']}, torch {versions['torch']}, Triton "
        f"{versions['triton']} ([every record]({up}bench/results/{path.name}))"
    )


def measured_ways(up: str) -> str:
    """Every way that was forced on a GPU: time, memory, and the memory that was planned."""
    path, head, records = studied()
    order = sorted(records, key=lambda r: (-r["M"], is_frozen(r), [*KINDS].index(r["kind"])))
    rows = [_row(r, records) for r in order if is_shown(r) or "extra_bytes" not in r]
    table = gpu_tables.Table(
        "", ("kept", "gradients of", "way"), ("ms", "GiB", "GiB planned"), rows
    )
    checked = [r["errors"] for r in records if r.get("errors")]
    apart = max(max(column) / min(column) - 1 for column in zip(*checked, strict=True))
    twice = [r["same_bits"] for r in records if "same_bits" in r]
    left_out = sum("extra_bytes" in r and not is_shown(r) for r in records)
    source = (
        f"{head['machine']['name']}, {_origin(head, path, up)}. {TOKENS} tokens, V = "
        f"{gpu_tables.spaced(V)}, D = {D}, bf16; forward and backward; nothing else was measured "
        f"beside it. {'Every' if all(twice) else 'Not every'} call gave the same bits twice, and "
        f"the {len(checked)} that were compared with float64 have errors that differ by at most "
        f"{100 * apart:.2g} % from one another. {left_out} records with other widths inside the "
        f"weight's matmul are not shown. {_beyond(records)}"
    )
    return f"{gpu_tables.for_page(table)}\n\n{source}"


def _row(r: Record, records: list[Record]) -> tuple[str, ...]:
    of = KINDS[r["kind"]] + (", head frozen" if is_frozen(r) else "")
    words = r.get("words")
    if words is None:  # what the planner chose is the way that holds as much
        same = (r["M"], r["kind"], r.get("extra_bytes"))
        alike = (
            x["words"] for x in records
            if x.get("words") and (x["M"], x["kind"], x["extra_bytes"]) == same
        )  # fmt: skip
        names = {
            "default": f"by default: {next(alike, '')}",
            "labels, default": "by default, from labels, whose count it waits for",
            "accumulate_into, default": "by default, added to a tensor of the caller's",
        }
        words = names[r["name"]]
    size, planned = (r.get(key) for key in ("extra_bytes", "planned"))
    return (
        f"{r['M'] / TOKENS:g}", of, words, tables.ms(r["ms"]),
        f"{size / GIB:.3f}" if size else "", f"{planned / GIB:.3f}" if planned else "",
    )  # fmt: skip


def _beyond(records: list[Record]) -> str:
    """How far the plan is from what was counted."""
    by = [(r["extra_bytes"] / r["planned"] - 1, r) for r in records if r.get("planned")]
    far = [(share, r) for share, r in by if share > CLOSE]
    close = max(abs(share) for share, _ in by if share <= CLOSE)
    said = f"What was counted is within {100 * close:.1g} % of the plan"
    if not far:
        return f"{said}."
    assert all(r["M"] < TOKENS and r["words"].startswith("slices") for _, r in far)  # noqa: S101
    more = max(r["extra_bytes"] - r["planned"] for _, r in far)
    return (
        f"{said}, but for {len(far)} with slices and a quarter kept: they hold {more / 2**20:.0f} "
        f"MiB more, up to {100 * max(share for share, _ in far):.0f} %."
    )


def counted(up: str) -> str:
    """How far the plan is from what a CPU's allocator was asked for."""
    every = ((p, json.loads(p.read_text())) for p in page.RESULTS.glob("memory-*.json"))
    on_cpu = [(p, x) for p, x in every if x["machine"]["device"] == "cpu"]
    path, found = max(on_cpu, key=lambda file: file[0].stem[-10:])
    records, size = found["records"], found["size"]
    largest = max(records, key=lambda r: abs(r["by"] - 1))
    over = "more" if largest["by"] > 1 else "less"
    fewest = min(r["by"] for r in records)
    below = (
        "none holds less"
        if fewest >= 1
        else f"the one that holds least has {fewest:.3f} times its plan"
    )
    taught, wide = sum(r["teacher"] != "" for r in records), found["size_with_teacher"]
    return (
        f"On a CPU, {len(records)} cases were counted: every way in bf16, float16, float32 and "
        f"autocast, with {size['N']} tokens, V = {gpu_tables.spaced(size['V'])} and "
        f"D = {size['D']}; {taught} of them with a teacher, with {wide['N']} tokens, "
        f"V = {gpu_tables.spaced(wide['V'])} and D = {wide['D']}. The farthest from its plan holds "
        f"{100 * abs(largest['by'] - 1):.1f} % {over} ({largest['way']}, {largest['dtype']}), and "
        f"{below}. `python -m bench memory`, "
        f"{found['machine']['name']}, {found['date']}, torch {found['versions']['torch']} "
        f"([every record]({up}bench/results/{path.name}))."
    )


def today(kind: str, kept: float, way: str = "") -> list[Record]:
    """Measured ways of a head that is trained, whose words begin so; "" for the default."""
    return [
        r for r in studied()[2]
        if r["kind"] == kind and r["M"] == round(kept * TOKENS) and is_shown(r)
        and not is_frozen(r)
        and (r["words"] or "").startswith(way) and (way or r["name"] == "default")
    ]  # fmt: skip


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
    "defaults": defaults, "frontier": frontier, "counted": counted, "ways": measured_ways,
    "plan": command,
}  # fmt: skip

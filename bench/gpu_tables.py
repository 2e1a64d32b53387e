"""Records of `python -m bench gpu` as tables: on the terminal, and in README and docs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich.markup import escape

from bench import tables

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
Record = dict[str, Any]


class Table(NamedTuple):
    """A heading, columns of text, columns of numbers, rows."""

    title: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    rows: list[tuple[str, ...]]


def load(path: Path) -> tuple[Record, list[Record]]:
    """The header and the records of a file."""
    head, *records = map(json.loads, whole_lines(path))
    if "phase" in head or any("phase" not in r for r in records):
        raise ValueError("its first line is no header, or another line no record")
    return head, records


def whole_lines(path: Path) -> list[str]:
    """Without a last one that was cut off."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def newest(folder: Path = RESULTS) -> list[tuple[Path, Record, list[Record]]]:
    """(path, header, records) of the newest file of each card, dry runs left out."""
    found: dict[str, tuple[Path, Record, list[Record]]] = {}
    for path in sorted(folder.glob("gpu-*.jsonl"), key=lambda p: p.stem[-10:]):
        head, records = load(path)
        if not head["dry_run"]:
            found[head["machine"]["name"]] = (path, head, records)
    return [found[name] for name in sorted(found)]


# -- cells -----------------------------------------------------------------------------------------


def spaced(n: float) -> str:
    """Thousands apart.

    Example:
        >>> spaced(151_936)
        '151 936'
    """
    return f"{n:_}".replace("_", " ")


def percent(x: float | None) -> str:
    """Of a share; empty where there is none."""
    return "" if x is None else f"{100 * x:.0f} %"


def _ms(x: float | None) -> str:
    return "" if x is None else tables.ms(x)


def _gib(x: float | None) -> str:
    return "" if x is None else f"{x / GIB:.2f}"


def _us(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}"


# -- tables ----------------------------------------------------------------------------------------


def of_rows(records: list[Record]) -> Table:
    """The row kernels."""
    return Table(
        "The row kernel alone: share of a copy's bandwidth",
        ("V", "data", "kept", "kernel"),
        ("ms", "of copy"),
        [
            (spaced(r["V"]), r["data"], f"{r['kept']:g}", r["name"], _ms(r["ms"]),
             percent(r["of_copy"]))
            for r in _by_size(r for r in records if r["phase"] == "rows" and "ms" in r)
        ],
    )  # fmt: skip


def of_sweep(records: list[Record]) -> Table:
    """The fastest of each kind and size."""
    best: dict[tuple[Any, ...], Record] = {}
    for r in records:
        if r["phase"] == "sweep" and "ms" in r:
            key = (r["V"], r["data"], r["kept"], r["name"])
            if key not in best or r["ms"] < best[key]["ms"]:
                best[key] = r
    return Table(
        "The fastest line of each kind of row kernel",
        ("V", "data", "kept", "kernel", "line"),
        ("ms", "of copy"),
        [
            (spaced(r["V"]), r["data"], f"{r['kept']:g}", r["name"], r["source"], _ms(r["ms"]),
             percent(r["of_copy"]))
            for r in _by_size(best.values())
        ],
    )  # fmt: skip


def _by_size(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r["data"], r["V"], -r["kept"], r["ms"]))


def of_calls(records: list[Record]) -> Table:
    """Whole calls from logits."""
    return _of_cases("Whole calls from logits: forward and backward", "calls", records)


def of_head(records: list[Record]) -> Table:
    """The linear head."""
    return _of_cases(
        "The linear head: time, and memory beyond inputs and gradients", "head", records
    )


def of_log_probs(records: list[Record]) -> Table:
    """Log-probabilities."""
    return _of_cases("Log-probabilities", "logprobs", records)


def _of_cases(title: str, phase: str, records: list[Record]) -> Table:
    found = [r for r in records if r["phase"] == phase and r.get("both_ms")]
    found.sort(key=lambda r: (r["form"], r["V"], -r["kept"], r["pattern"], r["both_ms"]))
    rows = [
        (
            r["form"],
            spaced(r["V"]),
            f"{r['kept']:g}{' scattered' if r['pattern'] == 'scattered' else ''}",
            r["name"],
            _ms(r.get("forward_ms")),
            _ms(r["both_ms"]),
            _gib(r.get("memory_bytes")),
        )
        for r in found
    ]
    return Table(title, ("form", "V", "kept", "who"), ("forward ms", "both ms", "GiB"), rows)


def of_host(records: list[Record]) -> Table:
    """Python's own time."""
    found = [r for r in records if r["phase"] == "host" and "both_us" in r]
    rows = [(r["form"], r["name"], _us(r.get("forward_us")), _us(r["both_us"])) for r in found]
    title = "What a call costs the host, in microseconds"
    return Table(title, ("form", "who"), ("forward", "with backward"), rows)


def of_loops(records: list[Record]) -> Table:
    """Calls that nothing waits for."""
    found = [r for r in records if r["phase"] == "host" and "loop_ms" in r]
    rows = [(spaced(r["V"]), r["name"], _ms(r["loop_ms"])) for r in found]
    return Table("Calls in a loop, forward and backward", ("V", "who"), ("ms a call",), rows)


def of_train(records: list[Record]) -> Table:
    """A model's training step."""
    found = [r for r in records if r["phase"] == "train" and "ms" in r]
    rows = [(f"{r['kept']:g}", r["name"], _ms(r["ms"]), _gib(r.get("memory_bytes"))) for r in found]
    title = "A training step of a small Qwen2, forward and backward"
    return Table(title, ("kept", "who"), ("ms", "GiB"), rows)


def of_checks(records: list[Record]) -> Table:
    """How much was checked, and how each phase ended."""
    rows = []
    for phase in dict.fromkeys(r["phase"] for r in records):
        mine = [r for r in records if r["phase"] == phase]
        count = {ok: sum(r["ok"] is ok for r in mine) for ok in (True, False)}
        end = next((r for r in mine if r["name"] == "the phase"), {})
        status = end.get("status", "")
        seconds = f"{end['seconds']:.0f}" if "seconds" in end else ""
        rows.append((phase, status, str(count[True]), str(count[False]), seconds))
    return Table("What was checked", ("phase", "it ended"), ("right", "not right", "s"), rows)


def others(records: list[Record]) -> Table:
    """Who is missing, failed or was refused, and what was not run."""
    found = [r for r in records if r["ok"] is None and r.get("status", "ok") != "ok"]
    rows = dict.fromkeys((r["phase"], r["name"], r["status"][:60]) for r in found)
    return Table("Not in the tables", ("phase", "who", "why"), (), [*rows])


OF: tuple[Callable[[list[Record]], Table], ...] = (
    of_rows, of_sweep, of_calls, of_head, of_log_probs, of_host, of_loops, of_train, others,
    of_checks,
)  # fmt: skip


def tables_of(records: list[Record]) -> list[Table]:
    """Those that have rows."""
    return [found for found in (of(records) for of in OF) if found.rows]


def for_terminal(table: Table) -> rich.table.Table:
    """As every command of this folder shows one."""
    shown = tables.make(table.title, table.left, table.right)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def for_page(table: Table) -> str:
    """As Markdown."""
    lines = [
        f"| {' | '.join((*table.left, *table.right))} |",
        "|" + "---|" * len(table.left) + "--:|" * len(table.right),
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in table.rows)])


def fastest(head: Record, records: list[Record]) -> list[str]:
    """For each size the fastest line, as source for kernels/table.py."""
    best: dict[tuple[Any, ...], Record] = {}
    for r in records:
        if r["phase"] == "sweep" and "ms" in r and "line" in r and r["kept"] == 1.0:
            key = (r["V"], r["data"])
            if key not in best or r["ms"] < best[key]["ms"]:
                best[key] = r
    where = "a dry run, no time means anything" if head["dry_run"] else head["machine"]["name"]
    return [
        f"{r['source']},  # timed {r['ms']:.3f} ms, {percent(r['of_copy'])} of a copy, "
        f"V = {spaced(V)}, {data}, {where}, {head['date']}"
        for (V, data), r in best.items()
    ]

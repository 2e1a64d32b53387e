"""Records of `python -m bench gpu` as tables: on the terminal, and in README and docs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich.markup import escape

from bench import files, tables

RESULTS = files.RESULTS
GIB = 1 << 30
Record = dict[str, Any]
File = tuple[Path, Record, list[Record]]  # with its header


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


def newest(folder: Path = RESULTS) -> list[File]:
    """(path, header, records) of the newest file of each card and commit, dry runs left out.

    Of a card the newest comes first.
    """
    found: dict[tuple[str, str], File] = {}
    paths = folder.glob("gpu-*.jsonl")
    for path in sorted(paths, key=lambda p: (p.stem[-10:], p.stem), reverse=True):
        head, records = load(path)
        if not head["dry_run"]:
            found.setdefault((head["machine"]["name"], head["commit"]), (path, head, records))
    return sorted(found.values(), key=_card)


def _card(file: File) -> str:
    return str(file[1]["machine"]["name"])


def by_card(found: list[File]) -> list[tuple[list[File], list[Record]]]:
    """The files of each card, and their records; but for the newest's, names say which commit's."""
    cards = []
    for files_of_card in (list(group) for _, group in itertools.groupby(found, _card)):
        (_, _, records), *earlier = files_of_card
        for _, head, more in earlier:
            commit = head["commit"]
            records = records + [
                r | {"name": f"{r['name']}, commit {commit}", "commit": commit} for r in more
            ]
        cards.append((files_of_card, records))
    return cards


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


def ms(x: float | None) -> str:
    """Of a time; empty where there is none."""
    return "" if x is None else tables.ms(x)


def gib(x: float | None) -> str:
    """Of bytes; empty where there are none."""
    return "" if x is None else f"{x / GIB:.2f}"


def _us(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}"


# -- tables ----------------------------------------------------------------------------------------


def who(r: Record) -> str:
    """The name, and which run where there were several."""
    return r["name"] if r.get("run", 1) == 1 else f"{r['name']} (run {r['run']})"


def of_rows(records: list[Record]) -> Table:
    """The row kernels."""
    return Table(
        "The row kernel alone: share of a copy's bandwidth",
        ("V", "data", "kept", "kernel"),
        ("ms", "of copy"),
        [
            (spaced(r["V"]), r["data"], f"{r['kept']:g}", who(r), ms(r["ms"]),
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
            (spaced(r["V"]), r["data"], f"{r['kept']:g}", r["name"], r["source"], ms(r["ms"]),
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


def of_two_rows(records: list[Record]) -> Table:
    """The kernel of a student's rows and a teacher's."""
    found = [r for r in records if r["phase"] == "distil" and "of_copy" in r]
    found.sort(key=lambda r: (r["data"], r["V"], -r["kept"], r["ms"]))
    rows = [
        (r["divergence"], spaced(r["V"]), r["data"], f"{r['kept']:g}", ms(r["ms"]),
         percent(r["of_copy"]))
        for r in found
    ]  # fmt: skip
    title = "The kernel of two rows alone: share of a copy's bandwidth"
    return Table(title, ("divergence", "V", "data", "kept"), ("ms", "of copy"), rows)


def of_distil(records: list[Record]) -> Table:
    """A teacher's head beside a student's."""
    return _of_cases(
        "Distillation through both heads: time, and memory beyond inputs and gradients",
        "distil", records,
    )  # fmt: skip


def _of_cases(title: str, phase: str, records: list[Record]) -> Table:
    found = [r for r in records if r["phase"] == phase and r.get("both_ms")]
    found.sort(key=lambda r: (r["form"], r["V"], -r["kept"], r["pattern"], r["both_ms"]))
    rows = [
        (
            r["form"],
            spaced(r["V"]),
            f"{r['kept']:g}{' scattered' if r['pattern'] == 'scattered' else ''}",
            who(r),
            ms(r.get("forward_ms")),
            ms(r["both_ms"]),
            gib(r.get("memory_bytes")),
        )
        for r in found
    ]
    return Table(title, ("form", "V", "kept", "who"), ("forward ms", "both ms", "GiB"), rows)


def of_host(records: list[Record]) -> Table:
    """Python's own time."""
    found = [r for r in records if r["phase"] == "host" and "both_us" in r]
    rows = [(r["form"], who(r), _us(r.get("forward_us")), _us(r["both_us"])) for r in found]
    title = "What a call costs the host, in microseconds"
    return Table(title, ("form", "who"), ("forward", "with backward"), rows)


def of_loops(records: list[Record]) -> Table:
    """Calls that nothing waits for."""
    found = [r for r in records if r["phase"] == "host" and "loop_ms" in r]
    rows = [(spaced(r["V"]), who(r), ms(r["loop_ms"])) for r in found]
    return Table("Calls in a loop, forward and backward", ("V", "who"), ("ms a call",), rows)


def of_train(records: list[Record]) -> Table:
    """A model's training step."""
    found = [r for r in records if r["phase"] == "train" and "ms" in r]
    rows = [(f"{r['kept']:g}", who(r), ms(r["ms"]), gib(r.get("memory_bytes"))) for r in found]
    title = "A training step of a small Qwen2, forward and backward"
    return Table(title, ("kept", "who"), ("ms", "GiB"), rows)


def of_matmuls(records: list[Record]) -> Table:
    """The head's matmuls alone."""
    found = [r for r in records if r["phase"] == "matmul"]
    rows = [
        (
            r["name"],
            f"{spaced(r['rows'])} rows" if "rows" in r else f"{spaced(r['columns'])} columns",
            ms(r["ms"]),
            f"{r['TFLOP_per_s']:.0f}",
        )
        for r in found
    ]
    title = "The head's matmuls, by rows of a chunk or columns of a slice"
    return Table(title, ("product", "size"), ("ms", "TFLOP/s"), rows)


def of_traffic(records: list[Record]) -> Table:
    """What a profiler read from the memory's counters."""
    found = [r for r in records if r["phase"] == "nsight"]
    rows = [
        (
            r["name"],
            r["data"],
            f"{r['dram_read_bytes'] / 1e9:.2f}",
            f"{r['dram_write_bytes'] / 1e9:.2f}",
            str(r["registers"]),
        )
        for r in found
    ]
    title = "Memory traffic at V = 151 936 by Nsight Compute"
    return Table(title, ("kernel", "data"), ("GB read", "GB written", "registers"), rows)


def of_checks(records: list[Record]) -> Table:
    """How much was checked, and how each phase ended."""
    rows = []
    for phase, commit in dict.fromkeys((r["phase"], r.get("commit")) for r in records):
        mine = [r for r in records if (r["phase"], r.get("commit")) == (phase, commit)]
        count = {ok: sum(r["ok"] is ok for r in mine) for ok in (True, False)}
        end = next((r for r in mine if r["name"] == "the phase"), {})
        status = end.get("status", "")
        seconds = f"{end['seconds']:.0f}" if "seconds" in end else ""
        name = f"{phase}, commit {commit}" if commit else phase
        rows.append((name, status, str(count[True]), str(count[False]), seconds))
    return Table("What was checked", ("phase", "it ended"), ("right", "not right", "s"), rows)


def others(records: list[Record]) -> Table:
    """Who is missing, failed or was refused, and what was not run."""
    found = [r for r in records if r["ok"] is None and r.get("status", "ok") != "ok"]
    rows = dict.fromkeys((r["phase"], r["name"], r["status"][:60]) for r in found)
    return Table("Not in the tables", ("phase", "who", "why"), (), [*rows])


OF: tuple[Callable[[list[Record]], Table], ...] = (
    of_rows, of_sweep, of_traffic, of_calls, of_head, of_matmuls, of_log_probs, of_two_rows,
    of_distil, of_host, of_loops, of_train, others, of_checks,
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


# -- pages -----------------------------------------------------------------------------------------

COLUMNS = {  # of the summary: who is in them, by names of records
    "sgp": ("sgp", "sgp, fused"),
    "prototype": (),  # the fastest whose name says so
    "Liger": ("Liger",),
    "quack": ("quack",),
    "CCE": ("cut-cross-entropy",),
    "torch.compile": ("torch.compile",),
    "PyTorch": ("PyTorch, all rows", "PyTorch"),
}


def origin(head: Record, path: str) -> str:
    """What was measured, where and when."""
    versions = head["versions"]
    return (
        f"{head['machine']['name']}, {head['date']}, commit {head['commit']}, torch "
        f"{versions['torch']}, Triton {versions['triton']}; [every record]({path})"
    )


def summary(records: list[Record]) -> str:
    """The main figures, as Markdown; what several runs had is given as a range."""
    rows = []
    for V in (32_000, 128_256, 151_936):
        name = f"row kernel, V = {spaced(V)}: of a copy"
        size = {"V": V, "data": "bf16", "kept": 1.0}
        rows.append((name, cells_of(records, ("rows", "sweep"), "of_copy", percent, size)))
    for V in (32_000, 128_256, 151_936):
        name = f"forward and backward, V = {spaced(V)}: ms"
        rows.append((name, cells_of(records, ("calls",), "both_ms", ms, {"V": V, "kept": 1.0})))
    size = {"form": "logits"}
    rows.append(
        (
            "host, forward and backward: microseconds",
            cells_of(records, ("host",), "both_us", _us, size),
        )
    )
    for kept in (1.0, 0.25):
        size = {"V": 128_256, "kept": kept}
        for what, key, cell in (("ms", "both_ms", ms), ("extra GiB", "memory_bytes", gib)):
            name = f"head, V = 128 256, f = {kept:g}: {what}"
            rows.append((name, cells_of(records, ("head",), key, cell, size)))
    for what, key, cell in (("ms", "ms", ms), ("GiB", "memory_bytes", gib)):
        cells = cells_of(records, ("train",), key, cell, {"kept": 1.0})
        rows.append((f"training step, Qwen2: {what}", cells))
    used = [i for i in range(len(COLUMNS)) if any(cells[i] for _, cells in rows)]
    headings = [name for i, name in enumerate(COLUMNS) if i in used]
    body = [(name, *(cells[i] for i in used)) for name, cells in rows if any(cells)]
    return for_page(Table("", ("",), tuple(headings), body))


def cells_of(
    records: list[Record],
    phases: tuple[str, ...],
    key: str,
    cell: Callable[[float], str],
    size: Record,
) -> list[str]:
    """One cell for each of COLUMNS; the best of the prototypes."""
    found = [
        r
        for r in records
        if r["phase"] in phases and key in r and all(r.get(k) == v for k, v in size.items())
    ]
    cells = []
    for column, names in COLUMNS.items():
        mine = [r for r in found if r["name"] in names and r["phase"] == phases[0]]
        if column == "prototype":
            ideas = [r for r in found if "(prototype)" in r["name"]]
            mine = sorted(ideas, key=lambda r: float(r.get("both_ms") or r["ms"]))[:1]
        values = sorted(r[key] for r in mine)
        ends = list(dict.fromkeys(cell(x) for x in (values[:1] + values[-1:])))
        cells.append(" to ".join(ends))
    return cells


def page(found: list[File], up: str = "") -> str:
    """Every table of every card, for docs; `up` leads from the page to the root."""
    parts = []
    for files_of_card, records in by_card(found):
        parts.append(f"## {_card(files_of_card[0])}")
        for path, head, _ in files_of_card:
            source = origin(head, f"{up}bench/results/{path.name}")
            parts.append(f"{source}. {head.get('note', '')}")
        for table in tables_of(records):
            parts += [f"### {table.title}", for_page(table)]
    return "\n\n".join(part.strip() for part in parts)

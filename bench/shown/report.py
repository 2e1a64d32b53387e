"""From results files to the tables of README and docs, and to pictures.

    python -m bench report            # rewrite the tables and the pictures
    python -m bench report --check    # exit code 1 if the tables are not what it would write

A table stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` on any page.

For each machine the newest results file of `python -m bench compare` counts, and for each card and
commit that of `python -m bench gpu`. What nobody measured is said to be not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import files, tables
from bench.gpu import tables as gpu_tables
from bench.shown import memory, page, readme

ROOT = files.ROOT
MIB = 1 << 20
TITLES = {
    "logits": "From logits",
    "linear": "Head and loss, from hidden states",
}
BOUNDS = {
    "logits": "the bytes that must move at a copy's speed",
    "linear": "the bare matmuls of the kept rows",
}


def render(
    found: list[tuple[Path, dict[str, Any]]],
    root: Path = ROOT,
    *,
    gpus: Sequence[gpu_tables.File] = (),
    up: str = "",
) -> str:
    """Each machine's main tables, from files of `compare` and of `gpu`."""
    parts = [_gpu(*each, root, up) for each in gpu_tables.by_card([*gpus])]
    if not gpus and all(content["machine"]["device"] == "cpu" for _, content in found):
        parts.append("**On a GPU: not measured yet.** No GPU was at hand; no speed is claimed.")
    for path, content in found:
        parts.append(_machine(f"{up}{path.relative_to(root).as_posix()}", content))
    return "\n\n".join(parts)


def _gpu(of_card: list[gpu_tables.File], records: list[dict[str, Any]], root: Path, up: str) -> str:
    origins = "; ".join(
        gpu_tables.origin(head, f"{up}{path.relative_to(root).as_posix()}")
        for path, head, _ in of_card
    )
    what = (
        f"**On a GPU** ({origins}; [all tables and cards](gpu.md)). sgp is that of the "
        "first commit named here, a prototype is in no version. bf16, 8192 rows or tokens; f is "
        "the kept fraction, 1 where none is given; a range is that of several runs."
    )
    return f"{what}\n\n{gpu_tables.summary(records)}"


def _machine(path: str, content: dict[str, Any]) -> str:
    versions = content["versions"]
    machine = content["machine"]
    on_cpu = machine["device"] == "cpu"
    cores = machine["name"].replace("cores", "CPU cores")
    what = f"{cores} ({machine['cpu']})" if on_cpu else machine["name"]
    note = " sgp's kernels do not run here, its PyTorch operators do." if on_cpu else ""
    note += ' "Kept rows": gathered by hand before; "memory": beyond inputs and weight gradients.'
    origin = f"[results]({path}); torch {versions['torch']}, {content['date']}"
    parts = [f"**On {what}** (`python -m bench compare`, {origin}):{note}"]
    parts += [_table(record) for record in _shown(content["cases"])]
    stem = path.removesuffix(".json")
    parts.append(f"![Time and memory of the head, against three axes]({stem}-linear.png)")
    logits, roofline = f"[from logits]({stem}-logits.png)", f"[roofline]({stem}-roofline.png)"
    parts.append(f"More pictures: {logits}, {roofline}.")
    return "\n\n".join(parts)


def _shown(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One case a form: the first at a quarter kept."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kept"] == 0.25:
            found.setdefault(record["form"], record)
    return [found[form] for form in ("linear", "logits") if form in found]


def _table(record: dict[str, Any]) -> str:
    model = record["model"]
    size = f"V = {model['V']:_}, ".replace("_", " ")
    size += f"D = {model['D']:_}, ".replace("_", " ") if "linear" in record["form"] else ""
    title = (
        f"{TITLES[record['form']]}: {model['name']}, {size}N = {record['N']}, "
        f"{record['dtype']}, a quarter of the rows kept; bound {tables.ms(record['bound_ms'])} ms, "
        f"{BOUNDS[record['form']]}"
    )
    lines = [
        title,
        "",
        "| | forward | backward | both | to the best other | to the bound | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    timed = [r for r in record["rivals"] if r["both_ms"]]
    best = min((r["both_ms"] for r in timed if not r["rival"].startswith("sgp")), default=None)
    for r in sorted(timed, key=lambda r: float(r["both_ms"])):
        cells = (
            r["rival"],
            f"{tables.ms(r['forward_ms'])} ms",
            f"{tables.ms(r['backward_ms'])} ms",
            f"{tables.ms(r['both_ms'])} ms",
            f"{r['both_ms'] / best:.2f}" if best else "",
            f"{r['both_ms'] / record['bound_ms']:.2f}",
            f"{r['memory_bytes'] / MIB:.0f} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    others: dict[str, list[str]] = {}
    for r in record["rivals"]:
        if not r["both_ms"]:
            others.setdefault(r["status"], []).append(r["rival"])
    notes = [f"{', '.join(names)}: {status}" for status, names in others.items()]
    lines += ["", f"Not in the table: {'; '.join(notes)}."] if notes else []
    return "\n".join(lines)


def machines(up: str) -> str:
    """As a block of a page."""
    return render(files.newest(), gpus=gpu_tables.newest(), up=up)


BLOCKS = {**page.BLOCKS, **readme.BLOCKS, **memory.BLOCKS, "machines": machines}


def pages() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(path: Path) -> str:
    """A page's text with its tables as the results files have them.

    Raises:
        ValueError: if a table begins and does not end.
    """
    text = path.read_text()
    up = "../" * (len(path.relative_to(ROOT).parts) - 1)
    for name, block in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        if found:
            if end not in rest:
                raise ValueError(f"{path}: {begin} without {end}")
            text = f"{before}{begin}\n{block(up)}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    texts = {path: filled(path) for path in pages()}
    changed = [path for path, text in texts.items() if path.read_text() != text]
    if arguments.check:
        print("run `python -m bench report`" if changed else "the tables are the results files'")
        return 1 if changed else 0
    files.must_have_matplotlib()
    from bench.shown import frontier, plots  # noqa: PLC0415  (matplotlib is optional)

    for path, content in files.newest():
        for picture in plots.draw(content, path.with_suffix("")):
            print(f"wrote {picture}")
    print(f"wrote {frontier.draw()}")
    for path in changed:
        path.write_text(texts[path])
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

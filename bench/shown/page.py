"""The tables of the pages in docs, from the newest results of the commands that have a page."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from bench import files, tables
from bench.gpu import tables as gpu_tables

ROOT = files.ROOT
PAGE = ROOT / "docs" / "selective-gradients.md"
TOOLS = ROOT / "docs" / "hugging-face.md"
GPU = ROOT / "docs" / "gpu.md"
PAGES = (PAGE, TOOLS, GPU)
RESULTS = files.RESULTS
MIB = 1 << 20


def newest(kind: str) -> tuple[Path, dict[str, Any]]:
    """The newest results file of a command."""
    path = max(RESULTS.glob(f"{kind}-*.json"), key=lambda p: p.stem[-10:])
    return path, json.loads(path.read_text())


def recall() -> str:
    """Held-out accuracy, first, middle and last."""
    path, found = newest("recall")
    exact, detach = found["curves"]["exact"], found["curves"]["detach"]
    lines = ["| step | exact | detached |", "|---|---|---|"]
    for i in (0, len(exact) // 2, len(exact) - 1):
        cells = (f"{100 * curve[i]['accuracy']:.1f} %" for curve in (exact, detach))
        lines.append(f"| {exact[i]['step']} | {' | '.join(cells)} |")
    guessing = 100 * found["guessing"]
    source = (
        f"Held-out accuracy; guessing has {guessing:.1f} %. `python -m bench recall`, "
        f"{found['seconds']:.0f} s on {found['machine']['name']} "
        f"([results](../bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


def context() -> str:
    """Time and memory of each way, beside one pass."""
    path, found = newest("context")
    size = found["size"]
    lines = ["| context | way | time | | memory | |", "|---|---|---|---|---|---|"]
    for r in found["records"]:
        one = next(
            o for o in found["records"] if (o["context"], o["way"]) == (r["context"], "one pass")
        )
        lines.append(
            f"| {100 * r['context']:.0f} % | {r['way']} | {tables.ms(r['ms'])} ms | "
            f"{r['ms'] / one['ms']:.2f} | {r['peak_bytes'] / MIB:.0f} MiB | "
            f"{r['peak_bytes'] / one['peak_bytes']:.2f} |"
        )
    source = (
        f"A Llama of {size['layers']} layers, D = {size['D']}, {size['B']} x {size['T']} tokens, "
        f"float32, {found['machine']['name']} ({found['machine']['cpu']}); ratios are to one pass. "
        f"`python -m bench context` ([results](../bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


def sft() -> str:
    """TRL's trainer beside sgp's."""
    path, found = newest("sft")
    size = found["size"]
    lines = ["| trainer | 8 steps | of TRL's time |", "|---|---|---|"]
    for name, ratio in (("TRL", 1.0), ("sgp", found["ratio"])):
        seconds = statistics.median(found["seconds"][name])
        module = "trl" if name == "TRL" else "sgp.trl"
        lines.append(f"| `{module}.SFTTrainer` | {seconds:.1f} s | {ratio:.2f} |")
    source = (
        f"A Llama of {size['layers']} layers, D = {size['D']}, V = {size['V']}, "
        f"{size['B']} x {size['T']} tokens, {100 * size['kept']:.0f} % kept, float32, "
        f"{found['machine']['name']} ({found['machine']['cpu']}), TRL {found['versions']['trl']}; "
        f"the losses differ by {found['apart']:.0e} at most. `python -m bench sft` "
        f"([results](../bench/results/{path.name}))."
    )
    return "\n".join([*lines, "", source])


def gpu() -> str:
    """What was measured on GPUs."""
    return gpu_tables.page(gpu_tables.newest())


def filled(text: str) -> str:
    """A page with its tables and its picture's name."""
    for name, block in (("recall", recall), ("context", context), ("sft", sft), ("gpu", gpu)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{block()}\n{end}{rest.partition(end)[2]}"
    picture = newest("recall")[0].with_suffix(".png").name
    return re.sub(r"(!\[[^]]*\]\(\.\./bench/results/)[^)]+", rf"\g<1>{picture}", text)

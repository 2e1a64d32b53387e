"""What the README says was measured: its status, what the loss is worth, and where others win."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from bench import files, tables
from bench.gpu import tables as gpu_tables
from bench.shown import memory, page

Record = dict[str, Any]
COLUMNS = ("sgp", "PyTorch", "torch.compile", "Liger", "CCE")
PHASES = {  # of `python -m bench gpu`, in words
    "rows": "row kernels", "calls": "calls from logits", "head": "the head",
    "logprobs": "log-probabilities", "train": "a training step", "host": "the host's time",
}  # fmt: skip


def status(up: str) -> str:
    """Where it was tested, measured and compiled."""
    measured = []
    for path, head, records in gpu_tables.newest():
        phases = {r["phase"] for r in records}
        what = ", ".join(words for phase, words in PHASES.items() if phase in phases)
        card = f"one [{head['machine']['name']}]({up}bench/results/{path.name})"
        measured.append(f"    * {card}, {head['date']}, commit {head['commit']}: {what}.")
    path, head, _ = memory.studied()
    card = f"one [{head['machine']['name']}]({up}bench/results/{path.name})"
    what = "every way of the head, alone"
    measured.append(f"    * {card}, {head['date']}, commit {head['commit']}: {what}.")
    found = json.loads((page.RESULTS / "resources.json").read_text())["records"]
    targets = list(dict.fromkeys(r["target"] for r in found))
    words = {2: "two", 3: "three", 4: "four", 5: "five"}
    count = words.get(len(targets), str(len(targets)))
    lines = [
        "**Status**",
        "",
        "* **Tested** on CPUs on every change; there the kernels run in Triton's interpreter.",
        "* **Measured** on",
        *measured,
        f"* **Compiled** for {count} targets without a GPU: {', '.join(targets)}.",
        "* **Not on the package index.** Install it from a clone.",
    ]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _cells(
    records: list[Record], phase: str, key: str, cell: Callable[[float], str], **size: object
) -> list[str]:
    values = gpu_tables.cells_of(records, (phase,), key, cell, size)
    shown = dict(zip(gpu_tables.COLUMNS, values, strict=True))
    return [shown[name] for name in COLUMNS]


def worth(up: str) -> str:
    """The head and a training step on the first card, a quarter of the tokens kept and all."""
    path, head, records = gpu_tables.newest()[0]
    rows = []
    for kept, words in ((0.25, "a quarter kept"), (1.0, "all kept")):
        size = {"V": 128_256, "kept": kept}
        for what, key, cell in (
            ("time, ms", "both_ms", gpu_tables.ms),
            ("extra memory, GiB", "memory_bytes", gpu_tables.gib),
        ):
            rows.append((f"head, {words}: {what}", _cells(records, "head", key, cell, **size)))
    for kept, words in ((0.25, "a quarter kept"), (1.0, "all kept")):
        for what, key, cell in (
            ("time, ms", "ms", gpu_tables.ms),
            ("peak memory, GiB", "memory_bytes", gpu_tables.gib),
        ):
            cells = _cells(records, "train", key, cell, kept=kept)
            rows.append((f"training step, {words}: {what}", cells))
    body = [(name, *cells) for name, cells in rows if any(cells)]
    table = gpu_tables.for_page(gpu_tables.Table("", ("",), COLUMNS, body))
    source = (
        f"Forward and backward in bf16, 8192 tokens, on one {head['machine']['name']} "
        f"([every record]({up}bench/results/{path.name})). The head has V = 128 256 and "
        "D = 4096; the training step is a small Qwen2 with V = 151 936. An empty cell was not "
        "measured. `torch.compile` computes every row, whatever is kept. "
        f"{_now(head['commit'], up)}"
    )
    return f"{table}\n\n{source}"


def _now(commit: str, up: str) -> str:
    """The head of the newest file of ways, which was measured alone."""
    _, head, _ = memory.studied()
    (every,), (quarter,) = (memory.today("mean", kept) for kept in (1.0, 0.25))
    return (
        f"sgp is that of commit {commit}. Its head of commit {head['commit']} was measured on "
        f"another card, an {head['machine']['name']}, without others beside it: "
        f"{tables.ms(quarter['ms'])} ms in {gpu_tables.gib(quarter['extra_bytes'])} GiB with a "
        f"quarter kept, and {tables.ms(every['ms'])} ms in {gpu_tables.gib(every['extra_bytes'])} "
        f"GiB with all ([every way]({up}docs/benchmarks/gpu.md#every-way-of-the-head))."
    )


def slower(up: str) -> str:
    """Where others were faster or smaller, from the same files."""
    _, head, records = gpu_tables.newest()[0]
    lines = [*_head(head, records), *_logits(records), *_log_probs(records, up), *_host(up)]
    return "\n".join(f"* {line}" for line in lines)


def _head(head: Record, records: list[Record]) -> Iterator[str]:
    def ms(name: str) -> float:
        return _best(records, "head", "both_ms", name, V=128_256, kept=1.0)

    where = f"on the {head['machine']['name'].split()[1]} at commit {head['commit']}"
    newer = memory.studied()[1]
    there = f"The head of commit {newer['commit']}, on an {newer['machine']['name']} and alone,"
    ours, theirs = ms("sgp"), ms("torch.compile")
    if theirs < ours:
        yield (
            f"With every token kept, `torch.compile` of the plain head takes {tables.ms(theirs)} "
            f"ms and ours {tables.ms(ours)} ms, {where}."
        )
    ours, theirs = ms("sgp, reduction none"), ms("PyTorch, all rows")
    if theirs < ours < float("inf"):
        held = _times(memory.today("none", 1.0, "logits held"))
        yield (
            f'With `reduction="none"` and every token kept, our head takes {tables.ms(ours)} ms '
            f"{where}. Plain PyTorch takes {tables.ms(theirs)} ms, with a mean. {there} takes "
            f"{_times(memory.today('none', 1.0, 'slices'))} ms in slices, and {held} ms where "
            "`memory_budget=` has room to hold the logits."
        )
    names = ("sgp", "Liger", "cut-cross-entropy")
    sizes = [_best(records, "head", "memory_bytes", x, V=128_256, kept=0.25) for x in names]
    if max(sizes[1:]) < sizes[0]:
        every, quarter = (
            min(memory.today("mean", kept, "slices"), key=lambda r: (r["extra_bytes"], r["ms"]))
            for kept in (1.0, 0.25)
        )
        yield (
            "Liger and cut-cross-entropy (CCE) need less memory for the head: "
            f"{gpu_tables.gib(sizes[1])} and {gpu_tables.gib(sizes[2])} GiB with a quarter "
            f"kept, {where}. With `memory_budget=` ours needs less than by default. {there} takes "
            f"{tables.ms(quarter['ms'])} ms in {gpu_tables.gib(quarter['extra_bytes'])} GiB with a "
            f"quarter kept, and {tables.ms(every['ms'])} ms in "
            f"{gpu_tables.gib(every['extra_bytes'])} GiB with all, in slices."
        )


def _times(records: list[Record]) -> str:
    """From the least to the most."""
    least, most = (tables.ms(f(r["ms"] for r in records)) for f in (min, max))
    return least if least == most else f"{least} to {most}"


def _logits(records: list[Record]) -> Iterator[str]:
    measured = {(r["V"], r["kept"]) for r in records if r["phase"] == "calls" and "both_ms" in r}
    for V, kept in sorted(measured, key=lambda case: (-case[1], case[0])):
        names = ("sgp", "Liger", "quack", "torch.compile")
        times = {x: _best(records, "calls", "both_ms", x, V=V, kept=kept) for x in names}
        ahead = sorted((t, name) for name, t in times.items() if t < times["sgp"])
        if ahead:
            share = "every token" if kept == 1 else f"{kept:.0%} of the tokens"
            listed = ", ".join(f"{name} {tables.ms(t)} ms" for t, name in ahead)
            yield (
                f"From logits with V = {gpu_tables.spaced(V)} and {share} kept, our call takes "
                f"{tables.ms(times['sgp'])} ms. Faster: {listed}."
            )


def _log_probs(records: list[Record], up: str) -> Iterator[str]:
    ours, theirs = (_best(records, "logprobs", "both_ms", name, form="log-probs", V=32_000)
                    for name in ("sgp", "torch.compile"))  # fmt: skip
    if theirs < ours:
        yield (
            f"Log-probabilities from logits with V = 32 000 take {tables.ms(ours)} ms, and "
            f"{tables.ms(theirs)} ms with `torch.compile`."
        )
    for _, card, found in gpu_tables.newest():
        size = {"form": "linear log-probs", "kept": 1.0}
        ours, theirs = (_best(found, "logprobs", "both_ms", name, **size)
                        for name in ("sgp", "PyTorch, all rows"))  # fmt: skip
        if theirs < ours < float("inf"):
            yield (
                "Log-probabilities through the head, with gradients and every token kept, take "
                f"{tables.ms(ours)} ms on an {card['machine']['name']} at commit "
                f"{card['commit']}. Plain PyTorch takes {tables.ms(theirs)} ms, and more memory."
                f"{_log_probs_now(card)}"
            )
    for path, content in files.newest():
        ratios = [_ratio(c) for c in content["cases"] if "log-probs" in c["form"]]
        if content["machine"]["device"] == "cpu" and ratios and min(ratios) > 1:
            yield (
                f"On a CPU, log-probabilities take {min(ratios):.2f} to {max(ratios):.2f} times "
                "as long as plain PyTorch on gathered rows "
                f"([results]({up}bench/results/{path.name})){_own_loss(up)}."
            )


def _log_probs_now(card: Record) -> str:
    """A later run on the same card, if there is one."""
    newer = memory.studied()[1]
    if newer["machine"]["name"] != card["machine"]["name"]:
        return ""
    slices, held = (
        _times(memory.today("log-probs", 1.0, way)) for way in ("slices", "logits held")
    )
    return (
        f" At commit {newer['commit']}, in a later run there without PyTorch, ours take {slices} "
        f"ms in slices, and {held} ms where `memory_budget=` has room to hold the logits."
    )


def _host(up: str) -> Iterator[str]:
    path, host = page.newest("host")
    spent = {c["call"]: c["both_us"] for c in host["calls"] if c["status"] == "ok"}
    ours, theirs = spent["mean"], spent["F.cross_entropy"]
    if theirs < ours:
        yield (
            f"A call, forward and backward, costs the host {ours:.0f} microseconds, where "
            f"`F.cross_entropy` costs {theirs:.0f} ([counted without a GPU]"
            f"({up}bench/results/{path.name})). Small losses gain nothing."
        )


def _best(records: list[Record], phase: str, key: str, name: str, **size: object) -> float:
    found = [
        float(r[key])
        for r in records
        if r["phase"] == phase and r["name"] == name and r.get(key)
        and all(r.get(k) == v for k, v in size.items())
    ]  # fmt: skip
    return min(found, default=float("inf"))


def _own_loss(up: str) -> str:
    """The same of a loss of one's own."""
    path = max(files.RESULTS.glob("*-own-loss.json"))
    ratios = [_ratio(case) for case in json.loads(path.read_text())["cases"]]
    return (
        f", and `linear_loss` takes {min(ratios):.2f} to {max(ratios):.2f} times as long "
        f"([results]({up}bench/results/{path.name}))"
    )


def _ratio(case: Record) -> float:
    times = {r["rival"]: r["both_ms"] for r in case["rivals"]}
    return float(times["sgp"] / times["PyTorch, kept rows"])


BLOCKS: dict[str, Callable[[str], str]] = {"status": status, "worth": worth, "slower": slower}

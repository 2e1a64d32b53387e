"""Pictures of a results file: sweeps of each form, and the roofline of the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.against import measure
from bench.against.cases import JSD, KL, OWN, Case, Model

MIB = 1 << 20
COLORS = {  # of seaborn's colorblind palette: sgp is the dark blue
    "sgp": "#0173b2",
    "sgp, in place": "#56b4e9",
    "sgp, small budget": "#56b4e9",
    "sgp, logits held": "#56b4e9",
    "sgp, kept rows": "#029e73",
    "PyTorch, kept rows": "#de8f05",
    "PyTorch, all rows": "#949494",
    "torch.compile": "#5a3e1b",
    "F.linear_ce, auto": "#d55e00",
    "F.linear_ce, 1k rows": "#8c1c13",
    "Liger": "#cc78bc",
    "cut-cross-entropy": "#fbafe4",
    "quack": "#c9b800",
    "flash-linear-attention": "#7f6d5f",
    "TRL": "#333333",
    "sgp, log-probs first": "#56b4e9",
    "Liger, chunked": "#cc78bc",
}
MARKERS = dict(zip(COLORS, "oDPs^vX<>dph*H812"[: len(COLORS)], strict=True))
BOUNDS = {
    "logits": "bound: its bytes at a copy's speed",
    "linear": "bound: the bare matmuls of the kept rows",
}
Record = dict[str, Any]


def draw(content: dict[str, Any], stem: Path) -> list[Path]:
    """Write the pictures of a results file; their paths."""
    mpl.use("Agg")
    written = []
    for form in ("linear", "logits"):
        records = [r for r in content["cases"] if r["form"] == form]
        if any(len(found) > 1 for *_, found in axes_of(form, records)):
            written.append(_sweeps(form, records, content, stem))
    written.append(_roofline(content, stem))
    return written


def axes_of(form: str, records: list[Record]) -> list[tuple[str, str, list[Record]]]:
    """(label, key, records along it) of the three sweeps, each the longest there is."""

    def along(key: Callable[[Record], Any], rest: Callable[[Record], Any]) -> list[Record]:
        groups: dict[Any, dict[Any, Record]] = {}
        for record in records:
            groups.setdefault(rest(record), {}).setdefault(key(record), record)
        longest = max(groups.values(), key=len, default={})
        return [longest[value] for value in sorted(longest)]

    def plain(record: Record) -> tuple[Any, ...]:
        return record["dtype"], record["pattern"]

    width = (lambda r: r["model"]["name"]) if form == "linear" else (lambda r: r["model"]["V"])
    return [
        (
            "kept fraction",
            "kept",
            along(lambda r: r["kept"], lambda r: (*plain(r), width(r), r["N"])),
        ),
        (
            "vocabulary",
            "V",
            along(lambda r: r["model"]["V"], lambda r: (*plain(r), r["kept"], r["N"])),
        ),
        ("tokens", "N", along(lambda r: r["N"], lambda r: (*plain(r), width(r), r["kept"]))),
    ]


def _value(record: Record, key: str) -> float:
    return float(record["model"]["V"] if key == "V" else record[key])


def _sweeps(form: str, records: list[Record], content: dict[str, Any], stem: Path) -> Path:
    sweeps = [sweep for sweep in axes_of(form, records) if len(sweep[2]) > 1]
    figure, grid = plt.subplots(
        2, len(sweeps), figsize=(4.6 * len(sweeps), 7.4), squeeze=False, layout="constrained"
    )
    names: dict[str, Any] = {}
    for column, (label, key, found) in enumerate(sweeps):
        time, memory = grid[0][column], grid[1][column]
        for rival, color in COLORS.items():
            points = [
                (_value(record, key), r)
                for record in found
                for r in record["rivals"]
                if r["rival"] == rival and r["both_ms"]
            ]
            if not points:
                continue
            x = [at for at, _ in points]
            ours = rival == "sgp"
            style = {"color": color, "marker": MARKERS[rival], "markersize": 8 if ours else 5}
            # Lines that coincide: ours is wide and beneath, the others let it shine through.
            style |= {"linewidth": 4 if ours else 1.4, "alpha": 1.0 if ours else 0.85}
            style |= {"zorder": 3 if ours else 4}
            (names[rival],) = time.plot(x, [r["both_ms"] for _, r in points], **style)
            memory.plot(x, [r["memory_bytes"] / MIB for _, r in points], **style)
        bounds = [record["bound_ms"] for record in found]
        at = [_value(record, key) for record in found]
        (names[BOUNDS[form]],) = time.plot(at, bounds, color="black", linestyle=":", linewidth=1.4)
        time.set_ylabel("forward and backward, ms")
        beyond = "inputs and\nweight gradients" if form == "linear" else "inputs"
        memory.set_ylabel(f"memory beyond {beyond}, MiB")
        for axes in (time, memory):
            _dress(axes, at, label)
        _logarithmic(time)
        memory.set_ylim(bottom=0)
        time.set_title(_what(found[0], key), fontsize=9)
    legend = dict(sorted(names.items(), key=lambda item: item[0] == BOUNDS[form]))
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    machine = content["machine"]["name"]
    titles = {"linear": "Head and loss, from hidden states", "logits": "Loss, from logits"}
    on_cpu = content["machine"]["device"] == "cpu"
    note = " (sgp runs PyTorch's operators there, not its kernels)" if on_cpu else ""
    figure.suptitle(f"{titles[form]} · {machine}, {content['date']}{note}")
    path = stem.parent / f"{stem.name}-{form}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _what(record: Record, swept: str) -> str:
    model = record["model"]
    size = model["name"] if record["form"] == "linear" else f"V = {model['V']:_}".replace("_", " ")
    parts = [] if swept == "V" else [size]
    parts += [f"N = {record['N']}"] if swept != "N" else []
    parts += [f"kept {record['kept']:g}"] if swept != "kept" else []
    return ", ".join([*parts, record["dtype"]])


def _dress(axes: Axes, ticks: list[float], label: str) -> None:
    if label != "vocabulary":
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_xticks(ticks)
    axes.tick_params("x", rotation=45 if label == "vocabulary" else 0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True, which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(b=False)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(x: float) -> str:
    return f"{x / 1000:.0f}k" if x >= 10_000 else f"{x:g}"


def case_of(record: Record) -> Case:
    """The case of a record."""
    fields = {name: record[name] for name in Case._fields}
    return Case(**fields | {"model": Model(**record["model"])})


def _roofline(content: dict[str, Any], stem: Path) -> Path:
    """FLOPs a second against FLOPs a compulsory byte, under the two roofs that were measured."""
    roofs = content["roofs"]
    bandwidth, rate = roofs["copy_bytes_per_s"], roofs["matmul_flops_per_s"]
    figure, axes = plt.subplots(figsize=(7.4, 5.0), layout="constrained")
    ridge = rate / bandwidth
    intensities = [case.flops / _moved(case) for case in map(case_of, content["cases"])]
    span = (min([*intensities, ridge]) / 2, 4 * max([*intensities, ridge]))
    axes.plot(
        [span[0], ridge, span[1]], [span[0] * bandwidth, rate, rate], color="black", linewidth=1.4
    )
    markers = {
        "logits": "o", "linear": "s", "log-probs": "^", "linear log-probs": "D", OWN: "P", KL: "X",
        JSD: "p",
    }  # fmt: skip
    for record in content["cases"]:
        case = case_of(record)
        for rival in ("PyTorch, kept rows", "sgp"):
            ms = next((r["both_ms"] for r in record["rivals"] if r["rival"] == rival), None)
            if ms:
                axes.plot(
                    case.flops / _moved(case),
                    1e3 * case.flops / ms,
                    markers[case.form],
                    color=COLORS[rival],
                    markersize=6,
                    alpha=0.75,
                )
    shown = {record["form"] for record in content["cases"]}
    for form, marker in markers.items():
        if form in shown:
            axes.plot([], [], marker, color="#555555", label=form)
    for rival in ("sgp", "PyTorch, kept rows"):
        axes.plot([], [], "-", color=COLORS[rival], linewidth=5, label=rival)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a compulsory byte")
    axes.set_ylabel("FLOPs a second")
    copy = f"a copy: {bandwidth / 1e9:.3g} GB/s"
    matmul = f"a {roofs['matmul_dtype']} matmul: {rate / 1e9:.4g} GFLOP/s"
    axes.set_title(
        f"Roofline · {content['machine']['name']}, {content['date']}\n{copy}, {matmul}", fontsize=10
    )
    axes.grid(visible=True, which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(b=False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    path = stem.parent / f"{stem.name}-roofline.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _moved(case: Case) -> float:
    """Bytes that must move; with a head hidden states, weight and gradients, but no logits."""
    if not case.has_head:
        return measure.compulsory_bytes(case)
    return case.itemsize * 2.0 * (case.M * case.model.D + case.model.V * case.model.D)

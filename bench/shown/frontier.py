"""The picture of docs/how-to/memory.md: time against memory of the head, way by way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.gpu import tables as gpu_tables
from bench.shown import memory
from bench.shown.memory import GIB, Point
from bench.shown.plots import COLORS
from sgp.head.chunks import Plan

LINES = {  # per_token: its name, color and width; of seaborn's colorblind palette
    True: ("a factor a token", COLORS["F.linear_ce, auto"], 4.0),
    False: ("a mean or a sum", COLORS["sgp"], 2.0),
}
GREY = "#4d4d4d"
SPAN = (0.025, 24.0)  # GiB
PANELS = {  # kept: title, span of ms, height
    1.0: ("every token carries loss", (31.0, 115.0), 1.1),
    0.25: ("a quarter of the tokens carries loss", (7.5, 115.0), 1.35),
}
HALO = [patheffects.withStroke(linewidth=3, foreground="white")]


def draw() -> Path:
    """Write the picture; its path."""
    mpl.use("Agg")
    points = memory.measured()
    figure, grid = plt.subplots(
        len(PANELS), 1, figsize=(7.2, 10.0), sharex=True, layout="constrained",
        height_ratios=[height for *_, height in PANELS.values()],
    )  # fmt: skip
    for axes, (kept, (title, span, _)) in zip(grid, PANELS.items(), strict=True):
        _dress(axes, title, span)
        ways = {late: memory.frontier_of(kept, per_token=late) for late in LINES}
        for late, (_, color, width) in LINES.items():
            _steps(axes, ways[late], color, width)
            taken = memory.default(kept, per_token=late)
            axes.plot(
                taken.bytes / GIB, _ms(taken), "*", color=color, markersize=14,
                markeredgecolor="white", zorder=10,
            )  # fmt: skip
        _names(axes, ways)
        for point in points[kept]:
            _measured(axes, point)
    grid[-1].set_xlabel("memory beyond inputs, results and gradients, GiB", fontsize=11)
    size = f"{memory.TOKENS} x {gpu_tables.spaced(memory.V)} x {memory.D}, bf16"
    figure.suptitle(f"Head and loss, {size}", fontsize=13)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, frameon=False)
    path = memory.picture()
    metadata = {"Software": None, "Description": memory.fingerprint()}
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
    return path


def _ms(way: Plan) -> float:
    return 1e3 * way.seconds(memory.DATA_SHEET)


def _steps(axes: Axes, ways: list[Plan], color: str, width: float) -> None:
    """A way is there from its memory on, until a faster one is."""
    x = [way.bytes / GIB for way in ways]
    y = [_ms(way) for way in ways]
    axes.plot([*x, SPAN[1]], [*y, y[-1]], drawstyle="steps-post", color=color, linewidth=width)
    axes.plot(x, y, "o", color=color, markersize=width + 3)


def _names(axes: Axes, ways: dict[bool, list[Plan]]) -> None:
    """What the steps are, beside the first of each kind."""
    slices = [way for way in ways[True] if way.way == "slices"]
    rows = [way for way in ways[False] if way.way == "rows"]
    held = [way for way in ways[True] if way.way == "held"]
    where = (
        ("slices of the vocabulary", (slices[0], slices[-1]), (-2, -9), "top", GREY),
        ("gradient kept, one chunk", (rows[0], rows[0]), (-2, -14), "top", LINES[False][1]),
        ("logits held", (held[0], held[0]), (9, 12), "bottom", LINES[True][1]),
    )
    for text, (beside, below), offset, va, color in where:
        at = (beside.bytes / GIB, _ms(below))
        axes.annotate(
            text, at, xytext=offset, textcoords="offset points", ha="left", va=va, fontsize=11,
            color=color, path_effects=HALO, zorder=7,
        )  # fmt: skip


def _measured(axes: Axes, point: Point) -> None:
    if point.who in (memory.OURS, memory.OURS_LATE):
        color = LINES[point.who == memory.OURS_LATE][1]
        axes.plot(
            point.gib, point.ms, "D", color=color, markerfacecolor="white", markersize=6,
            markeredgewidth=1.5, zorder=8,
        )  # fmt: skip
        return
    outside = point.gib < SPAN[0]
    x = SPAN[0] * 1.08 if outside else point.gib
    axes.plot(
        x, point.ms, "<" if outside else "x", color=GREY, markersize=8, markeredgewidth=2, zorder=11
    )
    text = f"{point.who}, {point.gib:.2g} GiB" if outside else point.who
    left = point.who == "torch.compile"
    axes.annotate(
        text, (x, point.ms), xytext=(-9 if left else 9, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontsize=11, color=GREY, path_effects=HALO,
    )  # fmt: skip


def _dress(axes: Axes, title: str, span: tuple[float, float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*SPAN)
    axes.set_ylim(*span)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
    axes.set_yticks([y for y in (10, 15, 20, 30, 40, 50, 60, 80, 100) if span[0] < y < span[1]])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=11)
    axes.set_ylabel("forward and backward, ms", fontsize=11)
    axes.set_title(title, fontsize=13, loc="left")
    axes.grid(visible=True, which="major", color="#e8e8e8")
    axes.spines[["top", "right"]].set_visible(b=False)


def _legend() -> list[Line2D]:
    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **style)

    points: dict[str, Any] = {"linestyle": "", "color": GREY}
    hollow = points | {"markerfacecolor": "white", "markeredgewidth": 1.5, "markersize": 6}
    sheet = memory.DATA_SHEET.name.split()[0]
    ours, others = memory.studied()[1]["machine"]["name"], memory.OTHERS_CARD
    return [
        *(
            entry(f"{name}, by data sheet, {sheet}", color=color, linewidth=width, marker="o")
            for name, color, width in reversed(LINES.values())
        ),
        entry("taken by default", marker="*", markersize=15, **points),
        entry(f"sgp, measured, {ours.split()[1]}", marker="D", **hollow),
        entry(f"others, measured, {others.split()[1]}", marker="x", markeredgewidth=2, **points),
    ]

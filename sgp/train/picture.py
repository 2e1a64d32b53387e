"""The picture of a run: both loss curves, and how far apart they are."""

import math
from pathlib import Path
from typing import Any

from sgp.train.loop import LOSSES, Curves, second_name

_PALE, _DARK, _HELD_OUT = "#f2b98a", "#1f3b73", "#2a7f62"


def draw(
    curves: Curves,
    path: Path,
    *,
    title: str,
    before: float | None,
    after: float | None,
    loss: str = "sgp-linear",
) -> None:
    """Draw the two curves above their difference, as a PNG.

    Args:
        curves: At least one step.
        path: The file to write.
        title: One line about the run.
        before: Held-out loss before training, None to leave it out.
        after: Held-out loss afterwards, None to leave it out.
        loss: The loss of the second curve, a key of LOSSES.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # slow import
    from matplotlib.figure import Figure  # noqa: PLC0415  # slow import
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  # slow import

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: a figure of our own, no global state, no window
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = range(1, len(curves) + 1)
    marker = "o" if len(curves) < 3 else None
    top.plot(steps, curves.pytorch, color=_PALE, lw=6, marker=marker, label=LOSSES["pytorch"][1])
    top.plot(
        steps, curves.sgp, color=_DARK, lw=1.4, ls=(0, (4, 2)), marker=marker, ms=3,
        label=second_name(loss),
    )  # fmt: skip
    _mark_held_out(top, before, 0, "before")
    _mark_held_out(top, after, len(curves), "after")
    top.set_ylabel("loss (nats per output token)")
    top.set_title(title, loc="left", fontsize=10, parse_math=False)
    top.legend(frameon=False)
    differences = curves.differences
    width = min(8.0, max(0.6, 350 / len(curves)))  # points: bars that touch neither neighbour
    bottom.vlines(steps, 0, differences, color=_DARK, alpha=0.8, lw=width)
    largest = max(filter(math.isfinite, differences), default=0.0)
    bottom.set_ylim(0, 1.1 * largest or 1e-7)  # 1e-7: float32's resolution, when all are equal
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    bottom.set_ylabel("|difference| (nats)", fontsize=9)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path)


def _mark_held_out(axes: Any, loss: float | None, step: int, when: str) -> None:
    if loss is None:
        return
    label = "held-out loss" if when == "before" else None
    axes.plot([step], [loss], "D", color=_HELD_OUT, ms=6, zorder=4, clip_on=False, label=label)
    axes.annotate(
        f"{loss:.3f} {when}",
        (step, loss),
        xytext=(9, 7 if when == "before" else 0),  # beside the marker, clear of the curves
        textcoords="offset points",
        va="center",
        color=_HELD_OUT,
        fontsize=9,
    )

"""What a run prints and what it writes down: tables and `summary.json`."""

import json
import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from sgp.train.compare import Comparison
from sgp.train.loop import LOSSES, Curves, second_name


def comparison_heading(comparison: Comparison) -> str:
    """Return what the table of heads is about: the batch, the kept fraction, the method."""
    N, M, padding = comparison.num_tokens, comparison.num_kept, comparison.num_padding
    return (
        f"\nloss head on the first batch: {N} rows, of which {M} carry loss ({M / N:.1%} kept), "
        f"{N - M - padding} are context and {padding} padding\n"
        f"V = {comparison.vocabulary}, D = {comparison.width}, float32; forward and backward from "
        "the hidden states; errors are relative, against float64"
    )


def comparison_table(comparison: Comparison) -> Table:
    """Return the four heads as a table; the two ratios compare with the first row.

    It is at most 80 columns wide: what a pipe or a small window shows.
    """
    heading = "head", "loss", "loss\nerror", "gradient\nerror", "time\nms", "peak\nMiB"
    table = _table(*heading, "time\nratio", "memory\nratio")
    first = comparison.rows[0]
    for row in comparison.rows:
        memory, ratio = "n/a", "n/a"
        if row.peak_bytes and first.peak_bytes:
            memory, ratio = (
                _short(row.peak_bytes / (1 << 20)),
                f"{row.peak_bytes / first.peak_bytes:.2f}",
            )
        table.add_row(
            row.name,
            f"{row.loss:.6f}",
            f"{row.loss_error:.0e}",
            f"{row.gradient_error:.0e}",
            _short(row.seconds * 1e3),
            memory,
            f"{row.seconds / first.seconds:.2f}",
            ratio,
        )
    return table


def held_out_table(before: Mapping[str, float], after: Mapping[str, float], loss: str) -> Table:
    """Return the held-out loss of both copies before and after training; `loss` is `--loss`."""
    table = _table("trained with", "before", "after", "change")
    for key, name in (("pytorch", LOSSES["pytorch"][1]), ("sgp", second_name(loss))):
        if key in after:
            change = f"{after[key] - before[key]:+.4f}"
            table.add_row(name, f"{before[key]:.4f}", f"{after[key]:.4f}", change)
        else:
            table.add_row(name, f"{before[key]:.4f}", "not measured", "")
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def write_summary(path: Path, content: Mapping[str, Any]) -> None:
    r"""Write a summary as JSON; numbers that are not finite become null.

    Example:
        >>> write_summary(Path("summary.json"), {"loss": float("nan")})
        >>> Path("summary.json").read_text()
        '{\n  "loss": null\n}\n'
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def curves_summary(curves: Curves) -> dict[str, Any]:
    """Return the losses of each step and the largest difference."""
    return {
        "pytorch": curves.pytorch,
        "sgp": curves.sgp,
        "largest_difference": max(curves.differences, default=None),
    }


def comparison_summary(comparison: Comparison) -> dict[str, Any]:
    """Return the numbers of the comparison table, unrounded."""
    return {
        "num_tokens": comparison.num_tokens,
        "num_kept": comparison.num_kept,
        "num_padding": comparison.num_padding,
        "kept_fraction": comparison.num_kept / comparison.num_tokens,
        "vocabulary": comparison.vocabulary,
        "width": comparison.width,
        "rows": [row._asdict() for row in comparison.rows],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions and the machine that the numbers belong to."""
    names = "sgp-kernels", "torch", "triton", "transformers", "tokenizers"
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or "CPU" and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

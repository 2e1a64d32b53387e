"""The one look of every table that is printed: plain, and narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def make(title: str, left: Sequence[str], right: Sequence[str], notes: str = "") -> Table:
    """A table of text columns `left` and, after them, columns of numbers `right`.

    Example:
        >>> make("What it is", ["who"], ["ms", "MiB"]).row_count
        0
    """
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        caption=notes,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=0,
    )
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def ms(x: float) -> str:
    """Milliseconds to three digits.

    Example:
        >>> ms(0.51234), ms(3872.4)
        ('0.512', '3872')
    """
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"

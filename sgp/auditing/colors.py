"""The colours of page and picture, and how a token's text is shown."""

from __future__ import annotations

import math

STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From small to large, as matplotlib's viridis runs."""
STEPS = 24  # colours of the page


def color(share: float) -> tuple[int, int, int]:
    """The colour of a share in [0, 1].

    Example:
        >>> color(0.0), color(0.5), color(1.0)
        ((68, 1, 84), (33, 145, 140), (253, 231, 37))
    """
    at = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    low = min(int(at), len(STOPS) - 2)
    pairs = zip(STOPS[low], STOPS[low + 1], strict=True)
    red, green, blue = (round(a + (at - low) * (b - a)) for a, b in pairs)
    return red, green, blue


def step(value: float, low: float, high: float) -> int:
    """Which of the page's colours a value between `low` and `high` has.

    Example:
        >>> step(1.0, 1.0, 3.0), step(3.0, 1.0, 3.0), step(2.0, 2.0, 2.0)
        (0, 23, 23)
    """
    if not math.isfinite(value) or high <= low:
        return STEPS - 1
    return min(STEPS - 1, int((value - low) / (high - low) * STEPS))


def steps() -> list[tuple[int, int, int]]:
    """The page's colours, from small to large."""
    return [color(n / (STEPS - 1)) for n in range(STEPS)]


def dark_text(rgb: tuple[int, int, int]) -> bool:
    """Whether black is easier to read than white on a colour."""
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def visible(text: str) -> str:
    r"""A token's text with what cannot be seen escaped.

    Example:
        >>> visible("a\n\x1b")
        'a\\n\\x1b'
    """
    if text.isprintable():
        return text
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)

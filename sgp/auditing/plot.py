"""A picture of an audit: the tokens of a row as a strip of roles, over a map of gradient norms."""

from __future__ import annotations

from pathlib import Path

import torch

from sgp.auditing.colors import STOPS, visible
from sgp.auditing.outcome import ROLES, Outcome

LONGEST = 96  # tokens that are drawn with their text
STRIP, LETTERS = 0.7, 8  # its height in inches, and what of a text has room in it


def plot(report: Outcome, path: str | Path, *, row: int = 0, label: str = "") -> Path:
    """Draw one row of the batch; needs matplotlib.

    The strip has a cell a token, in the colour of its role. The map beneath has a line a layer,
    the embeddings at the bottom: the logarithm of the norm of dL / d hidden. Cells that are exactly
    zero are white with a dot, those that are not finite or not measured white with a cross; what is
    small is dark, in the page's colours, which are those of the whole batch.

    Args:
        report: of `sgp.audit`.
        path: where to write; its suffix decides the format.
        row: which row of the batch.
        label: what it is called; "row 0" where nothing is said.

    Raises:
        IndexError: if the batch has no such row.
    """
    import matplotlib as mpl  # noqa: PLC0415  (optional, and slow to import)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    if not 0 <= row < len(report.tokens):
        raise IndexError(f"plot: row {row} of a batch of {len(report.tokens)}")
    tokens = report.tokens[row]
    norms = report.grad_norm[:, row]
    layers, T = norms.shape
    width = min(20.0, max(7.0, 0.32 * T + 2.0))
    figure, (strip, field) = plt.subplots(
        2,
        1,
        figsize=(width, 2.7 + 0.26 * layers),
        sharex=True,
        height_ratios=[STRIP, 1.0 + 0.26 * layers],
        layout="constrained",
    )
    for token in tokens:
        strip.bar(token.position, 1.0, width=1.0, color=ROLES[token.role][1], edgecolor="white")
        if T <= LONGEST:
            strip.text(
                token.position,
                0.5,
                visible(token.text.strip(" ") or token.text)[:LETTERS],
                rotation=90,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if token.role == "output" else "black",
                parse_math=False,
            )
    strip.set_axis_off()
    used = {token.role for token in tokens}
    patches = [Patch(color=ROLES[role][1], label=role) for role in ROLES if role in used]
    strip.legend(
        handles=patches, ncols=len(patches), loc="lower left", bbox_to_anchor=(0, 1.0),
        frameon=False, fontsize=8,
    )  # fmt: skip
    dead = report.dead[:, row]
    shown = torch.where(norms.isfinite() & ~dead, norms.clamp(min=1e-45).log10(), torch.nan)
    every = report.grad_norm[report.grad_norm.isfinite() & ~report.dead].log10()
    ends = (float(every.min()), float(every.max())) if len(every) else (0.0, 0.0)
    stops = [tuple(x / 255 for x in rgb) for rgb in STOPS]
    image = field.imshow(
        shown.numpy(), aspect="auto", origin="lower", interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("sgp", stops), vmin=ends[0], vmax=ends[1],
    )  # fmt: skip
    for cells, mark in ((dead, "."), (~norms.isfinite(), "x")):
        at = cells.nonzero()
        field.plot(at[:, 1], at[:, 0], mark, color="#b0b0b0", markersize=2 if mark == "." else 4)
    field.set_yticks(range(layers), ["embeddings", *map(str, range(1, layers))])
    field.xaxis.set_major_locator(MaxNLocator(integer=True))
    field.set_ylabel("layer")
    unknown = "" if norms.isfinite().all() else "; a cross: not finite, or not measured"
    field.set_xlabel(f"position; a dot: exactly zero{unknown}")
    figure.colorbar(image, ax=field, label="log10 |dL / d hidden|", pad=0.01)
    figure.suptitle(f"{report.model_name}, {label or f'row {row}'}", fontsize=10, x=0.01, ha="left")
    found = Path(path)
    figure.savefig(found, dpi=110)
    plt.close(figure)
    return found

"""Results files: where they can be written, and those of `compare`, `<machine>-<date>.json`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def newest(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """(path, content) of the newest file of each machine, GPUs first."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        if not re.search(r"-\d{4}-\d\d-\d\d\.json$", path.name):
            continue
        content = json.loads(path.read_text())
        if "roofs" not in content:  # of another command
            continue
        name = content["machine"]["name"]
        if name not in found or content["date"] >= found[name][1]["date"]:
            found[name] = (path, content)
    return sorted(found.values(), key=lambda item: item[1]["machine"]["device"] == "cpu")


def must_be_writable(path: Path) -> None:
    """Asked before hours of measuring, not after.

    Raises:
        SystemExit: if no file can be written there.
    """
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        sys.exit(f"results file {path}: {error.strerror}; --output names another")
    if not existed:
        path.unlink()


def replace(path: Path, text: str) -> None:
    """Write a file in one step, so that who is interrupted keeps the one before."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def must_have_matplotlib() -> None:
    """Asked before anything is measured or written.

    Raises:
        SystemExit: if there is no matplotlib.
    """
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415  (optional)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        sys.exit("matplotlib draws the pictures and is not installed: pip install -e '.[bench]'")

"""The results files of `python -m bench compare`, `<machine>-<date>.json`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


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

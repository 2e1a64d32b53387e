"""What `mkdocs build` needs beyond its pages: the files outside docs/ that a page links to.

Pages link to results, tests and examples by relative paths, which work where the repository is
read. On the site each such file is copied to `repository/`, and the link points there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")


def outside(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of a page means, if it is not below docs/."""
    target = (page.parent / link).resolve()
    inside = target.is_relative_to(ROOT / "docs")
    return target if target.is_file() and not inside else None


def on_files(files: Any, config: Any) -> Any:
    """Add each file that is linked to once."""
    from mkdocs.structure.files import File  # noqa: PLC0415  (mkdocs is optional)

    found = set()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for link in LINK.findall(page.read_text()):
            target = outside(page, link)
            if target is not None:
                found.add(target)
    for target in sorted(found):
        place = f"repository/{target.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links there."""
    source = ROOT / "docs" / page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = outside(source, match[0])
        if target is None:
            return match[0]
        place = ROOT / "docs" / "repository" / target.relative_to(ROOT)
        return Path(os.path.relpath(place, source.parent)).as_posix()

    return LINK.sub(moved, markdown)

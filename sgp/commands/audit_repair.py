"""`sgp audit --repair`: the rows of a file with what can be mended in them, batch by batch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgp.auditing.findings import SEVERITY, Finding
from sgp.auditing.repair import WHY, Repair, repair
from sgp.auditing.survey import Survey
from sgp.commands.audit_rows import FileRow, Maker, batches, describe, windowed
from sgp.data.reading import STDIN
from sgp.train.errors import UserError
from sgp.train.output import writing

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self

UNWRITTEN = ("unusable-line", "outside-vocabulary")
"""Findings of lines that made no row."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".parquet")


def check_file(path: Path, data: Path) -> None:
    """Refuse a file that cannot be written, or is the one that is read.

    Raises:
        UserError: what stands in the way.
    """
    if str(path) == STDIN:
        raise UserError(f"--repair {path}: name a file, or /dev/stdout")
    if path.suffix.lower() in PACKED:
        raise UserError(
            f"--repair {path}: JSON lines are written, as they are; name a file that does not end "
            f"in {path.suffix}"
        )
    with writing(path, option="--repair"):
        if path.is_dir():
            raise UserError(f"--repair {path}: is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--repair {path}: no folder {path.absolute().parent}")
        existed = path.exists()
        if existed and data.exists() and path.samefile(data):
            raise UserError(f"--repair {path}: is the file that is read; name another")
        path.open("ab").close()
        if not existed:
            path.unlink()


class Mended:
    """What was mended, and what an audit says of it; a context that leaves no half of a file.

    Rows are written beside `path` as they come, and moved there by `write`.

    Args:
        maker: of rows.
        survey: of the file as it was.
        path: where the rows will be.
    """

    def __init__(self, maker: Maker, survey: Survey, path: Path) -> None:
        self.path = path
        self.after = Survey(path.name, ignore=survey.ignore, severity=survey.severity)
        self.written = 0  # rows
        self._before, self._maker = survey, maker
        self._whole = Repair()  # without its rows
        self._lines: list[int] = []
        self._unwritten: set[int] = set()  # lines of which nothing is written
        target = path.resolve()
        # a device or a pipe is written to at the end, and keeps its place
        self._moves = not path.exists() or path.is_file()
        folder = target.parent if self._moves else Path(tempfile.gettempdir())
        self._draft = folder / f".sgp-audit-{os.getpid()}.jsonl"

    def __enter__(self) -> Self:
        with writing(self.path, option="--repair"):
            self._file = self._draft.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk
            self._file.close()
        self._draft.unlink(missing_ok=True)

    def add(self, rows: list[FileRow]) -> None:
        """Mend rows, in the order of the file, and look at them again.

        Raises:
            UserError: the system refuses to write them.
        """
        for group in batches(rows, whole=True):
            self._add(group)

    def _add(self, rows: list[FileRow]) -> None:
        found = repair(self._maker.view(rows))
        for number, code in found.left:
            left = Finding(code, SEVERITY[code], "", f"not written: {WHY[code]}")
            self.after.add(left, rows[number].line)
        mended = [
            windowed(FileRow(rows[n].line, row, row), self._maker, self.after)
            for row, n in zip(found.rows, found.sources, strict=True)
        ]
        self._unwritten |= {row.line for row in rows} - {row.line for row in mended}
        self.after.samples += len(mended)
        self.written += len(mended)
        pairs = [pair for group in batches(mended) for pair in self._maker.look(group)]
        for row, finding in sorted(pairs, key=lambda pair: pair[0].line):
            self.after.add(finding, row.line, describe(row, finding, self._maker))
        with writing(self.path, option="--repair"):
            self._file.writelines(found.json_lines())
        self._whole.add(replace(found, rows=[], sources=[]))
        self._lines += [row.line for row in rows]

    def said(self) -> list[str]:
        """What was changed, line by line."""
        return [*self._whole.said(self._lines, self._before.unit)]

    def print(self, console: Console) -> None:
        """What was changed, and what is left."""
        self.after.unit = self._before.unit
        self.after.of = self._before.samples + self._before.skipped
        for entry in self._before.entries:
            if entry.backward:  # no label mends it, but rows are taken apart at their seams
                lines = [line for line in entry.lines if line not in self._unwritten]
                if lines and entry.code != "attends-across-boundary":
                    self.after.keep(replace(entry, lines=lines))
            elif entry.code in UNWRITTEN:
                self.after.keep(replace(entry, message=f"not written: {entry.message}"))
        console.print()
        self._whole.print(console, lines=self._lines, unit=self._before.unit)
        console.print(f"after the repair, by the {self._before.unit}s of the file as it was:")
        self.after.print(console)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file: what was changed, and what is left."""
        whole, lines = self._whole, self._lines
        return {
            "file": str(self.path),
            "rows": self.written,
            "changes": dict(whole.changes),
            "labels": dict(whole.labels),
            "cut": whole.cut,
            "left": [{"line": lines[row], "code": code} for row, code in whole.left],
            "samples": [
                {"line": lines[row], "rules": rules, "before": before, "after": after}
                for row, rules, before, after in whole.samples
            ],
            "after": self.after.to_dict(),
        }

    def write(self) -> None:
        """Let the rows be where they were asked for.

        Raises:
            UserError: the system refuses.
        """
        with writing(self.path, option="--repair"):
            self._file.close()
            if not self._moves:
                with self._draft.open("rb") as draft, self.path.open("wb") as file:
                    shutil.copyfileobj(draft, file)
                return
            target = self.path.resolve()
            if target.exists():
                shutil.copymode(target, self._draft)
            self._draft.replace(target)

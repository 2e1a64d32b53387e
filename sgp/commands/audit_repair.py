"""`sgp audit --repair`: the rows of a file with what can be mended in them, batch by batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgp.auditing.findings import SEVERITY, Finding
from sgp.auditing.repair import Repair, repair
from sgp.auditing.survey import Survey
from sgp.commands.audit_rows import Maker, Sample, batches, describe, windowed
from sgp.train.errors import UserError
from sgp.train.output import writing

if TYPE_CHECKING:
    from rich.console import Console

UNWRITTEN = ("unusable-line", "outside-vocabulary")
"""Findings of lines that made no row."""


def check_file(path: Path, data: Path) -> None:
    """Refuse a file that cannot be written, or is the one that is read.

    Raises:
        UserError: what stands in the way.
    """
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
    """What was mended, and what an audit says of it.

    Args:
        maker: of rows.
        survey: of the file as it was.
        path: where the rows will be written.
    """

    def __init__(self, maker: Maker, survey: Survey, path: Path) -> None:
        self.path = path
        self.after = Survey(path.name, ignore=survey.ignore, severity=survey.severity)
        self._before, self._maker = survey, maker
        self._repairs: list[Repair] = []
        self._lines: list[int] = []

    def add(self, samples: list[Sample]) -> None:
        """Mend the samples of one batch, in the order of the file, and look at them again."""
        found = repair(self._maker.view(samples))
        for row, code in found.left:
            left = Finding(code, SEVERITY[code], "", "not mended, as the labels would be a guess")
            self.after.add(left, samples[row].line)
        written = [
            windowed(Sample(samples[n].line, row, row), self._maker, self.after)
            for row, n in zip(found.rows, found.sources, strict=True)
        ]
        self.after.samples += len(written)
        pairs = [pair for group in batches(written) for pair in self._maker.look(group)]
        for sample, finding in sorted(pairs, key=lambda pair: pair[0].line):
            self.after.add(finding, sample.line, describe(sample, finding, self._maker))
        self._repairs.append(found)
        self._lines += [sample.line for sample in samples]

    def print(self, console: Console) -> None:
        """What was changed, and what is left."""
        self.after.unit = self._before.unit
        for entry in self._before.entries:
            if entry.backward:  # no label mends it
                self.after.keep(entry)
            elif entry.code in UNWRITTEN:
                self.after.keep(replace(entry, message=f"not written: {entry.message}"))
        console.print()
        Repair.join(self._repairs).print(console, lines=self._lines)
        console.print("after the repair, by the lines of the file as it was:")
        self.after.print(console)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file: what was changed, and what is left."""
        whole = Repair.join(self._repairs)
        return {
            "file": str(self.path),
            "rows": len(whole.rows),
            "changes": dict(whole.changes),
            "left": [{"line": self._lines[row], "code": code} for row, code in whole.left],
            "after": self.after.to_dict(),
        }

    def write(self) -> None:
        """Write the rows.

        Raises:
            UserError: the system refuses.
        """
        with writing(self.path, option="--repair"):
            Repair.join(self._repairs).write(self.path)

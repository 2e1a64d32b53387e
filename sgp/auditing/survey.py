"""What an audit says of a whole file: each finding once, with the lines that have it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from sgp.auditing.colors import visible
from sgp.auditing.findings import LEVELS, SEVERITY, Finding, ranges, runs
from sgp.labels import IGNORE

if TYPE_CHECKING:  # rich is imported where it prints
    from rich.console import Console

OF_FILES = {  # what is found where lines are read, beside what a batch can have
    "outside-vocabulary": "error",
    "unusable-line": "warning",
    "completion-cut": "warning",
    "prompt-merged": "warning",
}
PLAIN = ("outside-vocabulary", "unusable-line")
"""Whose samples are no tokens of a row, with brackets around what carries loss."""
TOLD = 3  # samples of a finding
AROUND = 6  # tokens on either side of what a sample shows
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


class Sample(NamedTuple):
    """One line that has a finding."""

    line: int
    where: str  # "3 tokens, 1 to 3", or ""
    text: str  # the tokens there; those with loss in brackets


@dataclass
class Entry:
    """One finding, and every line that has it."""

    code: str
    severity: str
    message: str
    lines: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    backward: bool = False  # found by the backward pass of these lines


@dataclass
class Survey:
    """The findings of a file, as lines are read.

    Example:
        >>> survey = Survey("data.jsonl")
        >>> for line in (21, 22, 23):
        ...     _ = survey.add(Finding("nan", "error", "", "the loss is nan"), line)
        >>> survey.where(survey.entries[0])
        'lines 21 to 23'

    Args:
        name: the file's.
        unit: what its lines are called.
        ignore: codes that are left out.
        severity: of codes, in place of their own.
    """

    name: str
    unit: str = "line"
    ignore: Collection[str] = ()
    severity: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0  # lines that were used
    skipped: int = 0  # lines that could not be
    of: int | None = None  # lines of the file that the numbers are of, where it is another
    _entries: dict[tuple[str, str, bool], Entry] = field(default_factory=dict)

    def add(
        self,
        finding: Finding,
        line: int,
        text: Callable[[], str] = str,
        *,
        key: str = "",
        backward: bool = False,
    ) -> Entry | None:
        """Note a finding of a line; `text` is asked for the first few alone.

        Args:
            finding: its code, severity, message and, of a sample, where.
            line: the number of the line.
            text: the sample's.
            key: what the findings of one entry share, in place of their message.
            backward: whether the backward pass found it.

        Returns:
            Its entry; None where it is ignored.
        """
        if finding.code in self.ignore:
            return None
        name = (finding.code, key or finding.message, backward)
        entry = self._entries.get(name)
        if entry is None:
            severity = self.severity.get(finding.code, finding.severity)
            entry = Entry(finding.code, severity, finding.message, backward=backward)
            self._entries[name] = entry
        if not entry.lines or entry.lines[-1] != line:
            entry.lines.append(line)
        if len(entry.samples) < TOLD:
            where = finding.where.partition(", ")[2] if finding.row is not None else finding.where
            entry.samples.append(Sample(line, where, text()))
        return entry

    def note(self, code: str, message: str, line: int, text: Callable[[], str] = str) -> None:
        """Note one of `OF_FILES`."""
        self.add(Finding(code, OF_FILES[code], "", message), line, text)

    def soften(self, code: str, lines: Collection[int], severity: str, message: str) -> None:
        """Give a finding of these lines another severity and message, unless one was asked for."""
        if code in self.severity:
            return
        for entry in [entry for entry in self.entries if entry.code == code]:
            softer = Entry(code, severity, message)
            softer.lines = [line for line in entry.lines if line in lines]
            softer.samples = [sample for sample in entry.samples if sample.line in lines]
            entry.lines = [line for line in entry.lines if line not in lines]
            entry.samples = [sample for sample in entry.samples if sample.line not in lines]
            if softer.lines:
                self.keep(softer)
        self._entries = {key: entry for key, entry in self._entries.items() if entry.lines}

    def keep(self, entry: Entry) -> None:
        """Take an entry over from another survey."""
        self._entries[entry.code, entry.message, entry.backward] = entry

    def settled(self, finding: Finding, line: int) -> Finding | None:
        """A finding with the severity that this line's has here; None where it has none."""
        severities = [
            entry.severity
            for entry in self._entries.values()
            if entry.code == finding.code and line in entry.lines
        ]
        return replace(finding, severity=severities[0]) if severities else None

    @property
    def entries(self) -> list[Entry]:
        """Errors first, then warnings, then notes; of these, in the order of their first lines."""
        return sorted(
            self._entries.values(),
            key=lambda entry: (LEVELS.index(entry.severity), min(entry.lines)),
        )

    @property
    def failed(self) -> bool:
        """Whether there is an error: the exit code."""
        return any(entry.severity == "error" for entry in self._entries.values())

    def where(self, entry: Entry) -> str:
        """The lines of an entry in words."""
        numbers = sorted(set(entry.lines))
        of = "backward pass of " if entry.backward else ""
        return f"{of}{self.unit}{'s' * (len(numbers) > 1)} {ranges(numbers)}"

    def place(self, entry: Entry) -> str:
        """The same, and how many they are of how many."""
        count = len(set(entry.lines))
        many = count > 1 and not entry.backward
        total = self.samples + self.skipped if self.of is None else self.of
        return self.where(entry) + f" ({count} of {total})" * many

    def verdict(self) -> str:
        """'2 errors, 1 warning' or 'no findings'."""
        return verdict(self.entries)

    def summary(self) -> str:
        """'50 lines of data.jsonl: 1 error'."""
        total = self.samples + self.skipped
        lines = f"{total} {self.unit}{'s' * (total != 1)}"
        used = f"{self.samples} of {lines}" if self.skipped else lines
        return f"{used} of {self.name}: {self.verdict()}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `ranges` has the first and the last number of each run of lines."""
        return {
            "file": self.name,
            "unit": self.unit,
            "samples": self.samples,
            "skipped": self.skipped,
            "failed": self.failed,
            "findings": [
                {
                    "code": entry.code,
                    "severity": entry.severity,
                    "message": entry.message,
                    "count": len(set(entry.lines)),
                    "where": self.where(entry),
                    "ranges": runs(entry.lines),
                    "backward": entry.backward,
                    "samples": [sample._asdict() for sample in entry.samples],
                }
                for entry in self.entries
            ],
        }

    def print(self, console: Console) -> None:
        """A line for each finding, and its first sample."""
        from rich.text import Text  # noqa: PLC0415

        bracketed = False
        console.print(Text(self.summary(), style="" if self.entries else "green"), soft_wrap=True)
        for entry in self.entries:
            line = Text(f"{entry.severity}: {entry.code}", style=STYLES[entry.severity])
            console.print(line.append(f": {self.place(entry)}: {entry.message}", style=""))
            if entry.samples and entry.samples[0].text:
                number, where, text = entry.samples[0]
                place = f"{self.unit} {number}" + (f", {where}" if where else "")
                console.print(Text(f"    {place}: {text}", style="dim"), soft_wrap=True)
                bracketed |= entry.code not in PLAIN and "[" in text
        if bracketed:
            console.print(Text("    [ ]: carries loss", style="dim"))


def verdict(found: Iterable[Any]) -> str:
    """How many errors, warnings and notes there are among what has a severity.

    Example:
        >>> verdict([Finding("nan", "error", "", "the loss is nan")])
        '1 error'
    """
    severities = [x.severity for x in found]
    counts = {level: severities.count(level) for level in LEVELS}
    words = [f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n]
    return ", ".join(words) or "no findings"


def known_codes() -> list[str]:
    """Every code, those of files too."""
    return [*SEVERITY, *OF_FILES]


def shown(
    ids: list[int], labels: list[int], tokens: Iterable[int], decode: Callable[[list[int]], str]
) -> str:
    """The text around some tokens of a row, or its last ones; what carries loss in brackets.

    Example:
        >>> shown([5, 6, 7, 8], [-100, -100, 7, 8], (), lambda ids: " ".join(map(str, ids)))
        '5 6 [7 8]'
    """
    at = list(tokens) or [next((t for t, x in enumerate(labels) if x != IGNORE), len(ids) - 1)]
    first = max(0, at[0] - AROUND)
    end = min(len(ids), min(at[-1], at[0] + 2 * AROUND) + 1 + AROUND)
    pieces, start = [], first
    for t in range(first, end):
        scored = labels[t] != IGNORE
        if t + 1 == end or (labels[t + 1] != IGNORE) != scored:
            text = decode(ids[start : t + 1])
            pieces.append(f"[{text}]" if scored else text)
            start = t + 1
    words = ["..."] * (first > 0) + pieces + ["..."] * (end < len(ids))
    return visible(" ".join(words))

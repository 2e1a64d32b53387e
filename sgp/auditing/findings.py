"""A finding, how bad each kind is, and one line for what many rows share.

An error is a fault of mask or gradient; a warning may be meant; a note is worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from sgp.auditing.view import NAME

SEVERITY = {  # of every code, in the order of the documentation's table
    "labels-shifted-twice": "error",
    "labels-not-the-inputs": "error",
    "first-output-untrained": "error",
    "no-targets": "error",
    "crosses-boundary": "error",
    "attends-across-boundary": "error",
    "turn-end-unscored": "error",
    "no-eos": "error",
    "context-logit-gradient": "error",
    "missing-gradient": "error",
    "nan": "error",
    "padding-scored": "warning",
    "special-scored": "warning",
    "other-turns-scored": "warning",
    "doubled-special": "warning",
    "all-scored": "warning",
    "module-not-run": "note",
    "zero-gradient": "note",
    "not-measured": "note",
    "another-loss": "note",
    "worse-than-uniform": "note",
}
LEVELS = ("error", "warning", "note")
OF_THE_GRADIENT = (
    "attends-across-boundary", "context-logit-gradient", "missing-gradient", "nan",
    "module-not-run", "zero-gradient", "not-measured", "another-loss", "worse-than-uniform",
)  # fmt: skip
"""What only a backward pass can say."""
SHOWN = 6  # ranges of rows or lines that are written out


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    code: str
    severity: str  # "error" | "warning" | "note"
    where: str  # "row 3, 5 tokens, 5 to 9"; "" for the whole batch
    message: str
    row: int | None = None  # of the batch; None: of the whole batch
    tokens: tuple[int, ...] = ()  # the positions that are meant, within the row

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.severity}: {self.code}{place}: {self.message}"


class Group(NamedTuple):
    """What one fault looks like in all the rows that have it."""

    code: str
    severity: str
    message: str
    rows: tuple[int, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        if len(self.findings) == 1:
            return str(self.findings[0])
        place = f" ({len(self.rows)} rows, {ranges(self.rows)})" if len(self.rows) > 1 else ""
        if len(self.rows) == 1:
            place = f" (row {self.rows[0]}, {len(self.findings)} times)"
        return f"{self.severity}: {self.code}{place}: {self.message}"


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """One group for each code, severity and message, in the order of their first findings.

    Example:
        >>> a = Finding("nan", "error", "row 0", "not finite", row=0)
        >>> b = Finding("nan", "error", "row 1", "not finite", row=1)
        >>> [str(group) for group in grouped([a, b])]
        ['error: nan (2 rows, 0 to 1): not finite']
    """
    found: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        key = (finding.code, finding.severity, finding.message)
        found.setdefault(key, []).append(finding)
    return [
        Group(
            *key, rows=tuple(sorted({f.row for f in of if f.row is not None})), findings=tuple(of)
        )
        for key, of in found.items()
    ]


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """The first and the last number of each run.

    Example:
        >>> runs([0, 2, 5, 6, 7, 8, 9])
        [[0, 0], [2, 2], [5, 9]]
    """
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges, the first few of them.

    Example:
        >>> ranges([0, 2, 5, 6, 7, 8, 9])
        '0, 2, 5 to 9'
    """
    found = runs(numbers)
    shown = [f"{a} to {b}" if a < b else str(a) for a, b in found[:SHOWN]]
    return ", ".join(shown + ["..."] * (len(found) > SHOWN))


def check_severity(severity: Mapping[str, str] | None) -> dict[str, str]:
    """The severities that were asked for.

    Example:
        >>> check_severity({"no-eos": "warning"}), check_severity(None)
        ({'no-eos': 'warning'}, {})

    Raises:
        ValueError: a code or a severity that there is not.
    """
    given = dict(severity or {})
    for code, level in given.items():
        if code not in SEVERITY:
            raise ValueError(f"{NAME}: severity of {code!r}; the codes are {', '.join(SEVERITY)}")
        if level not in LEVELS:
            raise ValueError(f"{NAME}: severity {level!r} of {code}; expected {', '.join(LEVELS)}")
    return given


def check_ignored(
    ignore: Collection[str], names: Collection[str] | None = None
) -> Callable[[str], bool]:
    """Which parameters no finding is to be about: those of the words that are no codes.

    Example:
        >>> ignored = check_ignored(["no-eos", "*.visual.*"])
        >>> ignored("model.visual.weight"), ignored("lm_head.weight")
        (True, False)

    Args:
        ignore: codes and patterns of parameters' or modules' names.
        names: of the parameters; None: there is no model, and patterns are taken as they are.

    Raises:
        ValueError: a word that is neither a code nor a pattern that fits a parameter.
        TypeError: one word alone.
    """
    if isinstance(ignore, str):
        raise TypeError(f"{NAME}: ignore is {ignore!r}; expected a list of such words")
    patterns = [word for word in ignore if word not in SEVERITY]

    def ignored(name: str) -> bool:
        return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)

    for word in patterns:
        fits = any(fnmatchcase(n, word) or fnmatchcase(n, f"{word}.*") for n in names or ())
        if not fits and (names is not None or not set(word) & set("*?[.")):
            raise ValueError(
                f"{NAME}: ignore has {word!r}, which is no finding and fits no parameter; the "
                f"codes are {', '.join(SEVERITY)}"
            )
    return ignored


def settled(
    findings: Iterable[Finding], ignore: Collection[str], severity: Mapping[str, str]
) -> list[Finding]:
    """Without the codes that are ignored, with the severities asked for, errors first.

    Example:
        >>> found = [Finding("nan", "error", "", "..."), Finding("no-eos", "error", "", "...")]
        >>> [str(f) for f in settled(found, ["nan"], {"no-eos": "note"})]
        ['note: no-eos: ...']
    """
    found = [
        replace(f, severity=severity[f.code]) if f.code in severity else f
        for f in findings
        if f.code not in ignore
    ]
    return sorted(found, key=lambda finding: LEVELS.index(finding.severity))

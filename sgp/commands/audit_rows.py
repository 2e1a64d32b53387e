"""The rows of a file as `sgp audit` looks at them: tokenized as they are trained on, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.auditing import look
from sgp.auditing.findings import Finding
from sgp.auditing.survey import OF_FILES, Survey, shown
from sgp.auditing.turns import Turns, inner, own_ends
from sgp.auditing.view import View, read
from sgp.data.examples import MASKS, Tokenized, tokenize_all
from sgp.data.reading import Line, alike, kind
from sgp.labels import IGNORE

AS_THEY_STAND = ("attention_mask", "position_ids", "seq_idx", *MASKS)
SEAMS = ("attention_mask", "position_ids", "seq_idx")
CHUNK, CHUNK_TOKENS = 1024, 1 << 20  # lines that are tokenized at once, at most, and about
LETTERS = 4  # of a token, about
ROWS, TOKENS = 256, 1 << 18  # of a batch, at most
UNBOUNDED = 1 << 40  # tokens: a row is as long as it is
LARGEST = 1 << 20  # more than any vocabulary has


class FileRow(NamedTuple):
    """One line's row."""

    line: int
    columns: dict[str, list[int]]  # up to the window
    whole: dict[str, list[int]]
    noted: tuple[Finding, ...] = ()  # what was found in it
    given: bool = False  # it came as tokens, which someone may have cut
    padding: int = 0  # tokens at the end of the whole row

    @property
    def cut(self) -> bool:
        """Whether tokens beyond the window were left out."""
        return self.columns is not self.whole

    @property
    def attended(self) -> int:
        """Its tokens up to the window, without padding."""
        return min(size(self), len(self.whole["input_ids"]) - self.padding)

    def beginning(self, most: int) -> FileRow:
        """Its first tokens alone."""
        columns = {name: column[:most] for name, column in self.columns.items()}
        attended = min(self.attended, most)
        padding = len(columns["input_ids"]) - attended
        return self._replace(columns=columns, whole=columns, padding=padding)


@dataclass(frozen=True)
class Maker:
    """What rows are made with, and looked at."""

    tokenizer: Any
    vocabulary: int | None  # the model's, or the tokenizer's
    owner: str  # "model" or "tokenizer"
    window: int | None
    severity: Mapping[str, str] = field(default_factory=dict)  # of codes that a batch can have
    ends: tuple[int, ...] = ()  # what the model's generation stops at
    turns: Turns = field(default_factory=Turns)

    def look(self, rows: list[FileRow]) -> list[tuple[FileRow, Finding]]:
        """The findings of rows that make one batch, each with its row."""
        found = look(
            batch_of([row.columns for row in rows], attended=[row.attended for row in rows]),
            tokenizer=self.tokenizer,
            eos=self.ends,
            max_length=self.window or UNBOUNDED,
            severity=self.severity,
            turns=self.turns,
        )
        pairs = [(rows[f.row], f) for f in found if f.row is not None]
        # Of a row that was cut at the window, completion-cut says it.
        kept = [(x, f) for x, f in pairs if not (x.cut and f.code == "no-eos")]
        return [(x, self._of_window(x, f)) for x, f in kept]

    def _of_window(self, row: FileRow, finding: Finding) -> Finding:
        """A finding, with the window as its cause where it is that."""
        if finding.code != "no-targets" or not row.cut or not carries_loss(row.whole["labels"]):
            return finding
        message = f"the prompt alone fills the window of {self.window} tokens: no loss is left"
        return replace(finding, message=message)

    def view(self, rows: list[FileRow]) -> View:
        """One batch, with all its tokens."""
        attended = [len(row.whole["input_ids"]) - row.padding for row in rows]
        batch = batch_of([row.whole for row in rows], attended=attended)
        return read(batch, tokenizer=self.tokenizer, eos=self.ends, turns=self.turns)

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, or their numbers."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(ids))

    @property
    def pad(self) -> int:
        """What a batch is padded with: what collators take, if the model knows it."""
        fill = self._filler[0]
        return fill if fill is not None and fill < (self.vocabulary or LARGEST) else 0

    @cached_property
    def _filler(self) -> tuple[int | None, bool]:
        """What collators pad with, and whether it ends a text too."""
        own = inner(self.tokenizer)
        pad = getattr(own, "pad_token_id", None)
        fill = getattr(own, "eos_token_id", None) if pad is None else pad
        return fill, fill in {*self.ends, *own_ends(own), *self.turns.ends}

    def padding(self, ids: list[int]) -> int:
        """Padding at the end of a row of which no mask says it, as a batch without one is read."""
        fill, is_end = self._filler
        count = 0
        while count < len(ids) and ids[-1 - count] == fill:
            count += 1
        return count - (is_end and count > 0)  # the first of them ends the text


def chunks(lines: Iterable[Line], maker: Maker, survey: Survey) -> Iterator[list[FileRow]]:
    """The usable rows, some hundred at a time; what is wrong with the others goes to the survey."""
    chunk: list[Line] = []
    tokens = 0
    for line in lines:
        chunk.append(line)
        tokens += _extent(line.row)
        if len(chunk) == CHUNK or tokens >= CHUNK_TOKENS:
            yield _rows(chunk, maker, survey)
            chunk, tokens = [], 0
    if chunk:
        yield _rows(chunk, maker, survey)


def _extent(row: Mapping[str, Any]) -> int:
    """About how many tokens a row will have."""
    ids = row.get("input_ids")
    if ids is not None:
        return len(ids) if hasattr(ids, "__len__") else 0
    given = (row.get(name) for name in ("prompt", "completion", "messages", "text"))
    return sum(len(str(x)) for x in given if x is not None) // LETTERS


def _rows(chunk: list[Line], maker: Maker, survey: Survey) -> list[FileRow]:
    usable = [line for line in chunk if not _refused(line, maker, survey)]
    found = tokenize_all([_to_tokenize(line.row) for line in usable], maker.tokenizer)
    rows = [_row(line, of, maker, survey) for line, of in zip(usable, found, strict=True)]
    return [row for row in rows if row is not None]


def _refused(line: Line, maker: Maker, survey: Survey) -> bool:
    reason = line.reason
    if not reason and maker.tokenizer is None and kind(line.row) != "input_ids":
        reason = "needs --tokenizer or --model to become tokens"
    if reason:
        unusable(survey, line.number, reason)
    return bool(reason)


def unusable(survey: Survey, line: int, reason: str) -> None:
    """Note a line that cannot be used."""
    code = "unusable-line"
    survey.skipped += 1
    survey.add(Finding(code, OF_FILES[code], "", reason), line, key=alike(reason))


def _to_tokenize(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens are looked at as they stand: padding and seams are not taken apart before."""
    if kind(row) != "input_ids":
        return row
    return {k: row[k] for k in ("input_ids", "labels", *MASKS) if row.get(k) is not None}


def _row(line: Line, found: Tokenized, maker: Maker, survey: Survey) -> FileRow | None:
    if found.reason or not found.rows[0].input_ids:
        unusable(survey, line.number, found.reason or "no tokens")
        return None
    ids, labels = found.rows[0]
    columns, padding = {"input_ids": ids, "labels": labels}, 0
    given = kind(line.row) == "input_ids"
    if given:
        # masks that labels were made of say nothing more
        names = AS_THEY_STAND if line.row.get("labels") is not None else SEAMS
        columns |= {k: line.row[k] for k in names if line.row.get(k) is not None}
        padding = _taken_off(columns, maker)
        wrong = _seq_lengths(line.row, columns, padding)
        if wrong:
            unusable(survey, line.number, wrong)
            return None
    V = LARGEST if maker.vocabulary is None else maker.vocabulary
    if max(*ids, *labels) >= V:
        _outside(line.number, ids, labels, maker, survey)
        return None
    survey.samples += 1
    row = FileRow(line.number, columns, columns, (), given, padding)
    if found.merged:
        message = (
            "the tokens of the prompt alone are not the first of prompt and completion together "
            "(they merge, or the template differs): some of the prompt carries loss. If a "
            "blank ends the prompt, move it to the completion"
        )
        row = _noted(row, "prompt-merged", message, first_with_loss(labels), maker, survey)
    return windowed(row, maker, survey)


def first_with_loss(labels: list[int]) -> int | None:
    """Where the first token with loss is that can be predicted."""
    return next((t for t in range(1, len(labels)) if labels[t] != IGNORE), None)


def carries_loss(labels: list[int]) -> bool:
    """Whether anything would be learned of them."""
    return first_with_loss(labels) is not None


def _noted(
    row: FileRow,
    code: str,
    message: str,
    token: int | None,
    maker: Maker,
    survey: Survey,
    before: str = "",
) -> FileRow:
    """The row, with one of `OF_FILES` that the survey is told, and the text before its sample."""
    finding = Finding(code, OF_FILES[code], "", message, tokens=() if token is None else (token,))
    text = describe(row, finding, maker)
    if survey.add(finding, row.line, lambda: before + text()) is None:
        return row
    return row._replace(noted=(*row.noted, finding))


def _taken_off(columns: dict[str, list[int]], maker: Maker) -> int:
    """Padding on the right, whose mask is left out where it says nothing else."""
    mask = columns.get("attention_mask")
    if mask is None:
        return maker.padding(columns["input_ids"])
    attended = sum(map(bool, mask))
    if "position_ids" in columns or "seq_idx" in columns or any(x != 1 for x in mask[:attended]):
        return 0
    del columns["attention_mask"]
    return len(mask) - attended


def _seq_lengths(row: dict[str, Any], columns: dict[str, list[int]], padding: int) -> str:
    """Where TRL's `seq_lengths` are the only seams, count positions as its collator does."""
    lengths = row.get("seq_lengths")
    if lengths is None or "position_ids" in columns or "seq_idx" in columns:
        return ""
    whole = isinstance(lengths, list) and all(type(x) is int and x > 0 for x in lengths)
    T = len(columns["input_ids"])
    if not whole or sum(lengths) not in (T, T - padding):
        return '"seq_lengths" does not add up to the tokens'
    positions = [t for length in lengths for t in range(length)]
    columns["position_ids"] = positions + [0] * (T - len(positions))
    return ""


def _outside(line: int, ids: list[int], labels: list[int], maker: Maker, survey: Survey) -> None:
    V = LARGEST if maker.vocabulary is None else maker.vocabulary
    name, at, token = next(
        (name, t, x)
        for name, column in (("input_ids", ids), ("labels", labels))
        for t, x in enumerate(column)
        if x >= V
    )
    if maker.vocabulary is None:
        message = f"tokens are {LARGEST} or more, which no vocabulary has"
    else:
        message = (
            f"tokens are outside the {maker.owner}'s [0, {V}); was the file made with another "
            "tokenizer?"
        )
    survey.skipped += 1
    survey.note("outside-vocabulary", message, line, lambda: f"{name}[{at}] is {token}")


def windowed(row: FileRow, maker: Maker, survey: Survey) -> FileRow:
    """Cut at the window, as it is trained on."""
    labels, window = row.columns["labels"], maker.window
    if window is None or len(labels) <= window:
        return row
    row = row._replace(columns={k: v[:window] for k, v in row.columns.items()})
    lost = sum(x != IGNORE for x in labels[window:])
    if not lost:
        return row
    some = carries_loss(row.columns["labels"])
    scored = sum(x != IGNORE for x in labels)
    message = f"the window of {window} tokens cuts the completion: " + (
        "its end is not trained" if some else "nothing of it is trained"
    )
    beyond = f"{f'{lost} of' if some else 'all'} {scored} tokens with loss are beyond it: "
    return _noted(row, "completion-cut", message, window - 1, maker, survey, beyond)


# -- batches ---------------------------------------------------------------------------------------


def batches(rows: list[FileRow], *, whole: bool = False) -> Iterator[list[FileRow]]:
    """Rows that make one batch: of the same columns and of similar length.

    Args:
        rows: of which each is in one batch.
        whole: in the order of the file, and with what the window leaves out.
    """
    if whole:
        yield from _alternating(rows)
        return
    by_columns: dict[tuple[str, ...], list[FileRow]] = {}
    for row in rows:
        by_columns.setdefault(tuple(sorted(row.columns)), []).append(row)
    for similar in by_columns.values():
        yield from _full(sorted(similar, key=size), size)


def _alternating(rows: list[FileRow]) -> Iterator[list[FileRow]]:
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or set(rows[end].columns) != set(rows[start].columns):
            yield from _full(rows[start:end], lambda row: len(row.whole["input_ids"]))
            start = end


def _full(rows: list[FileRow], length: Callable[[FileRow], int]) -> Iterator[list[FileRow]]:
    group: list[FileRow] = []
    longest = 0
    for row in rows:
        longest = max(longest, length(row))
        if group and (len(group) == ROWS or (len(group) + 1) * longest > TOKENS):
            yield group
            group, longest = [], length(row)
        group.append(row)
    if group:
        yield group


def size(row: FileRow) -> int:
    """Its tokens, up to the window."""
    return len(row.columns["input_ids"])


def batch_of(
    rows: list[dict[str, list[int]]], *, attended: list[int] | None = None, pad: int = 0
) -> dict[str, Tensor]:
    """Padded on the right, with a mask unless positions say where sequences begin.

    Args:
        rows: columns, with the same seams; masks of outputs are left out where not all have them.
        attended: the tokens of each that are not padding; None: all.
        pad: the token that fills rows up.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    found = {}
    for name in ("input_ids", "labels", *AS_THEY_STAND):
        if all(name in row for row in rows):
            fill = [{"labels": IGNORE, "input_ids": pad}.get(name, 0)] * longest
            found[name] = torch.tensor([(row[name] + fill)[:longest] for row in rows]).long()
    lengths = torch.tensor(attended or [len(row["input_ids"]) for row in rows])
    found["lengths"] = lengths
    if "attention_mask" not in found and "position_ids" not in found:
        # with positions, a model keeps packed rows apart where no mask is given
        found["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return found


def alike_seams(rows: list[FileRow]) -> list[FileRow]:
    """The rows whose columns for padding and seams are those of the first."""

    def seams(row: FileRow) -> tuple[bool, ...]:
        return tuple(name in row.columns for name in SEAMS)

    return [row for row in rows if seams(row) == seams(rows[0])]


def describe(row: FileRow, finding: Finding, maker: Maker) -> Callable[[], str]:
    """The text of a finding's tokens, made if it is asked for."""
    columns = row.columns
    return lambda: shown(columns["input_ids"], columns["labels"], finding.tokens, maker.decode)

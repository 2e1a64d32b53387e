"""The rows of a file as `sgp audit` looks at them: tokenized as they are trained on, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.auditing import look
from sgp.auditing.findings import Finding
from sgp.auditing.survey import OF_FILES, Survey, shown
from sgp.auditing.turns import Turns
from sgp.auditing.view import View, read
from sgp.data.examples import MASKS, Tokenized, tokenize_all
from sgp.data.reading import Line, alike, kind
from sgp.labels import IGNORE

AS_THEY_STAND = ("attention_mask", "position_ids", "seq_idx", *MASKS)
SEAMS = ("attention_mask", "position_ids", "seq_idx")
CHUNK = 1024  # lines that are tokenized at once
ROWS, TOKENS = 256, 1 << 18  # of a batch, at most
UNBOUNDED = 1 << 40  # tokens: a row is as long as it is
LARGEST = 1 << 20  # more than any vocabulary has


class Sample(NamedTuple):
    """One line's row."""

    line: int
    columns: dict[str, list[int]]  # up to the window
    whole: dict[str, list[int]]
    noted: bool = False  # the survey knows something of it
    given: bool = False  # it came as tokens, which someone may have cut

    @property
    def cut(self) -> bool:
        """Whether tokens beyond the window were left out."""
        return self.columns is not self.whole


class Maker(NamedTuple):
    """What rows are made with, and looked at."""

    tokenizer: Any
    vocabulary: int | None  # the model's, or the tokenizer's
    owner: str  # "model" or "tokenizer"
    window: int | None
    severity: Mapping[str, str] = MappingProxyType({})  # of codes that a batch can have
    ends: tuple[int, ...] = ()  # what the model's generation stops at
    turns: Turns = Turns()

    def look(self, samples: list[Sample]) -> list[tuple[Sample, Finding]]:
        """The findings of samples that make one batch, each with its sample."""
        found = look(
            batch_of([sample.columns for sample in samples]),
            tokenizer=self.tokenizer,
            eos=self.ends,
            max_length=self.window or UNBOUNDED,
            severity=self.severity,
            turns=self.turns,
        )
        pairs = [(samples[f.row], f) for f in found if f.row is not None]
        # Of a row that was cut at the window, completion-cut says it.
        return [(x, f) for x, f in pairs if not (x.cut and f.code == "no-eos")]

    def view(self, samples: list[Sample]) -> View:
        """One batch, with all its tokens."""
        batch = batch_of([sample.whole for sample in samples])
        return read(batch, tokenizer=self.tokenizer, eos=self.ends, turns=self.turns)

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, or their numbers."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(ids))


def chunks(lines: Iterable[Line], maker: Maker, survey: Survey) -> Iterator[list[Sample]]:
    """The usable rows, some hundred at a time; what is wrong with the others goes to the survey."""
    rest = iter(lines)
    while chunk := list(islice(rest, CHUNK)):
        usable = [line for line in chunk if not _refused(line, maker, survey)]
        rows = [_to_tokenize(line.row) for line in usable]
        found = tokenize_all(rows, maker.tokenizer)
        pairs = zip(usable, found, strict=True)
        samples = [_sample(line, of, maker, survey) for line, of in pairs]
        yield [sample for sample in samples if sample is not None]


def _refused(line: Line, maker: Maker, survey: Survey) -> bool:
    reason = line.reason
    if not reason and maker.tokenizer is None and kind(line.row) != "input_ids":
        reason = "is text, which needs --tokenizer or --model"
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


def _sample(line: Line, found: Tokenized, maker: Maker, survey: Survey) -> Sample | None:
    if found.reason or not found.rows[0].input_ids:
        unusable(survey, line.number, found.reason or "no tokens")
        return None
    ids, labels = found.rows[0]
    columns = {"input_ids": ids, "labels": labels}
    given = kind(line.row) == "input_ids"
    if given:
        # masks that labels were made of say nothing more
        names = AS_THEY_STAND if line.row.get("labels") is not None else SEAMS
        columns |= {k: line.row[k] for k in names if line.row.get(k) is not None}
        wrong = _seq_lengths(line.row, columns)
        if wrong:
            unusable(survey, line.number, wrong)
            return None
    V, noted = LARGEST if maker.vocabulary is None else maker.vocabulary, False
    if max(*ids, *labels) >= V:
        _outside(line.number, ids, labels, maker, survey)
        return None
    if found.merged:
        noted = True
        survey.note(
            "prompt-merged",
            "the tokens of the prompt alone are not the first of prompt and completion together "
            "(they merge, or the template differs): some of the prompt carries loss",
            line.number,
            lambda: repr(found.merged),
        )
    survey.samples += 1
    return windowed(Sample(line.number, columns, columns, noted, given), maker, survey)


def _seq_lengths(row: dict[str, Any], columns: dict[str, list[int]]) -> str:
    """Where TRL's `seq_lengths` are the only seams, number their sequences."""
    lengths = row.get("seq_lengths")
    if lengths is None or "position_ids" in columns or "seq_idx" in columns:
        return ""
    whole = isinstance(lengths, list) and all(type(x) is int and x > 0 for x in lengths)
    if not whole or sum(lengths) != len(columns["input_ids"]):
        return '"seq_lengths" does not add up to the tokens'
    columns["seq_idx"] = [n for n, length in enumerate(lengths) for _ in range(length)]
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


def windowed(sample: Sample, maker: Maker, survey: Survey) -> Sample:
    """Cut at the window, as it is trained on."""
    labels, window = sample.columns["labels"], maker.window
    if window is None or len(labels) <= window:
        return sample
    columns = {k: v[:window] for k, v in sample.columns.items()}
    lost = sum(x != IGNORE for x in labels[window:])
    noted = bool(lost) and any(x != IGNORE for x in columns["labels"][1:])
    if noted:
        survey.note(
            "completion-cut",
            f"the window of {window} tokens cuts the completion: its end is not trained",
            sample.line,
            lambda: (
                f"{lost} of {sum(x != IGNORE for x in labels)} tokens with loss are beyond it: "
                + shown(columns["input_ids"], columns["labels"], [window - 1], maker.decode)
            ),
        )
    return sample._replace(columns=columns, noted=noted or sample.noted)


# -- batches ---------------------------------------------------------------------------------------


def batches(samples: list[Sample], *, ordered: bool = False) -> Iterator[list[Sample]]:
    """Samples that make one batch: of the same columns, and of similar length unless ordered."""
    by_columns: dict[tuple[str, ...], list[Sample]] = {}
    if ordered:
        yield from _runs(samples)
        return
    for sample in samples:
        by_columns.setdefault(tuple(sorted(sample.columns)), []).append(sample)
    for similar in by_columns.values():
        yield from _full(sorted(similar, key=size))


def _runs(samples: list[Sample]) -> Iterator[list[Sample]]:
    start = 0
    for end in range(1, len(samples) + 1):
        if end == len(samples) or set(samples[end].columns) != set(samples[start].columns):
            yield from _full(samples[start:end])
            start = end


def _full(samples: list[Sample]) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    longest = 0
    for sample in samples:
        longest = max(longest, size(sample))
        if group and (len(group) == ROWS or (len(group) + 1) * longest > TOKENS):
            yield group
            group, longest = [], size(sample)
        group.append(sample)
    if group:
        yield group


def size(sample: Sample) -> int:
    """Its tokens, up to the window."""
    return len(sample.columns["input_ids"])


def batch_of(rows: list[dict[str, list[int]]], *, most: int | None = None) -> dict[str, Tensor]:
    """Padded on the right, with a mask unless positions say where sequences begin.

    Args:
        rows: columns, with the same seams; masks of outputs are left out where not all have them.
        most: tokens of a row.
    """
    lengths = torch.tensor([len(row["input_ids"][:most]) for row in rows])
    longest = int(lengths.max())
    found = {}
    for name in ("input_ids", "labels", *AS_THEY_STAND):
        if all(name in row for row in rows):
            fill = [IGNORE if name == "labels" else 0] * longest
            found[name] = torch.tensor([(row[name] + fill)[:longest] for row in rows]).long()
    found["lengths"] = lengths
    if "attention_mask" not in found and "position_ids" not in found:
        # with positions, a model keeps packed rows apart where no mask is given
        found["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return found


def alike_seams(samples: list[Sample]) -> list[Sample]:
    """Those that say padding and seams in the way of the first."""

    def seams(sample: Sample) -> tuple[bool, ...]:
        return tuple(name in sample.columns for name in SEAMS)

    return [sample for sample in samples if seams(sample) == seams(samples[0])]


def describe(sample: Sample, finding: Finding, maker: Maker) -> Callable[[], str]:
    """The text of a finding's tokens, made if it is asked for."""
    columns = sample.columns
    return lambda: shown(columns["input_ids"], columns["labels"], finding.tokens, maker.decode)

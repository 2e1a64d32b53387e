"""What can be mended in the labels of a batch without a guess, and what cannot.

A batch is taken apart into its sequences, without padding, so that each is judged by itself. A
shift is undone first, and the other rules look at the labels that it leaves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sgp.auditing import masks
from sgp.auditing.findings import ranges
from sgp.auditing.view import View
from sgp.labels import IGNORE

if TYPE_CHECKING:  # rich is imported where it prints
    from rich.console import Console

SAMPLES = 3
WINDOW = 40  # tokens of a sample
DONE = {  # rule: what was done about it, in the order in which it is done
    "labels-shifted-twice": "moved back by one token",
    "crosses-boundary": "first tokens of packed sequences carry no loss",
    "padding-scored": "padding carries no loss",
    "first-output-untrained": "the first output token carries loss",
    "turn-end-unscored": "the end of the turn carries loss",
}


class Left(NamedTuple):
    """A sequence that is not written, because its labels would be a guess."""

    row: int  # of the batch
    code: str


class Sample(NamedTuple):
    """A row before and after; what carries loss stands in brackets."""

    row: int  # of the batch
    rules: tuple[str, ...]
    before: str
    after: str


@dataclass
class Repair:
    """Rows whose labels are right, what was changed in them, and which rows could not be mended."""

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    """`input_ids` and `labels`, one sequence a row, without padding."""
    sources: list[int] = field(default_factory=list)  # the batch's row that each is from
    changes: Counter[str] = field(default_factory=Counter)  # rule: sequences
    labels: Counter[str] = field(default_factory=Counter)  # rule: labels that it changed
    left: list[Left] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    cut: int = 0  # packed rows that were taken apart
    num_rows: int = 0  # of the batch

    @staticmethod
    def join(repairs: Iterable[Repair]) -> Repair:
        """Those of several batches as one, with rows counted through.

        Example:
            >>> one = Repair(rows=[{"input_ids": [5], "labels": [5]}], sources=[0], num_rows=1)
            >>> Repair.join([one, one]).sources
            [0, 1]
        """
        whole = Repair()
        for part in repairs:
            before = whole.num_rows
            whole.rows += part.rows
            whole.sources += [before + row for row in part.sources]
            whole.changes.update(part.changes)
            whole.labels.update(part.labels)
            whole.left += [Left(before + row, code) for row, code in part.left]
            room = SAMPLES - len(whole.samples)
            whole.samples += [s._replace(row=before + s.row) for s in part.samples[:room]]
            whole.cut += part.cut
            whole.num_rows += part.num_rows
        return whole

    def write(self, path: str | Path) -> Path:
        """Write the rows as JSON lines, which `sgp audit` and any trainer read."""
        path = Path(path)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        return path

    def print(self, console: Console | None = None, *, lines: Sequence[int] | None = None) -> None:
        """Every change by rule and count, what was left out, and three rows before and after.

        Args:
            console: of rich; None: the terminal.
            lines: of a file, the line of each row of the batch, which is then named instead.
        """
        from rich.console import Console  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = console or Console()
        for line in self._lines(lines):
            console.print(Text(line), soft_wrap=True)

    def _lines(self, lines: Sequence[int] | None) -> Iterator[str]:
        def place(rows: Iterable[int]) -> str:
            found = sorted({row if lines is None else lines[row] for row in rows})
            name = "row" if lines is None else "line"
            return f"{name}{'s' * (len(found) != 1)} {ranges(found)}"

        for rule, what in DONE.items():
            if rule in self.changes:
                count, tokens = self.changes[rule], self.labels[rule]
                yield (
                    f"mended: {rule}: {_count(count, 'sequence')}, {_count(tokens, 'label')}: "
                    f"{what}"
                )
        if self.cut:
            yield f"{_count(self.cut, 'packed row')} taken apart: one sequence a row"
        for code in dict.fromkeys(left.code for left in self.left):
            rows = [left.row for left in self.left if left.code == code]
            yield (
                f"left out: {code}: {_count(len(rows), 'sequence')}, {place(rows)}: the right "
                "labels would be a guess"
            )
        for sample in self.samples:
            yield f"{place([sample.row])}, {', '.join(sample.rules)}"
            yield f"  before: {sample.before}"
            yield f"  after:  {sample.after}"
        if not self.changes:
            yield "nothing to mend"


def repair(view: View) -> Repair:
    """Mend what needs no guess.

    * Labels that are the next token's are moved back. A label after the last token, which the row
      then lacks, says what that token is: it is added.
    * Packed rows are cut at their seams, and the first token of a sequence carries no loss there.
    * Padding is left out.
    * The first output token carries loss, where the batch's own mask says that it is output.
    * The end of a turn carries loss, where it stands directly after an answer that does.

    A sequence whose labels are neither its tokens nor the next ones, or that has none, is left out.

    Example:
        >>> from sgp.auditing.view import read
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> twice = torch.tensor([[-100, 7, 8, -100]])
        >>> found = repair(read({"input_ids": ids, "labels": twice}))
        >>> found.rows
        [{'input_ids': [5, 6, 7, 8], 'labels': [-100, -100, 7, 8]}]
        >>> found.changes
        Counter({'labels-shifted-twice': 1})

    Args:
        view: of a batch (`sgp.auditing.view.read`); only what it knew before a backward pass.
    """
    parts = _Parts(view)
    changed: dict[str, Tensor] = {}  # rule: (S,) labels changed
    shifted = masks.shifted_twice(parts.view)
    guess = masks.not_the_inputs(parts.view)
    view_, beyond = _moved_back(parts, shifted)
    guess |= masks.differing(view_).any(1)
    changed["labels-shifted-twice"] = ((view_.labels != IGNORE).sum(1) + (beyond >= 0)) * shifted
    whole = _lengthened(view_, beyond)
    _seams_and_padding(parts, whole, shifted, beyond, changed)
    whole = _relabelled(whole, whole.labels)
    for rule, find in (
        ("first-output-untrained", masks.first_output_lost),
        ("turn-end-unscored", masks.unscored_ends),
    ):
        at = find(whole)
        changed[rule] = at.sum(1)
        whole = _relabelled(whole, torch.where(at, whole.input_ids, whole.labels))
    return _written(view, parts, whole, guess, changed)


class _Parts:
    """The sequences of a batch, (S, L), padded on the right."""

    def __init__(self, view: View) -> None:
        B, T = view.input_ids.shape
        at = view.attended.flatten().nonzero()[:, 0]
        begins = (view.starts.flatten()[at]) | (at % T == 0)
        first = begins.nonzero()[:, 0]
        self.number = begins.cumsum(0) - 1
        self.column = torch.arange(len(at)) - first[self.number]
        self.at = at
        self.lengths = torch.bincount(self.number, minlength=len(first))
        self.row = at[first] // T
        self.first = at[first] % T
        self.of_each_row = torch.bincount(self.row, minlength=B)
        ids = self._take(view.input_ids, 0)
        labels = self._take(view.labels, IGNORE)
        last = first + self.lengths - 1
        after = at[last] + 1  # in the flattened batch
        inside = after % T != 0
        after = torch.where(inside, after, 0)
        self.inside = inside
        self.next_id = view.input_ids.flatten()[after]
        self.next_label = view.labels.flatten()[after]
        self.first_id = view.input_ids[self.row, 0]
        self.first_labelled = view.labels[self.row, 0] != IGNORE
        self.next_attended = view.attended.flatten()[after] & inside
        attended = torch.arange(ids.shape[1]) < self.lengths[:, None]
        starts = torch.zeros_like(attended)
        starts[:, :1] = True
        self.view = _relabelled(
            replace(
                view,
                input_ids=ids,
                attended=attended,
                starts=starts,
                outputs=None if view.outputs is None else self._take(view.outputs, 0),
                log_prob=None,
                logit_grad_norm=None,
                measured=None,
            ),
            labels,
        )
        self.labelled_padding = ((view.labels != IGNORE) & ~view.attended).sum(1)  # (B,)
        self.crossed = masks.crossed(view).flatten()[at[first]]
        self.predicted_by_padding = masks.padding_scored(view).flatten()[at[first]]

    def _take(self, x: Tensor, fill: int) -> Tensor:
        longest = max([1, *self.lengths.tolist()])
        found = torch.full((len(self.lengths), longest), fill, dtype=x.dtype)
        found[self.number, self.column] = x.flatten()[self.at]
        return found


def _relabelled(view: View, labels: Tensor) -> View:
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = labels[:, 1:]
    return replace(view, labels=labels, targets=targets)


def _moved_back(parts: _Parts, shifted: Tensor) -> tuple[View, Tensor]:
    """The labels one token later where they are shifted, and the token after the last, or -1."""
    view = parts.view
    moved = torch.full_like(view.labels, IGNORE)
    moved[:, 1:] = torch.where(view.attended[:, 1:], view.labels[:, :-1], IGNORE)
    labels = torch.where(shifted[:, None], moved, view.labels)
    last = (parts.lengths - 1)[:, None]
    beyond = view.labels.gather(1, last)[:, 0]
    final = view.input_ids.gather(1, last)[:, 0]
    ends = torch.tensor(sorted(view.eos), dtype=final.dtype)
    not_ends = torch.tensor(
        sorted(view.special | ({view.bos} - view.eos if view.bos is not None else set())),
        dtype=final.dtype,
    )
    lost_end = torch.isin(beyond, ends) & ~torch.isin(final, ends)
    of_padding = parts.inside & (beyond == parts.next_id)  # or of the next sequence
    of_padding &= parts.next_attended | ~lost_end | (parts.next_label != IGNORE)
    rolled = ~parts.inside & (beyond == parts.first_id) & parts.first_labelled & ~lost_end
    real = shifted & (beyond != IGNORE) & ~of_padding & ~rolled & ~torch.isin(beyond, not_ends)
    return _relabelled(view, labels), torch.where(real, beyond, -1)


def _lengthened(view: View, beyond: Tensor) -> View:
    """With the tokens that only the labels had."""
    if not bool((beyond >= 0).any()):
        return replace(view, labels=view.labels.clone())
    rows = (beyond >= 0).nonzero()[:, 0]
    at = view.attended.sum(1)[rows]

    def grown(x: Tensor, fill: int, new: Tensor | int) -> Tensor:
        found = torch.cat([x, x.new_full((len(x), 1), fill)], 1)
        found[rows, at] = new
        return found

    token = beyond[rows]
    longer = replace(
        view,
        input_ids=grown(view.input_ids, 0, token),
        attended=grown(view.attended, 0, 1),
        starts=grown(view.starts, 0, 0),
        outputs=None if view.outputs is None else grown(view.outputs, 0, 1),
    )
    return _relabelled(longer, grown(view.labels, IGNORE, token))


def _seams_and_padding(
    parts: _Parts, view: View, shifted: Tensor, beyond: Tensor, changed: dict[str, Tensor]
) -> None:
    """Take the loss of a first token that another sequence or padding predicts; count both."""
    last = parts.view.labels.gather(1, (parts.lengths - 1)[:, None])[:, 0]
    dropped = shifted & (last != IGNORE) & (beyond < 0) & parts.inside
    crossed = torch.where(shifted, dropped & parts.next_attended, parts.crossed)
    early = ~shifted & parts.predicted_by_padding
    view.labels[:, 0] = torch.where(crossed & ~shifted | early, IGNORE, view.labels[:, 0])
    padding = early.long() + (dropped & ~parts.next_attended).long()
    of_row = torch.zeros_like(padding)  # a row's padding is counted with its first sequence
    new = torch.ones_like(shifted)
    new[1:] = parts.row[1:] != parts.row[:-1]
    of_row[new] = parts.labelled_padding[parts.row[new]]
    changed["crosses-boundary"] = crossed.long()
    changed["padding-scored"] = padding + of_row


# -- what comes out --------------------------------------------------------------------------------


def _written(
    view: View, parts: _Parts, whole: View, guess: Tensor, changed: dict[str, Tensor]
) -> Repair:
    found = Repair(cut=int((parts.of_each_row > 1).sum()), num_rows=len(view.input_ids))
    trained = (whole.targets != IGNORE).any(1)
    nothing = ~trained & ~guess
    only_padding = nothing & _is_padding(view, whole, parts)
    empty_rows = (parts.of_each_row == 0).nonzero()[:, 0].tolist()
    found.left = sorted(
        [Left(row, "labels-not-the-inputs") for row in parts.row[guess].tolist()]
        + [Left(row, "no-targets") for row in parts.row[nothing & ~only_padding].tolist()]
        + [Left(row, "no-targets") for row in empty_rows]
    )
    kept = (trained & ~guess).nonzero()[:, 0]
    lengths = whole.attended.sum(1)[kept].tolist()
    ids, labels = whole.input_ids[kept].tolist(), whole.labels[kept].tolist()
    found.rows = [
        {"input_ids": x[:n], "labels": y[:n]} for x, y, n in zip(ids, labels, lengths, strict=True)
    ]
    found.sources = parts.row[kept].tolist()
    for rule in DONE:
        counts = changed[rule][kept]
        if bool(counts.any()):
            found.changes[rule] = int((counts > 0).sum())
            found.labels[rule] = int(counts.sum())
    many = torch.stack([changed[rule] for rule in DONE])[:, kept] > 0
    for n in many.any(0).nonzero()[:SAMPLES, 0].tolist():
        rules = tuple(rule for rule, has in zip(DONE, many[:, n].tolist(), strict=True) if has)
        sequence = int(kept[n])
        length = int(parts.lengths[sequence])
        old = {
            "input_ids": parts.view.input_ids[sequence, :length].tolist(),
            "labels": parts.view.labels[sequence, :length].tolist(),
        }
        at = _first_change(old, found.rows[n])
        found.samples.append(
            Sample(
                found.sources[n],
                rules,
                _text(view.tokenizer, old, at),
                _text(view.tokenizer, found.rows[n], at),
            )
        )
    return found


def _is_padding(view: View, whole: View, parts: _Parts) -> Tensor:
    """(S,) bool: one token over and over, at the end of a packed row: no one's sequence."""
    first = whole.input_ids[:, :1]
    alike = ((whole.input_ids == first) | ~whole.attended).all(1)
    if view.pad is not None:
        alike &= first[:, 0] == view.pad
    return alike & (parts.first > 0)


def _first_change(old: dict[str, list[int]], new: dict[str, list[int]]) -> int:
    pairs = zip(old["labels"], new["labels"], strict=False)
    return next((t for t, (a, b) in enumerate(pairs) if a != b), 0)


def _text(tokenizer: Any, row: dict[str, list[int]], at: int) -> str:
    """The tokens around one of them, those with a label in brackets, and labels that differ."""
    begin = max(0, at - WINDOW // 2)
    ids, labels = (row[name][begin : begin + WINDOW] for name in ("input_ids", "labels"))
    pieces = ["... "] if begin else []
    t = 0
    while t < len(ids):
        end = t + 1
        while end < len(ids) and (labels[end] == IGNORE) == (labels[t] == IGNORE):
            end += 1
        text = _decoded(tokenizer, ids[t:end])
        if labels[t] == IGNORE:
            pieces.append(text)
        elif labels[t:end] == ids[t:end]:
            pieces.append(f"[{text}]")
        else:
            pieces.append(f"[{text} => {_decoded(tokenizer, labels[t:end])}]")
        t = end
    more = len(row["input_ids"]) - begin - len(ids)
    return "".join([*pieces, f" ... {more} more" if more > 0 else ""])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer is None:
        return " " + " ".join(map(str, ids)) + " "
    return str(tokenizer.decode(ids)).replace("\n", "\\n")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

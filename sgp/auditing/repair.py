"""What can be mended in the labels of a batch without a guess, and what cannot.

A batch is taken apart into its sequences, without padding, so that each is judged by itself. A
shift is undone first, and the other rules look at the labels that it leaves.
"""

from __future__ import annotations

import itertools
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
from sgp.auditing.turns import text_of
from sgp.auditing.view import View
from sgp.labels import IGNORE

if TYPE_CHECKING:  # rich is imported where it prints
    from rich.console import Console

SAMPLES = 3
WINDOW = 40  # tokens of a sample
DONE = {  # rule: what was done about it, in the order in which it is done
    "labels-shifted-twice": "moved back by one token",
    "crosses-boundary": "first tokens of packed sequences carry no loss",
    "padding-scored": "padding is left out",
    "first-output-untrained": "the first output token carries loss",
    "turn-end-unscored": "the end of the turn carries loss",
}
WHY = {  # code: why such a sequence is left out
    "labels-not-the-inputs": "the right labels would be a guess",
    "no-targets": "no token carries loss",
}


class Left(NamedTuple):
    """A sequence that is not written, for one of the reasons `WHY`."""

    row: int  # of the batch
    code: str


class Changed(NamedTuple):
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
    samples: list[Changed] = field(default_factory=list)
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
            whole.add(part)
        return whole

    def add(self, part: Repair) -> None:
        """Take in the repair of the batch that comes next.

        Example:
            >>> whole = Repair(num_rows=2)
            >>> whole.add(Repair(left=[Left(0, "no-targets")], num_rows=1))
            >>> whole.left
            [Left(row=2, code='no-targets')]
        """
        before = self.num_rows
        self.rows += part.rows
        self.sources += [before + row for row in part.sources]
        self.changes.update(part.changes)
        self.labels.update(part.labels)
        self.left += [Left(before + row, code) for row, code in part.left]
        room = SAMPLES - len(self.samples)
        self.samples += [s._replace(row=before + s.row) for s in part.samples[:room]]
        self.cut += part.cut
        self.num_rows += part.num_rows

    def write(self, path: str | Path) -> Path:
        """Write the rows as JSON lines, which `sgp audit` and any trainer read.

        Example:
            >>> report.repair().write("mended.jsonl")  # doctest: +SKIP

        Raises:
            OSError: the file cannot be written.
        """
        path = Path(path)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(self.json_lines())
        return path

    def json_lines(self) -> Iterator[str]:
        """The rows as they are written."""
        return (json.dumps(row) + "\n" for row in self.rows)

    def print(
        self,
        console: Console | None = None,
        *,
        lines: Sequence[int] | None = None,
        unit: str = "line",
    ) -> None:
        """Every change by rule and count, what was left out, and three rows before and after.

        Args:
            console: of rich; None: the terminal.
            lines: of a file, the line of each row of the batch, which is then named instead.
            unit: what these are called.
        """
        from rich.console import Console  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = console or Console()
        for line in self.said(lines, unit):
            console.print(Text(line), soft_wrap=True)

    def said(self, lines: Sequence[int] | None = None, unit: str = "line") -> Iterator[str]:
        """What `print` prints, line by line."""

        def place(rows: Iterable[int]) -> str:
            found = sorted({row if lines is None else lines[row] for row in rows})
            name = "row" if lines is None else unit
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
            many = _count(len(rows), "sequence")
            yield f"left out: {code}: {many}, {place(rows)}: {WHY[code]}"
        for sample in self.samples:
            yield f"{place([sample.row])}, {', '.join(sample.rules)}"
            yield f"  before: {sample.before}"
            yield f"  after:  {sample.after}"
        if not self.changes and not self.cut:
            yield "nothing to mend"


def repair(view: View) -> Repair:
    """Mend what needs no guess.

    * Labels that are the next token's are moved back. A label after the last token, which the row
      then lacks, says what that token is: it is added.
    * A target of a row's last token, which `shift_labels` may have, is that token too.
    * Packed rows are cut at their seams, and the first token of a sequence carries no loss there.
    * Padding is left out; also padding tokens that end a sequence many times over, with loss, and
      such ends behind the first.
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
    shifted = masks.shifted_twice(parts.view)
    moved, beyond = _moved_back(parts, shifted)
    guess = masks.not_the_inputs(parts.view) | masks.differing(moved).any(1)
    changed = {"labels-shifted-twice": shifted * ((moved.labels != IGNORE).sum(1) + (beyond >= 0))}
    beyond = torch.where(shifted, beyond, parts.target_beyond)
    whole = _lengthened(moved, beyond)
    whole, of_seams, of_padding = _seams_and_padding(parts, whole, shifted, beyond)
    changed |= {"crosses-boundary": of_seams, "padding-scored": of_padding}
    for rule, find in (
        ("first-output-untrained", masks.first_output_lost),
        ("turn-end-unscored", masks.unscored_ends),
    ):
        at = find(whole)
        changed[rule] = at.sum(1)
        whole = _relabelled(whole, torch.where(at, whole.input_ids, whole.labels))
    again = masks.repeated(whole)
    changed["padding-scored"] += _with_text(parts, (again & whole.scored).sum(1))
    whole = replace(whole, attended=whole.attended & ~again)
    whole = _relabelled(whole, torch.where(again, IGNORE, whole.labels))
    return _written(parts, whole, guess, changed)


class _Parts:
    """The S sequences of a batch as a view of their own, (S, L), padded on the right.

    And what stood around each: `row`, `first` (its column), `rows` (sequences of each row), and of
    the token after it (`inside` the row): `next_id`, `next_label`, `next_attended`; `target_beyond`
    is what the row's last token has to predict, -1 where it is not this sequence's or nothing.
    """

    def __init__(self, view: View) -> None:
        T = view.input_ids.shape[1]
        at = view.attended.flatten().nonzero()[:, 0]
        begins = view.starts.flatten()[at] | (at % T == 0)
        first = begins.nonzero()[:, 0]
        self.at = at
        self.number = begins.cumsum(0) - 1
        self.column = torch.arange(len(at)) - first[self.number]
        self.lengths = torch.bincount(self.number, minlength=len(first))
        self.row, self.first = at[first] // T, at[first] % T
        self.rows = torch.bincount(self.row, minlength=len(view.input_ids))
        after = at[first + self.lengths - 1] + 1
        self.inside = after % T != 0
        after = torch.where(self.inside, after, 0)
        self.next_id = view.input_ids.flatten()[after]
        self.next_label = view.labels.flatten()[after]
        self.next_attended = view.attended.flatten()[after] & self.inside
        self.target_beyond = torch.where(self.inside, -1, view.targets[self.row, -1].clamp(min=-1))
        self.front_id = view.input_ids[self.row, 0]
        self.front_labelled = view.labels[self.row, 0] != IGNORE
        self.crossed = masks.crossed(view).flatten()[at[first]]
        self.after_padding = masks.padding_scored(view).flatten()[at[first]]
        self.labelled_padding = ((view.labels != IGNORE) & ~view.attended).sum(1)  # (B,)
        ids = self._take(view.input_ids, 0)
        attended = torch.arange(ids.shape[1]) < self.lengths[:, None]
        starts = torch.zeros_like(attended)
        starts[:, 0] = True
        alone = replace(
            view,
            input_ids=ids,
            attended=attended,
            starts=starts,
            outputs=None if view.outputs is None else self._take(view.outputs, 0),
        )
        self.view = _relabelled(alone, self._take(view.labels, IGNORE))

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
    lost_end = _among(beyond, view.eos) & ~_among(final, view.eos)
    of_another = parts.inside & (beyond == parts.next_id)  # the next sequence's, or padding's
    of_another &= parts.next_attended | ~lost_end | (parts.next_label != IGNORE)
    rolled = ~parts.inside & (beyond == parts.front_id) & parts.front_labelled & ~lost_end
    begins = view.special | (frozenset() if view.bos is None else {view.bos})
    real = shifted & (beyond != IGNORE) & ~of_another & ~rolled
    real &= ~_among(beyond, begins - view.eos)
    return _relabelled(view, labels), torch.where(real, beyond, -1)


def _among(ids: Tensor, some: frozenset[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(some), dtype=ids.dtype))


def _lengthened(view: View, beyond: Tensor) -> View:
    """With the tokens that only the labels had."""
    if not bool((beyond >= 0).any()):
        return view
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
    parts: _Parts, view: View, shifted: Tensor, beyond: Tensor
) -> tuple[View, Tensor, Tensor]:
    """Without the loss of a first token that another sequence or padding predicts; both counted."""
    last = parts.view.labels.gather(1, (parts.lengths - 1)[:, None])[:, 0]
    dropped = shifted & (last != IGNORE) & (beyond < 0) & parts.inside
    crossed = torch.where(shifted, dropped & parts.next_attended, parts.crossed)
    early = ~shifted & parts.after_padding
    padding = (early | (dropped & ~parts.next_attended)).long()
    opens = torch.ones_like(shifted)  # a row's padding is counted with its first sequence
    opens[1:] = parts.row[1:] != parts.row[:-1]
    padding[opens] += parts.labelled_padding[parts.row[opens]]
    labels = view.labels.clone()
    labels[~shifted & parts.crossed | early, 0] = IGNORE
    return _relabelled(view, labels), crossed.long(), padding


def _with_text(parts: _Parts, padding: Tensor) -> Tensor:
    """Of sequences of padding alone, counted with the row's first, as other padding is."""
    alone = _is_padding(parts)
    numbers = torch.arange(len(padding))
    opens = torch.where(parts.row != parts.row.roll(1), numbers, 0).cummax(0).values
    found = torch.where(alone, 0, padding)
    return found.index_add(0, opens[alone], padding[alone])


# -- what comes out --------------------------------------------------------------------------------


def _written(parts: _Parts, whole: View, guess: Tensor, changed: dict[str, Tensor]) -> Repair:
    found = Repair(cut=int((parts.rows > 1).sum()), num_rows=len(parts.rows))
    trained = (whole.targets != IGNORE).any(1)
    nothing = ~trained & ~guess
    empty = nothing & ~_is_padding(parts)
    found.left = sorted(
        [Left(row, "labels-not-the-inputs") for row in parts.row[guess].tolist()]
        + [Left(row, "no-targets") for row in parts.row[empty].tolist()]
        + [Left(row, "no-targets") for row in (parts.rows == 0).nonzero()[:, 0].tolist()]
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
    touched = torch.stack([changed[rule] for rule in DONE])[:, kept] > 0
    for n in touched.any(0).nonzero()[:SAMPLES, 0].tolist():
        rules = tuple(rule for rule, has in zip(DONE, touched[:, n].tolist(), strict=True) if has)
        number, length = int(kept[n]), int(parts.lengths[kept[n]])
        old = {
            "input_ids": parts.view.input_ids[number, :length].tolist(),
            "labels": parts.view.labels[number, :length].tolist(),
        }
        at = _first_change(old, found.rows[n])
        before, after = (_text(whole.tokenizer, row, at) for row in (old, found.rows[n]))
        found.samples.append(Changed(found.sources[n], rules, before, after))
    return found


def _is_padding(parts: _Parts) -> Tensor:
    """(S,) bool: one token over and over, at the end of a packed row: no one's sequence."""
    view = parts.view
    alike = ((view.input_ids == view.input_ids[:, :1]) | ~view.attended).all(1)
    if view.pad is not None:
        alike &= _among(view.input_ids[:, 0], view.eos | {view.pad})
    return alike & (parts.first > 0)


def _first_change(old: dict[str, list[int]], new: dict[str, list[int]]) -> int:
    pairs = itertools.zip_longest(old["labels"], new["labels"])
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
    return text_of(tokenizer, *ids).replace("\n", "\\n")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

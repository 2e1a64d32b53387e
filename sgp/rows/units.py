"""Which kept rows stand together in one call of a caller's loss: a row, a sequence, a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.labels import kept_counts
from sgp.rows.problem import Problem
from sgp.rows.recipe import shown
from sgp.selection import Selection

BY = ("row", "sequence", "group")


class Piece(NamedTuple):
    """Some kept rows, and the units that they are all rows of."""

    rows: slice  # of the M kept rows
    units: slice


class Units(NamedTuple):
    """What has one number in a caller's loss: rows, or sequences or groups of them."""

    by: str
    number: int  # M rows, S sequences or G groups
    ends: tuple[int, ...] = ()  # kept rows up to the end of each sequence or group; rows have none
    present: Tensor | None = None  # (number,) bool on the device: has a kept row; None: rows

    def longest(self) -> int:
        """Kept rows of the longest."""
        return max((b - a for a, b in zip((0, *self.ends), self.ends, strict=False)), default=1)

    def pieces(self, kept: int, most: int) -> list[Piece]:
        """The kept rows in pieces of at most `most` that part no unit.

        Example:
            >>> for piece in Units("sequence", 4, (3, 3, 5, 9)).pieces(9, 5):
            ...     print(piece.rows, piece.units)
            slice(0, 5, None) slice(0, 3, None)
            slice(5, 9, None) slice(3, 4, None)

        Raises:
            ValueError: a longer unit.
        """
        if self.by == "row":
            starts = range(0, kept, most)
            parts = [slice(start, min(start + most, kept)) for start in starts]
            return [Piece(part, part) for part in parts]
        found: list[Piece] = []
        first = start = end = 0
        for unit, stop in enumerate(self.ends):
            if stop - end > most:
                raise ValueError(f"a {self.by} of {stop - end} rows in pieces of {most}")
            if stop - start > most:
                found.append(Piece(slice(start, end), slice(first, unit)))
                first, start = unit, end
            end = stop
        found.append(Piece(slice(start, end), slice(first, self.number)))
        return found

    def whole(self, kept: int) -> Piece:
        """All of them."""
        return Piece(slice(0, kept), slice(0, self.number))

    def count(self, units: slice) -> int:
        """How many of these have a kept row."""
        if self.by == "row":
            return int(units.stop - units.start)
        before = self.ends[units.start - 1] if units.start else 0
        return len({*self.ends[units], before}) - 1

    def mask(self, units: slice) -> Tensor:
        """(number,) bool: which of these sequences or groups have a kept row."""
        assert self.present is not None, "of sequences or groups"  # noqa: S101
        if units.stop - units.start == self.number:
            return self.present
        place = torch.arange(self.number, device=self.present.device)
        here = (place >= int(units.start)) & (place < int(units.stop))
        return self.present & here


def check_loss_function(name: str, loss_fn: Any) -> None:
    """Raise TypeError for what cannot be called with statistics and rows."""
    if not callable(loss_fn) or isinstance(loss_fn, type):
        raise TypeError(
            f"{name}: loss_fn = {shown(loss_fn)}; expected a function of (tokens, rows)"
        )


def make_units(
    name: str,
    by: Any,
    groups: Any,
    problem: Problem,
    target: Tensor | Selection,
    kept: int,
) -> Units:
    """The units of a call; of labels, and of groups on a GPU, this waits for the device.

    Args:
        name: of the function, for messages.
        by, groups: as they were passed.
        problem, target: the rows, and what they were made from.
        kept: M.

    Raises:
        ValueError, TypeError: an unknown `by`; groups without it, or of another shape, or that
            fall; sequences that were cut, or that have weights.
    """
    if not isinstance(by, str) or by not in BY:
        raise ValueError(f"{name}: by = {shown(by)}; expected one of {BY}")
    if (groups is not None) != (by == "group"):
        what = "needs groups, the number of each sequence's group" if by == "group" else (
            f"together with groups = {shown(groups)}; groups belong to by='group'"
        )  # fmt: skip
        raise ValueError(f"{name}: by = {by!r} {what}")
    if by == "row":
        return Units(by, kept)
    if problem.token_weight is not None:
        raise ValueError(
            f"{name}: by = {by!r} of a Selection with token weights, which multiply the numbers of "
            "rows; use by='row', or multiply inside loss_fn"
        )
    if problem.is_part:
        raise ValueError(
            f"{name}: by = {by!r} of a Selection that was cut: this rank does not have whole "
            "sequences"
        )
    S = problem.num_sequences
    counts = target.kept_counts if isinstance(target, Selection) else None
    of_device = kept_counts(problem.target != problem.recipe.ignore_index, S, problem.boundaries)
    counts = of_device if counts is None else counts
    present = of_device > 0
    ends = counts.cumsum(0).tolist()
    if by == "sequence":
        return Units(by, S, tuple(ends), present)
    group_of = _checked_groups(name, groups, S)
    lasts = [i for i in range(S) if i + 1 == S or group_of[i] != group_of[i + 1]]
    last = torch.tensor(lasts, dtype=torch.int64, device="cpu")
    if present.is_cuda:
        last = last.pin_memory().to(present.device, non_blocking=True)
    up_to = of_device.cumsum(0)[last]
    present = torch.cat([up_to[:1], up_to.diff()]) > 0
    return Units(by, len(lasts), tuple(ends[i] for i in lasts), present)


def _checked_groups(name: str, groups: Any, num_sequences: int) -> list[int]:
    """The group of each sequence, as numbers."""
    if not isinstance(groups, (Tensor, Sequence)) or isinstance(groups, str):
        raise TypeError(f"{name}: groups = {shown(groups)}; expected a tensor of integers")
    try:
        values = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: groups = {groups!r}; expected integers") from error
    if values.numel() and (values.is_floating_point() or values.is_complex()):
        raise TypeError(f"{name}: groups are {values.dtype}; expected integers")
    if tuple(values.shape) != (num_sequences,):
        raise ValueError(
            f"{name}: groups are {tuple(values.shape)}; expected ({num_sequences},), a number for "
            "each sequence, as [0, 0, 1, 1] for two pairs"
        )
    listed: list[int] = values.tolist()
    for i in range(1, num_sequences):
        if listed[i] < listed[i - 1]:
            raise ValueError(
                f"{name}: groups fall from {listed[i - 1]} to {listed[i]} at sequence {i}; put the "
                "sequences of a group next to each other and number the groups in order"
            )
    return listed

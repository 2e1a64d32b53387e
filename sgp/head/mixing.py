"""Whether a caller's loss function mixes rows, sequences or groups, which would be lost in chunks.

Two probes, both with the rows of one call. The statistics of half of the units are changed, and no
number of the other half may change: with the halves by each bit of the units' places, every pair is
apart once. And each half of the units is given alone, where a number may differ by what a shorter
matmul rounds, and no more: a mean, a count of the rows in the call, or whatever else they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgp.reference import TokenLogProbs
from sgp.rows.units import Piece, Units

RANDOM = "random"
EXACT = 1e-6  # of the largest number: the same arithmetic on the same values
CLOSE = 1e-2  # other shapes, in which matmuls of 16 bits may round otherwise
GOLDEN = 0.618034

Function = Callable[[TokenLogProbs, Tensor, Piece], tuple[Tensor, Any]]

ADVICE = (
    "so the loss would depend on the chunks. Let each number depend on its own {by} alone: compute "
    "a mean, a count or another divisor before the call{more}"
)


def look(
    function: Function,
    units: Units,
    tokens: TokenLogProbs,
    rows: Tensor,
    piece: Piece,
    numbers: Tensor,
) -> str:
    """What is wrong with the function, RANDOM, or nothing; waits for the device once.

    Args:
        function: gives numbers for the rows of a piece.
        units, tokens, rows, piece, numbers: of one call of it.
    """
    probe = _Probe(function, units, tokens, rows, piece)
    base = probe.per_unit(numbers, piece)
    again = probe.numbers(tokens)
    found = [_differs(base, again, EXACT).any()]
    bits = range(max(1, (probe.count - 1).bit_length()))
    halves = [(bit, side) for bit in bits for side in (0, 1)]
    for bit, side in halves:
        changed = probe.side(bit, side)
        found.append(probe.others_change(base, changed).any())
    try:
        apart = torch.cat([probe.alone(part) for part in probe.halves()])
    except Exception as error:
        raise ValueError(
            f"loss_fn failed when it was called with a part of the rows ({error}); it is called "
            "chunk by chunk, so take the values of your own tensors with [rows]"
        ) from error
    found.append(_differs(base, apart, CLOSE).any())
    is_random, *mixes, depends = torch.stack(found).tolist()
    if is_random:
        return RANDOM
    by = units.by
    more = "" if by == "group" else "; for a loss of whole sequences pass by='sequence'"
    if by == "sequence":
        more = "; for losses of several sequences pass by='group'"
    advice = ADVICE.format(by=by, more=more)
    if any(mixes):
        pair = probe.pair(base, *halves[mixes.index(True)])
        return f"loss_fn mixes {by}s: {pair}, {advice}"
    if depends:
        return f"loss_fn gives a {by} another number in a call with fewer {by}s, {advice}"
    return ""


class _Probe:
    """Calls of the function with changed statistics, or with some of the units."""

    def __init__(
        self, function: Function, units: Units, tokens: TokenLogProbs, rows: Tensor, piece: Piece
    ) -> None:
        """See `look`."""
        self.function, self.units, self.tokens = function, units, tokens
        self.rows, self.piece = rows, piece
        self.count = units.count(piece.units)
        start, self.stops = piece.rows.start, self._stops()
        lengths = [b - a for a, b in zip((start, *self.stops), self.stops, strict=False)]
        places = torch.arange(self.count, device=rows.device)
        self.unit = places
        if units.by != "row":
            repeats = torch.tensor(lengths, device=rows.device)
            self.unit = places.repeat_interleave(repeats, output_size=rows.numel())
        self.shift = 0.25 + (torch.arange(rows.numel(), device=rows.device) * GOLDEN) % 1

    def _stops(self) -> list[int]:
        """Where the units that have a row end, among the kept rows."""
        part = self.piece.rows
        if self.units.by == "row":
            return list(range(part.start + 1, part.stop + 1))
        ends = self.units.ends[self.piece.units]
        return [end for before, end in zip((part.start, *ends), ends, strict=False) if end > before]

    def per_unit(self, numbers: Tensor, piece: Piece) -> Tensor:
        """One number for each unit that has a row, in order."""
        if self.units.present is None or len(numbers) == self.units.count(piece.units):
            return numbers
        order = self.units.mask(piece.units).to(torch.int8)
        first = order.argsort(descending=True, stable=True)
        return numbers[first[: self.units.count(piece.units)]]

    def numbers(self, tokens: TokenLogProbs) -> Tensor:
        """What the function gives for all rows."""
        numbers, _ = self.function(tokens, self.rows, self.piece)
        return self.per_unit(numbers.detach(), self.piece)

    def side(self, bit: int, side: int) -> Tensor:
        """(count,) bool: the units whose place has, or lacks, a bit."""
        return ((torch.arange(self.count, device=self.rows.device) >> bit) & 1) == side

    def changed(self, units: Tensor) -> TokenLogProbs:
        """The statistics, others in the rows of these units."""
        here = units[self.unit]
        log_prob, entropy, lse, is_top1, _ = self.tokens
        shift = torch.where(here, self.shift, 0).to(log_prob.dtype)
        return TokenLogProbs(
            log_prob - shift, entropy * (1 - shift / 2), lse + shift, is_top1 ^ here
        )

    def others_change(self, base: Tensor, units: Tensor) -> Tensor:
        """(count,) bool: units other than these whose numbers change with these."""
        return _differs(base, self.numbers(self.changed(units)), EXACT) & ~units

    def halves(self) -> list[Piece]:
        """The piece in two."""
        middle = self.count // 2
        at = self.stops[middle - 1]
        part, units = self.piece
        if self.units.by == "row":
            return [Piece(slice(part.start, at), slice(part.start, at)),
                    Piece(slice(at, part.stop), slice(at, part.stop))]  # fmt: skip
        cut = units.start + self.units.ends[units].index(at) + 1
        return [
            Piece(slice(part.start, at), slice(units.start, cut)),
            Piece(slice(at, part.stop), slice(cut, units.stop)),
        ]

    def alone(self, piece: Piece) -> Tensor:
        """The numbers of a part of the rows, without the others."""
        some = slice(
            piece.rows.start - self.piece.rows.start, piece.rows.stop - self.piece.rows.start
        )
        tokens = TokenLogProbs(*(x[some] for x in self.tokens if x is not None))
        numbers, _ = self.function(tokens, self.rows[some], piece)
        return self.per_unit(numbers.detach(), piece)

    def pair(self, base: Tensor, bit: int, side: int) -> str:
        """Words for one unit whose number changes with another's values."""
        changed = self.side(bit, side)
        target = int(self.others_change(base, changed).nonzero()[0])
        candidates = changed.nonzero().squeeze(1)
        while candidates.numel() > 1:
            half = candidates[: candidates.numel() // 2]
            some = torch.zeros_like(changed).index_fill(0, half, True)
            is_here = bool(self.others_change(base, some)[target])
            candidates = half if is_here else candidates[half.numel() :]
        source, by = int(candidates[0]), self.units.by
        where = ""
        if by == "row":
            where = f" (positions {int(self.rows[target])} and {int(self.rows[source])})"
        return (
            f"the number of {by} {target} of a call changes with the values of {by} {source}{where}"
        )


def _differs(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Where numbers are not the same; infinities and NaN are what they are."""
    finite = torch.where(a.isfinite(), a.abs(), 0)
    close = (a - b).abs() <= tolerance * finite.amax()
    return ~(close | (a == b) | (a.isnan() & b.isnan()))

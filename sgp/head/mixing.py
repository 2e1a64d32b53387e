"""Whether a caller's loss function mixes rows, sequences or groups, which would be lost in chunks.

Three probes, all with the rows of one call. The statistics of half of the units are changed, and no
number of the other half may change: with the halves by each bit of the units' places, every pair is
apart once. Each half of the units is given alone. And some units are given one by one, where a mean
over the call, a count of its rows or whatever else they share is quite another. There a number may
differ by what a shorter matmul rounds.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgp.reference import TokenLogProbs
from sgp.rows.units import Piece, Units

RANDOM = "random"
EXACT = 1e-6  # of the largest number: the same arithmetic on the same values
CLOSE = 1e-2  # of other shapes, in which matmuls of 16 bits may round otherwise
SINGLES = 8  # units that are given one by one; half of them must differ
GOLDEN = 0.618034

Function = Callable[[TokenLogProbs, Tensor, Piece], tuple[Tensor, Any]]

ADVICE = (
    "so the loss would depend on the chunks. Let each number depend on its own {by} alone: compute "
    "a mean, a count or another divisor before the call{more}"
)
MORE = {
    "row": "; for a loss of whole sequences pass by='sequence'",
    "sequence": "; for losses of several sequences pass by='group'",
    "group": "",
}


def find_mixing(
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

    Raises:
        ValueError: the function fails when it is called with a part of the rows.
    """
    probe = _Probe(function, units, tokens, rows, piece)
    base = probe.per_unit(numbers.detach(), piece)
    found = [_differs(base, probe.numbers(tokens), EXACT).any()]
    bits = range(max(1, (probe.count - 1).bit_length()))
    halves = [(bit, side) for bit in bits for side in (0, 1)]
    for bit, side in halves:
        found.append(probe.others_change(base, probe.side(bit, side)).any())
    middle = probe.count // 2
    apart = torch.cat([probe.alone(0, middle), probe.alone(middle, probe.count)])
    found.append(_differs(base, apart, CLOSE).any())
    places = sorted({i * (probe.count - 1) // (SINGLES - 1) for i in range(SINGLES)})
    alone = torch.cat([probe.alone(i, i + 1) for i in places])
    together = torch.cat([base[i : i + 1] for i in places])
    differ = [_differs(a, b, CLOSE) for a, b in zip(together, alone, strict=True)]  # each by itself
    found.append(2 * torch.stack(differ).sum() >= len(places))
    found.append(torch.stack(probe.ignored).any())
    is_random, *mixes, depends, depends_alone, is_unsafe = torch.stack(found).tolist()
    by = units.by
    advice = ADVICE.format(by=by, more=MORE[by])
    if is_random:
        return RANDOM
    if any(mixes):
        pair = probe.pair(base, *halves[mixes.index(True)])
        return f"loss_fn mixes {by}s: {pair}, {advice}"
    if depends or depends_alone:
        return f"loss_fn gives a {by} another number in a call with fewer {by}s, {advice}"
    if is_unsafe:
        return (
            f"loss_fn uses tensors that require grad, and returns infinite or NaN numbers for "
            f"{by}s without rows in a call, by which their gradients would become NaN; keep these "
            "finite, as by counts.clamp(min=1)"
        )
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
        self.ignored = [torch.zeros((), dtype=torch.bool, device=rows.device)]
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
            return numbers.detach()
        mask = self.units.mask(piece.units)
        if numbers.requires_grad:  # of other tensors: the statistics here have no graph
            self.ignored.append((~mask & ~numbers.isfinite()).any())
        first = mask.to(torch.int8).argsort(descending=True, stable=True)
        return numbers.detach()[first[: self.units.count(piece.units)]]

    def numbers(self, tokens: TokenLogProbs) -> Tensor:
        """What the function gives for all rows."""
        copies = TokenLogProbs(*(x.clone() for x in tokens if x is not None))
        numbers, _ = self.function(copies, self.rows, self.piece)
        return self.per_unit(numbers, self.piece)

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

    def alone(self, first: int, last: int) -> Tensor:
        """The numbers of some units without the others."""
        start = self.piece.rows.start
        begin, end = ([start, *self.stops][i] for i in (first, last))
        some = slice(begin - start, end - start)
        units = slice(begin, end)
        if self.units.by != "row":
            ends = self.units.ends
            units = slice(bisect.bisect_right(ends, begin), bisect.bisect_left(ends, end) + 1)
        part = Piece(slice(begin, end), units)
        tokens = TokenLogProbs(*(x[some].clone() for x in self.tokens if x is not None))
        try:
            numbers, _ = self.function(tokens, self.rows[some], part)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"loss_fn failed when it was called with a part of the rows ({error}). It is "
                "called chunk by chunk: take the values of your own tensors with [rows], and let "
                "it take any number of rows"
            ) from error
        return self.per_unit(numbers, part)

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

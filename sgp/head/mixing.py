"""Whether a caller's loss function mixes rows, sequences or groups, which would be lost in chunks.

Three probes, all with the rows of one call. The statistics of half of the units are changed, and no
number of the other half may change: with the halves by each bit of the units' places, every pair is
apart once. Each half of the units is given alone. And some units are given one by one, where a mean
over the call, a count of its rows or whatever else they share is quite another. There a number may
differ by what another order of its sums rounds, so these two have changed statistics too: those of
a first step after sampling may give differences that are nothing but rounding.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.rows.units import Piece, Units

EXACT = 1e-6  # of a row's number, or the largest of sequences: the same arithmetic, the same values
CLOSE = 1e-2  # of other shapes, in which matmuls of 16 bits may round otherwise
REPEATS = 4  # calls with the same rows, by which the noise of a GPU's atomic additions is known
NOISE = 16  # times that may be taken for it
RANDOM = 1e-3  # of the size of numbers: more is no rounding
SINGLES = 8  # units that are given one by one; half of them must differ
GOLDEN = 0.618034

Statistics = Sequence[Tensor]  # log_prob, entropy, lse, is_top1
# Statistics, rows and which ones they are -> numbers, anything, and the leaves of their graph.
Function = Callable[[Statistics, Tensor, Piece], tuple[Tensor, Any, list[Tensor]]]

ADVICE = (
    "so the loss would depend on the chunks. Let each number depend on its own {by} alone: compute "
    "a mean, a count or another divisor before the call{more}"
)
MORE = {
    "row": "; for a loss of whole sequences pass by='sequence'",
    "sequence": "; for losses of several sequences pass by='group'",
    "group": "",
}


class FailedOnPartError(ValueError):
    """A function that works on all rows of a call, and not on some of them."""


class Verdict(NamedTuple):
    """What came of looking."""

    fault: str = ""  # what is wrong with the function
    unknown: str = ""  # why all or a part of it could not be seen
    is_final: bool = True  # whether there is no need to look again


def find_mixing(
    function: Function,
    units: Units,
    statistics: Statistics,
    rows: Tensor,
    piece: Piece,
) -> Verdict:
    """Call the function again and again, and compare; waits for the device once.

    It draws from the caller's random generators, which `torch.random.fork_rng` around it restores.

    Args:
        function: gives numbers for the rows of a piece.
        units, statistics, rows, piece: of one call of it.

    Raises:
        FailedOnPartError: the function fails when it is called with a part of the rows.
    """
    probe = _Probe(function, units, statistics, rows, piece)
    base = probe.numbers(statistics)
    is_random = probe.has_drawn()
    again = torch.stack([probe.numbers(statistics) for _ in range(REPEATS)])
    spread = _largest(again - base)
    scale = base.abs() if units.by == "row" else _largest(base)
    tolerance = EXACT * scale + NOISE * spread
    other = again.isfinite().all(0) != base.isfinite()
    found = [(other | (spread > RANDOM * _largest(base))).any()]
    bits = range(max(1, (probe.count - 1).bit_length()))
    halves = [(bit, side) for bit in bits for side in (0, 1)]
    try:
        found += [probe.others_change(base, tolerance, *half).any() for half in halves]
        if not is_random:
            found += probe.alone()
    except (FailedOnPartError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (of statistics that it did not expect)
        why = f"it raised {error!r} when it was called with changed statistics or fewer rows"
        return Verdict(unknown=why)
    finite = base.isfinite() & (base != 0)
    found += [torch.stack(probe.ignored).any(), finite.sum() >= 2]
    another, *rest, is_unsafe, tells = torch.stack(found).tolist()
    mixes, depends = rest[: len(halves)], rest[len(halves) :]
    by = units.by
    advice = ADVICE.format(by=by, more=MORE[by])
    if another:
        return Verdict(unknown="it returned other numbers when it was called again")
    if any(mixes):
        pair = probe.pair(base, tolerance, *halves[mixes.index(True)])
        return Verdict(f"loss_fn mixes {by}s: {pair}, {advice}")
    if any(depends):
        return Verdict(f"loss_fn gives a {by} another number in a call with fewer {by}s, {advice}")
    if is_unsafe:
        return Verdict(
            f"loss_fn returns infinite or NaN numbers for {by}s without rows in a call, by which "
            "gradients may become NaN; keep these finite, as by counts.clamp(min=1)"
        )
    unknown = "it draws random numbers, which depend on the number of rows" if is_random else ""
    return Verdict(unknown=unknown, is_final=bool(tells))


class _Probe:
    """Calls of the function with changed statistics, or with some of the units."""

    def __init__(
        self,
        function: Function,
        units: Units,
        statistics: Statistics,
        rows: Tensor,
        piece: Piece,
    ) -> None:
        """See `find_mixing`."""
        self.function, self.units, self.statistics = function, units, statistics
        self.rows, self.piece = rows, piece
        self.count = units.count(piece.units)
        start, self.stops = piece.rows.start, self._stops()
        lengths = [b - a for a, b in zip((start, *self.stops), self.stops, strict=False)]
        places = torch.arange(self.count, device=rows.device)
        self.unit = places
        if units.by != "row":
            repeats = torch.tensor(lengths, device="cpu")
            if rows.is_cuda:
                repeats = repeats.pin_memory().to(rows.device, non_blocking=True)
            self.unit = places.repeat_interleave(repeats, output_size=rows.numel())
        self.ignored = [torch.zeros((), dtype=torch.bool, device=rows.device)]
        self.shift = 0.25 + (torch.arange(rows.numel(), device=rows.device) * GOLDEN) % 1
        self.random = self._random()

    def _stops(self) -> list[int]:
        """Where the units that have a row end, among the kept rows."""
        part = self.piece.rows
        if self.units.by == "row":
            return list(range(part.start + 1, part.stop + 1))
        ends = self.units.ends[self.piece.units]
        return [end for before, end in zip((part.start, *ends), ends, strict=False) if end > before]

    def _random(self) -> list[Tensor]:
        """The states of the random generators."""
        found = [torch.get_rng_state()]
        return [*found, torch.cuda.get_rng_state(self.rows.device)] if self.rows.is_cuda else found

    def has_drawn(self) -> bool:
        """Whether a random number was drawn since the beginning, or since `_run`."""
        pairs = zip(self.random, self._random(), strict=True)
        return any(not torch.equal(before, now) for before, now in pairs)

    def _run(self, statistics: Statistics, rows: Tensor, piece: Piece) -> Tensor:
        """One number for each unit of a piece that has a row; random ones begin as always."""
        torch.set_rng_state(self.random[0])
        if self.rows.is_cuda:
            torch.cuda.set_rng_state(self.random[1], self.rows.device)
        numbers = self.function(statistics, rows, piece)[0]
        count = self.units.count(piece.units)
        if self.units.present is None or len(numbers) == count:
            return numbers.detach().clone()  # it may be a buffer that is used again
        mask = self.units.mask(piece.units)
        self.ignored.append((~mask & ~numbers.isfinite()).any())
        first = mask.to(torch.int8).argsort(descending=True, stable=True)
        return numbers.detach()[first[:count]]

    def numbers(self, statistics: Statistics) -> Tensor:
        """What the function gives for all rows."""
        return self._run(statistics, self.rows, self.piece)

    def side(self, bit: int, side: int) -> Tensor:
        """(count,) bool: the units whose place has, or lacks, a bit."""
        return ((torch.arange(self.count, device=self.rows.device) >> bit) & 1) == side

    def changed(self, units: Tensor, side: int) -> Statistics:
        """The statistics, others in the rows of these units: less likely tokens, or likelier ones.

        A mean behind a threshold moves with one of the two.
        """
        here = units[self.unit]
        log_prob, entropy, lse, is_top1 = self.statistics
        shift = torch.where(here, self.shift, 0).to(log_prob.dtype)
        if side:
            return (
                log_prob * (1 - shift / 2),
                entropy * (1 + shift / 2),
                lse - shift,
                is_top1 ^ here,
            )
        return log_prob - shift, entropy * (1 - shift / 2), lse + shift, is_top1 ^ here

    def others_change(self, base: Tensor, tolerance: Tensor, bit: int, side: int) -> Tensor:
        """(count,) bool: units that are not on this side, whose numbers change with those."""
        return self._change_with(base, tolerance, self.side(bit, side), side)

    def _change_with(self, base: Tensor, tolerance: Tensor, units: Tensor, side: int) -> Tensor:
        return _differs(base, self.numbers(self.changed(units, side)), tolerance) & ~units

    def alone(self) -> list[Tensor]:
        """() bool each: whether a half of the units, and most of some, give other numbers alone."""
        every = torch.ones(self.count, dtype=torch.bool, device=self.rows.device)
        statistics = self.changed(every, 0)
        base = self.numbers(statistics)

        def some(first: int, last: int) -> Tensor:
            return self._alone(statistics, first, last)

        middle = self.count // 2
        apart = torch.cat([some(0, middle), some(middle, self.count)])
        places = sorted({i * (self.count - 1) // (SINGLES - 1) for i in range(SINGLES)})
        single = torch.cat([some(i, i + 1) for i in places])
        together = torch.cat([base[i : i + 1] for i in places])
        differ = _differs(together, single, CLOSE * together.abs())
        return [
            _differs(base, apart, CLOSE * _largest(base)).any(),
            2 * differ.sum() >= len(places),
        ]

    def _alone(self, statistics: Statistics, first: int, last: int) -> Tensor:
        """The numbers of some units without the others."""
        start = self.piece.rows.start
        begin, end = ([start, *self.stops][i] for i in (first, last))
        some = slice(begin - start, end - start)
        units = slice(begin, end)
        if self.units.by != "row":
            ends = self.units.ends
            units = slice(bisect.bisect_right(ends, begin), bisect.bisect_left(ends, end) + 1)
        part = Piece(slice(begin, end), units)
        try:
            return self._run([x[some] for x in statistics], self.rows[some], part)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise FailedOnPartError(
                f"loss_fn failed when it was called with a part of the rows ({error}). It is "
                "called chunk by chunk: take the values of your own tensors with [rows], and let "
                "it take any number of rows"
            ) from error

    def pair(self, base: Tensor, tolerance: Tensor, bit: int, side: int) -> str:
        """Words for one unit whose number changes with another's values."""
        units, by = self.side(bit, side), self.units.by
        targets = self._change_with(base, tolerance, units, side).nonzero().flatten().tolist()
        candidates = units.nonzero().flatten()
        while candidates.numel() > 1 and targets:
            half = candidates[: candidates.numel() // 2]
            some = torch.zeros_like(units).index_fill(0, half, True)
            is_here = bool(self._change_with(base, tolerance, some, side)[targets[0]])
            candidates = half if is_here else candidates[half.numel() :]
        if not targets:
            return "some numbers change with the values of others"
        target, source = targets[0], int(candidates[0])
        where = ""
        if by == "row":
            where = f" (positions {int(self.rows[target])} and {int(self.rows[source])})"
        return (
            f"the number of {by} {target} of a call changes with the values of {by} {source}{where}"
        )


def _largest(numbers: Tensor) -> Tensor:
    """() the size of the largest that is finite."""
    return torch.where(numbers.isfinite(), numbers.abs(), 0).amax()


def _differs(a: Tensor, b: Tensor, tolerance: Tensor) -> Tensor:
    """Where numbers are not the same; infinities and NaN are what they are."""
    return ~(((a - b).abs() <= tolerance) | (a == b) | (a.isnan() & b.isnan()))


def reaches_others(numbers: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether a tensor that requires grad, and is none of these leaves, went into the numbers."""
    seen: set[Any] = set()
    waiting: list[Any] = [numbers.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ != "AccumulateGrad":
            waiting.extend(following for following, _ in node.next_functions)
        elif all(node.variable is not x for x in leaves):
            return True
    return False

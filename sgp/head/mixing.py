"""Whether a caller's loss function mixes rows, sequences or groups, which would be lost in chunks.

Three probes, all with the rows of one call. The statistics of half of the units are changed, and no
number of the other half may change: with the halves by each bit of the units' places, every pair is
apart once. Each half of the units is given alone. And some units are given one by one, where a mean
over the call, a count of its rows or whatever else they share is quite another. There a number may
differ by what a shorter matmul rounds.
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
SINGLES = 8  # units that are given one by one; half of them must differ
GOLDEN = 0.618034
CANNOT = (
    # What a function raises of statistics that it did not expect.
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError),
    *(TypeError, ValueError),
)

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
    tolerance = EXACT * (base.abs() if units.by == "row" else _largest(base))
    found = [_differs(base, probe.numbers(statistics), tolerance).any()]
    bits = range(max(1, (probe.count - 1).bit_length()))
    halves = [(bit, side) for bit in bits for side in (0, 1)]
    try:
        found += [probe.others_change(base, tolerance, *half).any() for half in halves]
        if not is_random:
            found += [probe.differs_in_halves(base), probe.differs_alone(base)]
    except (FailedOnPartError, torch.OutOfMemoryError):
        raise
    except CANNOT as error:
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
            "loss_fn uses tensors that require grad, and returns infinite or NaN numbers for "
            f"{by}s without rows in a call, by which their gradients would become NaN; keep these "
            "finite, as by counts.clamp(min=1)"
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
            repeats = torch.tensor(lengths, device=rows.device)
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
        numbers, _, leaves = self.function(statistics, rows, piece)
        count = self.units.count(piece.units)
        if self.units.present is None or len(numbers) == count:
            return numbers.detach().clone()  # it may be a buffer that is used again
        mask = self.units.mask(piece.units)
        if reaches_others(numbers, leaves):
            self.ignored.append((~mask & ~numbers.isfinite()).any())
        first = mask.to(torch.int8).argsort(descending=True, stable=True)
        return numbers.detach()[first[:count]]

    def numbers(self, statistics: Statistics) -> Tensor:
        """What the function gives for all rows."""
        return self._run(statistics, self.rows, self.piece)

    def side(self, bit: int, side: int) -> Tensor:
        """(count,) bool: the units whose place has, or lacks, a bit."""
        return ((torch.arange(self.count, device=self.rows.device) >> bit) & 1) == side

    def changed(self, units: Tensor) -> Statistics:
        """The statistics, others in the rows of these units."""
        here = units[self.unit]
        log_prob, entropy, lse, is_top1 = self.statistics
        shift = torch.where(here, self.shift, 0).to(log_prob.dtype)
        return log_prob - shift, entropy * (1 - shift / 2), lse + shift, is_top1 ^ here

    def others_change(self, base: Tensor, tolerance: Tensor, bit: int, side: int) -> Tensor:
        """(count,) bool: units that are not on this side, whose numbers change with those."""
        return self._change_with(base, tolerance, self.side(bit, side))

    def _change_with(self, base: Tensor, tolerance: Tensor, units: Tensor) -> Tensor:
        return _differs(base, self.numbers(self.changed(units)), tolerance) & ~units

    def differs_in_halves(self, base: Tensor) -> Tensor:
        """() bool: whether a half of the units gives other numbers when it is alone."""
        middle = self.count // 2
        apart = torch.cat([self._alone(0, middle), self._alone(middle, self.count)])
        return _differs(base, apart, CLOSE * _largest(base)).any()

    def differs_alone(self, base: Tensor) -> Tensor:
        """() bool: whether most of some units give other numbers when they are alone."""
        places = sorted({i * (self.count - 1) // (SINGLES - 1) for i in range(SINGLES)})
        alone = torch.cat([self._alone(i, i + 1) for i in places])
        together = torch.cat([base[i : i + 1] for i in places])
        return 2 * _differs(together, alone, CLOSE * together.abs()).sum() >= len(places)

    def _alone(self, first: int, last: int) -> Tensor:
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
            return self._run([x[some] for x in self.statistics], self.rows[some], part)
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
        targets = self._change_with(base, tolerance, units).nonzero().flatten().tolist()
        candidates = units.nonzero().flatten()
        while candidates.numel() > 1 and targets:
            half = candidates[: candidates.numel() // 2]
            some = torch.zeros_like(units).index_fill(0, half, True)
            is_here = bool(self._change_with(base, tolerance, some)[targets[0]])
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

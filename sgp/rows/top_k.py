"""`TopK`: of a teacher's distribution, the few most probable tokens, as servers return them.

With the tokens i of a row, their probabilities q_i and the student's p_i, a divergence is that of
k + 1 buckets: the k tokens, and one for all others, of which the teacher has 1 - sum q_i, or what
rounding hides if that is more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.labels import has_float64, require_integers
from sgp.rows.problem import FLOATS, INTEGERS, check_tensor, may_wait
from sgp.rows.recipe import accumulation_dtype

NAME = "sgp.TopK"
# A probability may be this much above 1, and a row's sum too: what rounding does to log-softmax. A
# server that stores log-probabilities in bfloat16 rounds each by up to 2^-8 of itself, and the sum
# by up to 2^-8 of the entropy: two tokens of probability 0.5 then add up to 1.0017.
SLACK = 1e-3
ROUNDING = 2.0**-8


def rounding_of(dtype: torch.dtype) -> float:
    """What the rest of a teacher's mass is at least: 2^-53 of float64 entries, 2^-24 of others.

    Where a teacher is nearly certain, its probabilities add up to 1 by rounding. With nothing left
    for the other tokens a reverse KL would be infinite.
    """
    return torch.finfo(dtype).eps / 2


def rest_of(log_probs: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, 1) in `dtype`, or a wider one: what the listed tokens (M, K) leave of a teacher's mass.

    The largest probability is subtracted from 1 by expm1, which keeps the digits of a small rest.
    """
    wide = log_probs.to(torch.promote_types(log_probs.dtype, dtype))
    if not wide.shape[1]:
        return wide.new_ones(len(wide), 1)
    largest, at = wide.max(1, keepdim=True)
    others = wide.exp().scatter(1, at, 0).sum(1, keepdim=True)
    return (-largest.expm1() - others).clamp(min=rounding_of(log_probs.dtype))


class Padded(NamedTuple):
    """Rows of the same length; a slot that is not `valid` holds nothing."""

    indices: Tensor  # (M, K) int64; where not valid the row's first index, or 0 if it has none
    log_probs: Tensor  # (M, K) float32 or float64; -inf where not valid
    valid: Tensor | None  # (M, K) bool; None: every slot is


@dataclass(frozen=True, eq=False, repr=False)
class TopK:
    """The k largest log-probabilities of a teacher at each token that carries loss.

    Example:
        >>> import torch, sgp
        >>> sgp.TopK(torch.tensor([[3, 0], [2, 7]]), torch.tensor([[0.6, 0.3], [0.9, 0.05]]).log())
        TopK(2 rows, 2 entries each, device=cpu)
        >>> few = torch.tensor([0.6, 0.3, 0.9]).log()       # the second row has one entry
        >>> sgp.TopK(torch.tensor([3, 0, 2]), few, torch.tensor([0, 2, 3]))
        TopK(2 rows, 3 entries, device=cpu)

    Args:
        indices: (M, k) token ids, integers, a row for each token that carries loss, in the order
            of the flattened tokens; those of a row are in any order, and differ. With `offsets`:
            (total,), row after row.
        log_probs: of the shape of `indices`, float32, float64, bfloat16 or float16: the teacher's
            log-probabilities of these tokens in nats, at the temperature of the loss. -inf is
            probability 0. Constants: no gradient goes there.
        offsets: (M + 1,) integers: row i has the entries from offsets[i] up to offsets[i + 1]. A
            row may have none; it has divergence 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; and on a CPU, or with
            SGP_CHECK=1: offsets that are not cumulative lengths, a negative index, one that stands
            twice in a row, a log-probability that is NaN or above 0, probabilities of a row that
            add up to more than 1. The last two may be off by what rounding to bfloat16 does.
    """

    indices: Tensor
    log_probs: Tensor
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor(NAME, "indices", self.indices)
        check_tensor(NAME, "log_probs", self.log_probs)
        if self.indices.dtype not in INTEGERS:
            raise TypeError(
                f"{NAME}: indices is {self.indices.dtype}; expected integers (torch.topk returns "
                "the values first, and here the indices are)"
            )
        if self.log_probs.dtype not in FLOATS:
            raise TypeError(
                f"{NAME}: log_probs is {self.log_probs.dtype}; expected float32, float64, "
                "bfloat16 or float16"
            )
        expected = "(M, k)" if self.offsets is None else "(total,), as offsets are given"
        if self.indices.dim() != (2 if self.offsets is None else 1):
            ragged = "; rows of different lengths need offsets (M + 1,)"
            raise ValueError(
                f"{NAME}: indices is {tuple(self.indices.shape)}; expected {expected}"
                + (ragged if self.offsets is None else "")
            )
        if self.log_probs.shape != self.indices.shape:
            raise ValueError(
                f"{NAME}: log_probs is {tuple(self.log_probs.shape)}; expected "
                f"{tuple(self.indices.shape)}, as indices are"
            )
        self._check_offsets()
        for label, value in (("log_probs", self.log_probs), ("offsets", self.offsets)):
            if value is not None and value.device != self.indices.device:
                raise ValueError(
                    f"{NAME}: indices is on {self.indices.device} and {label} on {value.device}; "
                    "move one"
                )
        if self._may_look():
            self._check_values()

    @property
    def num_rows(self) -> int:
        """M, the tokens that these are for."""
        return len(self.indices) if self.offsets is None else len(self.offsets) - 1

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.indices.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TopK:
        """The same entries on another device; float64 becomes float32 where there is none."""

        def move(x: Tensor) -> Tensor:
            x = x.float() if x.dtype == torch.float64 and not has_float64(device) else x
            return x.to(device, non_blocking=non_blocking)

        offsets = None if self.offsets is None else move(self.offsets)
        return replace(
            self, indices=move(self.indices), log_probs=move(self.log_probs), offsets=offsets
        )

    def padded(self) -> Padded:
        """Rows of the length K of the longest, detached: what a kernel or an operator takes.

        A slot beyond a row's entries repeats the index of its first entry, so that what gathers or
        writes a value by index does nothing new there, and has a log-probability of -inf, which is
        probability 0. A row without entries has index 0, which is none of its own: ask `valid`.

        With offsets this waits for the device once: the longest row says how long all become.
        """
        log_probs = self.log_probs.detach()
        log_probs = log_probs.to(accumulation_dtype(log_probs.dtype))
        indices = self.indices.to(torch.int64)
        if self.offsets is None:
            return Padded(indices, log_probs, None)
        offsets = self.offsets.to(torch.int64)
        starts, lengths = offsets[:-1, None], offsets.diff()[:, None]
        K = int(lengths.max()) if self.num_rows else 0
        slots = torch.arange(K, device=self.device)
        if indices.numel() == self.num_rows * K:
            shape = (self.num_rows, K)
            return Padded(indices.view(shape), log_probs.view(shape), None)
        valid = slots < lengths
        places = (starts + torch.where(valid, slots, 0)).clamp(max=indices.numel() - 1)
        return Padded(
            torch.where(lengths > 0, indices[places], 0),
            torch.where(valid, log_probs[places], float("-inf")),
            valid,
        )

    def check_rows(self, name: str, label: str, kept: int) -> None:
        """Raise ValueError where these are not the rows of `kept` tokens."""
        if self.num_rows != kept:
            raise ValueError(
                f"{name}: {label} is an sgp.TopK of {self.num_rows} rows; expected {kept}, one "
                "for each token that carries loss (M), in their order"
            )

    def check_vocabulary(self, name: str, V: int) -> None:
        """Raise ValueError for an index outside [0, V), on a CPU or with SGP_CHECK=1."""
        if not self._may_look():
            return
        bad = (self.indices < 0) | (self.indices >= V)
        if bad.any():
            at = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name}: {NAME}.indices{at} = {int(self.indices[tuple(at)])} is outside [0, {V}), "
                "the student's vocabulary; leave such tokens out, with offsets"
            )

    def _may_look(self) -> bool:
        return not torch.compiler.is_compiling() and may_wait(self.indices)

    def _check_offsets(self) -> None:
        if self.offsets is None:
            return
        require_integers(NAME, "offsets", self.offsets)
        if self.offsets.dim() != 1 or not len(self.offsets):
            raise ValueError(
                f"{NAME}: offsets is {tuple(self.offsets.shape)}; expected (M + 1,), from 0 to "
                f"{self.indices.numel()}"
            )

    def _check_values(self) -> None:
        """What shapes do not say, of the first entry that is wrong."""
        total = self.indices.numel()
        if self.offsets is not None:
            ends = self.offsets.tolist()
            if ends[0] != 0 or ends[-1] != total or sorted(ends) != ends:
                shown = ends if len(ends) <= 8 else f"[{ends[0]}, ..., {ends[-1]}]"
                raise ValueError(
                    f"{NAME}: offsets = {shown}; expected cumulative lengths that start at 0, "
                    f"never fall and end at {total}, the number of entries"
                )
        self._refuse("indices", self.indices < 0, "is negative")
        above = ~(self.log_probs <= SLACK)  # NaN too
        self._refuse("log_probs", above, "is no logarithm of a probability, which is at most 0")
        indices, log_probs, valid = self.padded()
        if valid is not None:  # different numbers, none of which is an index
            free = -1 - torch.arange(indices.shape[1], device=self.device)
            indices = torch.where(valid, indices, free)
        ordered = indices.sort(dim=1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        if twice.any():
            row = int(twice.any(1).nonzero()[0])
            raise ValueError(
                f"{NAME}: row {row} has the index {int(ordered[row, 1:][twice[row]][0])} twice; "
                "each token is one bucket: rows of fewer entries need offsets"
            )
        p = log_probs.exp()
        sums = p.sum(1)
        entropy = -torch.where(p == 0, 0, p * log_probs).sum(1)
        more = sums > 1 + SLACK + ROUNDING * entropy.clamp(min=0)
        if more.any():
            row = int(more.nonzero()[0])
            raise ValueError(
                f"{NAME}: the probabilities of row {row} add up to {float(sums[row]):.6g}; "
                "expected at most 1: log_probs are in nats, over the whole vocabulary"
            )

    def _refuse(self, label: str, bad: Tensor, why: str) -> None:
        if bad.any():
            at = bad.nonzero()[0].tolist()
            value = getattr(self, label)[tuple(at)].item()
            raise ValueError(f"{NAME}: {label}{at} = {value} {why}")

    def __repr__(self) -> str:
        entries = self.indices.numel()
        each = f"{self.indices.shape[1]} entries each" if self.offsets is None else None
        return f"TopK({self.num_rows} rows, {each or f'{entries} entries'}, device={self.device})"

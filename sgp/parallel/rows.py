"""The row operations on one rank's columns of a vocabulary: a third implementation, on the others.

Every rank runs by_triton or by_torch on its own columns. The target is one of them or, where
another rank holds it, a stand-in whose column is put right afterwards. Then the ranks exchange
`RECORD` numbers a kept row, once, and each joins them in rank order, so that all have the same
bits. With the maximum `m_q` of rank q's columns, the sum `d_q = sum_j exp(s_j - m_q)`, the entropy
`H_q` and `lse_q`, with `m = max_q m_q` and `D = sum_q d_q exp(m_q - m)`::

    share_q = d_q exp(m_q - m) / D         -log share_q = (m - m_q) + log D - log d_q
                                                        = log1p(rest / d_q)     where m_q = m
    nll     = nll_own - log share_own
    sum_j w_j (lse - s_j) = sum_q (sum_{j in q} w_j (lse_q - s_j) - W_q log share_q)
    H       = sum_q share_q (H_q - log share_q)

Every term is at least 0, so nothing cancels, however near 1 the target's probability is. The
gradient is that of some columns of a row, from the joined statistics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.labels import IGNORE
from sgp.parallel.shard import Shard
from sgp.parallel.two_rows import ShardTwoRows
from sgp.rows.by_torch import (
    NOTHING,
    Columns,
    RowOutputs,
    Upstream,
    Wanted,
    log_of_sum,
    new_outputs,
)
from sgp.rows.operations import implementation
from sgp.rows.recipe import Recipe, accumulation_dtype

RECORD = 4  # numbers a kept row: maximum, sum, sum without the target, the target's nll
WITH_STATISTICS = 2  # and entropy, is_top1
WITH_ARGMAX = 1  # and the bits of the largest score's column, among the rank's own
WITH_SMOOTHING = 1  # and the mean of lse - s_j


class _Targets(NamedTuple):
    """Targets of the whole vocabulary, as one rank sees them; (n,) each."""

    clamped: Tensor  # in [0, V), also where the target is ignored or bad
    is_bad: Tensor  # outside the vocabulary, or the ranks were not called alike
    is_mine: Tensor
    local: Tensor  # among this rank's columns; IGNORE where ignored, the stand-in where elsewhere


class ShardRows:
    """`forward` and `backward` as by_torch's and by_triton's, for the columns of one rank.

    `target` and `weight` are those of the whole vocabulary, `logits` and `dlogits` this rank's.
    """

    def __init__(self, shard: Shard, rows: Tensor | None = None) -> None:
        """`rows` (M,) are the kept ones; None: all."""
        self.shard, self.rows = shard, rows
        self.name, self.is_part = shard.name, True

    def vocabulary(self, columns: int) -> int:  # noqa: ARG002  (of this rank)
        """All ranks' columns."""
        return self.shard.V

    def largest_part(self, columns: int) -> int:  # noqa: ARG002
        """What all ranks plan by."""
        return max(self.shard.sizes)

    def at(self, *_: Any) -> ShardRows:
        """Itself: all rows are alike."""
        return self

    def two_rows(self, _: Tensor) -> ShardTwoRows:
        """The same operations beside a teacher's logits."""
        return ShardTwoRows(self.shard, self.rows)

    def start_sum(self, x: Tensor) -> Any:
        """Begin to sum x over the ranks."""
        return self.shard.start_sum(x)

    def finish_sum(self, handle: Any) -> None:
        """Wait for what `start_sum` began."""
        self.shard.finish_sum(handle)

    def forward(
        self,
        logits: Tensor,
        dlogits: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        out: RowOutputs,
        *,
        scratch: bool = False,  # noqa: ARG002  (the logits are read again for the gradient)
    ) -> None:
        """Fill `out`, the same on every rank, and, unless it is None, `dlogits`; one exchange."""
        targets = self._targets(target, weight, recipe)
        statistics = out.statistics
        need_stats = statistics is not None
        need_argmax = out.argmax is not None
        sent = self._record(
            logits, targets, weight, recipe, need_stats=need_stats, need_argmax=need_argmax
        )
        table = self.shard.gather(sent, "the exchange of row statistics")
        kept = _Targets(*(self._kept(x) for x in targets))
        joined = self._join(table, kept, weight, recipe, need_stats=need_stats)
        r = 1.0 if row_weight is None else self._kept(row_weight)
        self._put(out.loss, joined.loss * r)
        if out.saved is not None:
            self._put(out.saved, joined.saved)
        if statistics is not None:
            for whole, values in zip(statistics, joined.statistics, strict=True):
                self._put(whole, values)
        if out.argmax is not None:
            self._put(out.argmax, self._argmax(table))
        if dlogits is not None:
            if scale is not None:
                ones = torch.ones_like(out.loss)
                row_weight = scale * (ones if row_weight is None else row_weight)
            saved = joined.saved.new_empty(target.numel(), 3)
            self._put(saved, joined.saved)
            self.backward(logits, dlogits, target, saved, weight, row_weight, recipe)

    def backward(
        self,
        logits: Tensor,
        dlogits: Tensor,
        target: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        upstream: Upstream = NOTHING,
        columns: Columns | None = None,
    ) -> None:
        """Fill `dlogits` from what the forward saved; no exchange.

        `columns` are among this rank's, whose own place in the vocabulary is added.
        """
        if not logits.shape[-1]:
            return
        first = self.shard.offset + (0 if columns is None else columns.first)
        implementation(logits).backward(
            logits, dlogits, target, saved, weight, row_weight, recipe, upstream,
            Columns(first, self.shard.V),
        )  # fmt: skip

    def _kept(self, values: Tensor) -> Tensor:
        """(N, ...) -> (M, ...)."""
        return values if self.rows is None else values[self.rows]

    def _put(self, whole: Tensor, values: Tensor) -> None:
        """(M, ...) -> (N, ...), zero elsewhere."""
        if self.rows is None:
            whole.copy_(values)
        else:
            whole.zero_().index_copy_(0, self.rows, values)

    def _targets(self, target: Tensor, weight: Tensor | None, recipe: Recipe) -> _Targets:
        shard = self.shard
        ignored = target == recipe.ignore_index
        is_bad = ((target < 0) | (target >= shard.V)) & ~ignored
        columns = shard.columns
        is_mine = (target >= columns.start) & (target < columns.stop) & ~ignored
        local = torch.where(is_mine, target - columns.start, self._stand_in(target, weight))
        local = local.masked_fill(ignored, IGNORE)
        if shard.agreed is not None:
            is_bad = is_bad | ~shard.agreed
        return _Targets(target.clamp(0, shard.V - 1), is_bad, is_mine, local)

    def _stand_in(self, target: Tensor, weight: Tensor | None) -> Tensor:
        """() the first column of this rank whose class weight is not 0.

        There a logit of -inf makes the sum for smoothing infinite by right.
        """
        if weight is None or not self.shard.size:
            return target.new_zeros(())
        return (weight[self.shard.columns] != 0).to(torch.uint8).argmax()

    def _record(
        self,
        logits: Tensor,
        targets: _Targets,
        weight: Tensor | None,
        recipe: Recipe,
        *,
        need_stats: bool,
        need_argmax: bool,
    ) -> Tensor:
        """(F, M): what this rank tells the others of its columns."""
        kept = _Targets(*(self._kept(x) for x in targets))
        smooth = recipe.label_smoothing > 0
        fields = RECORD + WITH_STATISTICS * need_stats + WITH_ARGMAX * need_argmax
        fields += WITH_SMOOTHING * smooth
        M = kept.local.numel()
        record = logits.new_zeros(fields, M, dtype=accumulation_dtype(logits.dtype))
        if not self.shard.size:
            record[0] = -torch.inf
            return record
        wanted = Wanted(saved=True, stats=need_stats or smooth, argmax=need_argmax)
        out = new_outputs(logits, targets.local.numel(), wanted)
        own = _weight_of(self.shard, weight) if smooth else None
        implementation(logits).forward(
            logits, None, targets.local, own, None, None, _of_shard(recipe), out
        )
        assert out.saved is not None, "saved is always asked for"  # noqa: S101
        statistics = out.statistics
        top, inv_d, so_d = self._kept(out.saved).unbind(1)
        d = 1 / inv_d
        nothing = (d == 0) & (top == -torch.inf)  # every column is -inf
        nll = self._kept(out.loss) if statistics is None else -self._kept(statistics[0])
        record[0], record[1] = top, d
        record[2] = torch.where(kept.is_mine, so_d * d, d).masked_fill_(nothing, 0)
        record[3] = torch.where(kept.is_mine, torch.where(nothing, torch.inf, nll), 0)
        if need_stats and statistics is not None:
            _, entropy, lse, is_top1 = statistics
            # The kernels' maximum passes over a NaN; PyTorch's, over the ranks, will not.
            record[0].masked_fill_(self._kept(lse).isnan(), torch.nan)
            record[4] = self._kept(entropy)
            record[5] = self._kept(is_top1) & kept.is_mine
        if out.argmax is not None:
            integer = torch.int64 if record.dtype == torch.float64 else torch.int32
            record[6] = self._kept(out.argmax).to(integer).view(record.dtype)
        if smooth:
            mean = self._kept(out.loss)
            # 0 x inf: the stand-in, or the target itself, is -inf and has a weight.
            record[-1] = torch.where(mean.isnan() & ~d.isnan(), torch.inf, mean)
        return record

    def _join(
        self,
        table: Tensor,
        kept: _Targets,
        weight: Tensor | None,
        recipe: Recipe,
        *,
        need_stats: bool,
    ) -> _Joined:
        """The statistics of the whole rows from those of the ranks (P, F, M)."""
        m, d, so, nll = (table[:, i] for i in range(RECORD))
        top = m.amax(0)
        grown = (m - torch.where(top == -torch.inf, 0, top)).exp()
        sums = d * grown
        D = sums.sum(0).masked_fill(kept.is_bad, torch.nan)
        inv_d = 1 / D
        so_d = (so * grown).sum(0) * inv_d
        log_d = log_of_sum(inv_d, so_d)
        # An infinite logit: the sum is NaN, lse is not, unless the maximum is.
        lse = torch.where((top == torch.inf) & ~kept.is_bad, top, top + log_d)
        # -log of each rank's share of the probability
        part = torch.where(m == top, (_of_others(sums) / d).log1p(), (top - m) + D.log() - d.log())
        part = part.masked_fill(kept.is_bad, torch.nan)
        owner = self._owner(kept.clamped)
        nll = (nll + part).gather(0, owner[None])[0]
        loss = nll if weight is None else weight[kept.clamped] * nll
        if recipe.label_smoothing:
            smooth = self._smoothing(table[:, -1], part, weight)
            loss = (1 - recipe.label_smoothing) * loss + recipe.label_smoothing * smooth
        if recipe.lse_square_scale:
            loss = loss + recipe.lse_square_scale * lse**2
        saved = torch.stack([top, inv_d, so_d], 1)
        if not need_stats:
            return _Joined(loss, saved, ())
        share = sums * inv_d
        empty = (sums == 0) & (D > 0)  # a rank of nothing in a row of something: 0 x inf is 0
        entropy = torch.where(empty, 0.0, share * (table[:, 4] + part)).sum(0)
        first = (table[:, 5] != 0) & (m == top)
        is_top1 = first.gather(0, owner[None])[0]
        return _Joined(loss, saved, (-nll, entropy, lse, is_top1))

    def _argmax(self, table: Tensor) -> Tensor:
        """(M,) the first column of the largest score, or of a NaN, of all ranks (P, F, M)."""
        m = table[:, 0]
        is_first = (m == m.amax(0)) | m.isnan()
        integer = torch.int64 if table.dtype == torch.float64 else torch.int32
        found = table[:, 6].view(integer).to(torch.int64)
        least = torch.full_like(found[0], self.shard.V)
        start = 0
        for q, size in enumerate(self.shard.sizes):
            least = torch.where(is_first[q], (found[q] + start).clamp(max=least), least)
            start += size
        return least

    def _owner(self, target: Tensor) -> Tensor:
        """The rank that holds each target (M,)."""
        ends = torch.zeros_like(target)
        stop = 0
        for size in self.shard.sizes[:-1]:  # numbers, not a tensor: nothing is copied to a device
            stop += size
            ends += target >= stop
        return ends

    def _smoothing(self, means: Tensor, part: Tensor, weight: Tensor | None) -> Tensor:
        """(M,) sum_j w_j (lse - s_j) / V from the ranks' own means (P, M)."""
        total = torch.zeros_like(means[0])
        pieces = None if weight is None else weight.split(list(self.shard.sizes))
        for q, size in enumerate(self.shard.sizes):
            if not size:
                continue
            whole = means.new_full((), size) if pieces is None else pieces[q].sum()
            # A rank whose columns are all -inf costs +inf, unless all its weights are 0.
            total += torch.where(whole == 0, 0, size * means[q] + whole * part[q])
        return total / self.shard.V


class _Joined(NamedTuple):
    """Of the kept rows (M,)."""

    loss: Tensor
    saved: Tensor  # (M, 3)
    statistics: tuple[Tensor, ...]  # log_prob, entropy, lse, is_top1; or none


def _weight_of(shard: Shard, weight: Tensor | None) -> Tensor | None:
    """This rank's class weights."""
    return None if weight is None else weight[shard.columns]


def _of_shard(recipe: Recipe) -> Recipe:
    """What the local operation computes: everything that is joined later is left out."""
    return recipe._replace(
        ignore_index=IGNORE,
        label_smoothing=1.0 if recipe.label_smoothing else 0.0,
        lse_square_scale=0.0,
    )


def _of_others(sums: Tensor) -> Tensor:
    """(P, M): the sum over the other ranks, by addition alone."""
    before, after = torch.zeros_like(sums), torch.zeros_like(sums)
    if len(sums) > 1:
        before[1:] = sums[:-1].cumsum(0)
        after[:-1] = sums[1:].flip(0).cumsum(0).flip(0)
    return before + after

"""The divergence of two rows on one rank's columns of both vocabularies.

Every rank sums over its own columns, and the ranks exchange these sums, `SAVED` numbers a kept row
and the target's score; each joins them in rank order, as the lanes of the kernel do, so that all
have the same bits. A jsd exchanges two numbers more, which need both log-sum-exps. The gradient is
that of some columns of a row, from the joined sums, without an exchange.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgp.parallel.shard import Shard
from sgp.rows.by_torch import Columns, RowOutputs, row_index, score_
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.two_by_torch import Numbers, Sums, Whose, apart, divergence_of, finite_or_0
from sgp.rows.two_rows import implementation


class ShardTwoRows:
    """`forward` and `backward` as two_by_torch's, for the columns of one rank."""

    def __init__(self, shard: Shard, rows: Tensor | None = None) -> None:
        """`rows` (M,) are the kept ones; None: all."""
        self.shard, self.rows = shard, rows

    def forward(
        self,
        logits: Tensor,
        teacher: Tensor,
        dlogits: Tensor | None,
        target: Tensor,
        whose: Whose,  # noqa: ARG002  (there is one)
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        divergence: Divergence,
        out: RowOutputs,
    ) -> None:
        """Fill `out`, the same on every rank, and, unless it is None, `dlogits`."""
        sums, value, s_y = self._joined(
            logits, teacher, target, recipe, divergence,
            needs_label=divergence.needs_label(stats=out.statistics is not None),
        )  # fmt: skip
        kept_target = self._kept(target)
        is_bad = torch.zeros_like(kept_target, dtype=torch.bool)
        if self.shard.agreed is not None:
            is_bad = is_bad | ~self.shard.agreed
        if s_y is not None and divergence.cross_entropy_weight:
            is_bad = is_bad | (kept_target < 0) | (kept_target >= self.shard.V)
            nll = (sums.top_1 - s_y) + sums.so_1.log1p()
            value = value + divergence.cross_entropy_weight * nll
        if s_y is not None and out.statistics is not None:
            found = sums.statistics(Numbers.of(sums), s_y, recipe)
            for whole, column in zip(out.statistics, found, strict=True):
                whole.copy_(self._put(target, column.squeeze(1)))
        r = 1.0 if row_weight is None else self._kept(row_weight)
        loss = (r * value.squeeze(1)).masked_fill(is_bad, torch.nan)
        out.loss.copy_(self._put(target, loss))
        saved = self._put(target, torch.cat(sums, 1))
        if out.saved is not None:
            out.saved.copy_(saved)
        if dlogits is not None:
            r = torch.ones_like(out.loss) if row_weight is None else row_weight
            r = r if scale is None else scale * r
            self.backward(logits, teacher, dlogits, target, Whose(), saved, r, recipe, divergence)

    def _joined(
        self,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        recipe: Recipe,
        divergence: Divergence,
        *,
        needs_label: bool,
    ) -> tuple[Sums, Tensor, Tensor | None]:
        """(sums of whole rows, divergences, the target's scores at temperature 1), (M, 1) each."""
        own = self._sums(logits, teacher, target, recipe, divergence)
        own[:, 0].masked_fill_(own[:, 1].isnan(), torch.nan)  # a kernel's maximum passes over NaN
        own[:, 2].masked_fill_(own[:, 3].isnan(), torch.nan)
        sent = [self._kept(own).t()]
        if needs_label:
            sent.append(self._score_of_target(logits, target, recipe)[None])
        table = self.shard.gather(torch.cat(sent), "the exchange of row statistics")
        width = own.shape[1]
        joined = join(Sums(*table[:, :width].unbind(1)), divergence.kind)
        sums = Sums(*(x[:, None] for x in joined))
        if divergence.kind == "jsd":
            saved = self._put(target, torch.cat(sums, 1))
            terms = self._terms(logits, teacher, target, saved, recipe, divergence)
            of_kept = self._kept(terms).t().contiguous()
            of_ranks = self.shard.gather(of_kept, "the exchange of a mixture's terms").sum(0)
            value, w = (x[:, None] for x in of_ranks)
        else:
            value, w = divergence_of(sums.w, Numbers.of(sums), divergence.kind)
        # The target's score is 0 but for the rank that holds it.
        s_y = table[:, width].sum(0)[:, None] if needs_label else None
        return sums._replace(w=w), value.clamp(min=0), s_y

    def _terms(
        self,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        saved: Tensor,
        recipe: Recipe,
        divergence: Divergence,
    ) -> Tensor:
        """(N, 2) of a jsd, over the columns of this rank."""
        if not self.shard.size:
            return saved.new_zeros(len(saved), 2)
        arguments = (logits, teacher, target, saved, recipe, divergence)
        found: Tensor = implementation(logits).terms(*arguments)
        return found

    def backward(
        self,
        logits: Tensor,
        teacher: Tensor,
        dlogits: Tensor,
        target: Tensor,
        whose: Whose,
        saved: Tensor,
        row_weight: Tensor | None,
        recipe: Recipe,
        divergence: Divergence,
        columns: Columns | None = None,
    ) -> None:
        """Fill `dlogits` from what the forward saved; no exchange."""
        if not logits.shape[-1]:
            return
        shard = self.shard
        first = shard.offset + (0 if columns is None else columns.first)
        if shard.agreed is not None:
            row_weight = saved.new_ones(len(saved)) if row_weight is None else row_weight
            row_weight = torch.where(shard.agreed, row_weight, torch.nan)
        implementation(logits).backward(
            logits, teacher, dlogits, target, whose, saved, row_weight, recipe, divergence,
            Columns(first, shard.V),
        )  # fmt: skip

    def _sums(
        self,
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        recipe: Recipe,
        divergence: Divergence,
    ) -> Tensor:
        """(N, SAVED) over the columns of this rank."""
        if self.shard.size:
            arguments = (logits, teacher, target, recipe, divergence)
            found: Tensor = implementation(logits).sums(*arguments)
            return found
        dtype = accumulation_dtype(logits.dtype)
        found = logits.new_zeros(target.numel(), SAVED, dtype=dtype)
        found[:, [0, 2, 4]] = -torch.inf  # the maxima of nothing
        return found

    def _kept(self, values: Tensor) -> Tensor:
        """(N, ...) -> (M, ...)."""
        return values if self.rows is None else values[self.rows]

    def _put(self, target: Tensor, values: Tensor) -> Tensor:
        """(M, ...) -> (N, ...), zero elsewhere."""
        if self.rows is None:
            return values
        whole = values.new_zeros(target.numel(), *values.shape[1:])
        return whole.index_copy_(0, self.rows, values)

    def _score_of_target(self, logits: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
        """(M,) at temperature 1; 0 where another rank holds it."""
        rows = (
            torch.arange(target.numel(), device=target.device) if self.rows is None else self.rows
        )
        y, part = target[rows], self.shard.columns
        is_mine = (y >= part.start) & (y < part.stop)
        dtype = accumulation_dtype(logits.dtype)
        if not self.shard.size:
            return logits.new_zeros(len(rows), dtype=dtype)
        column = (y - part.start).clamp(0, self.shard.size - 1)
        place = (*row_index(logits, rows), column)
        x = logits[place].to(dtype)
        return score_(x, recipe._replace(temperature=1.0)).masked_fill(~is_mine, 0)


def join(parts: Sums, kind: str) -> Sums:
    """The sums of whole rows (M,) from those of the ranks' columns (P, M)."""
    top, so, shrink, step = _joined(parts.top, parts.so)
    top_t, so_t, shrink_t, step_t = _joined(parts.top_t, parts.so_t)
    top_1, so_1, _, _ = _joined(parts.top_1, parts.so_1)

    def moved(total: Tensor, shrink: Tensor, step: Tensor, so: Tensor) -> Tensor:
        return torch.where(shrink > 0, shrink * (total + step * (so + 1)), 0)

    more = apart(shrink, shrink_t, step_t - step) * (parts.so + 1)
    x = shrink_t * parts.x + torch.where(step > -torch.inf, more, 0)  # of ranks with columns
    w, of_row = parts.w, torch.zeros_like(top)
    if kind == "forward_kl":
        w = moved(w, shrink_t, step_t - step, parts.so_t)
    else:
        origin_t = finite_or_0(top_t)
        of_row = finite_or_0(parts.lead.masked_fill(parts.top != top, -torch.inf).amax(0))
    if kind == "reverse_kl":
        further = ((parts.lead - origin_t) - step) - (of_row - origin_t)
        w = moved(w, shrink, further, parts.so)
    t_o = moved(parts.t_o, shrink, step, parts.so)
    return Sums(top, so, top_t, so_t, top_1, so_1, x.sum(0), of_row, w.sum(0), t_o.sum(0))


def _joined(top: Tensor, so: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max, so) of the row (M,), and how each part (P, M) shrinks and moves."""
    whole = top.amax(0)
    origin = finite_or_0(whole)
    step = top - origin
    shrink = step.exp()
    is_top = top == origin
    rest = so * shrink + torch.where(is_top, 0, shrink)
    return whole, rest.sum(0) + (is_top.sum(0) - 1).clamp(min=0), shrink, step

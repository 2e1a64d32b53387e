"""The divergence of two rows by PyTorch's operators; formulas as in `kernels/divergence.py`.

On the kept rows only, a few at a time, as in `by_torch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgp.rows import by_torch
from sgp.rows.by_torch import (
    Columns,
    RowOutputs,
    multiply_by_slope_,
    row_index,
    score_,
)
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.recipe import Recipe, accumulation_dtype

SMALL = 0.4  # of a logarithm a: below, exp(a) - 1 is expm1(a)


class Whose(NamedTuple):
    """Which rows a teacher's logits are for, where there are several teachers."""

    teacher: Tensor | None = None  # (N,) int64: each row's; None: all are of this one
    number: int = 0

    def kept(self, target: Tensor, ignore_index: int) -> Tensor:
        """(m,) the rows with a loss."""
        kept = target != ignore_index
        if self.teacher is not None:
            kept = kept & (self.teacher == self.number)
        return kept.nonzero().squeeze(1)


class Sums(NamedTuple):
    """(m, 1) each: what is summed over a row's columns; as `SAVED` in that order."""

    top: Tensor
    so: Tensor
    top_t: Tensor
    so_t: Tensor
    top_1: Tensor
    so_1: Tensor
    x: Tensor  # d of the teacher less that of the student
    lead: Tensor  # the teacher's score in a maximal column of the student's
    w: Tensor  # the running sum of a KL, later what the gradient subtracts
    t_o: Tensor

    @staticmethod
    def of(saved: Tensor) -> Sums:
        """Those of rows (m, SAVED)."""
        return Sums(*saved.split(1, 1))

    def statistics(
        self, numbers: Numbers, s_y: Tensor, recipe: Recipe
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log_prob, entropy, lse, is_top1) (m, 1), from the target's scores at temperature 1."""
        s_y, log_d = s_y * (1 / recipe.temperature), self.so.log1p()
        lse = torch.where(self.top == torch.inf, self.top, self.top + log_d)
        entropy = log_d - self.t_o * numbers.inv_d
        return (s_y - self.top) - log_d, entropy, lse, s_y == self.top


class Numbers(NamedTuple):
    """(m, 1) each: what every column of a row is compared with."""

    top: Tensor
    inv_d: Tensor
    top_t: Tensor
    inv_d_t: Tensor
    gap: Tensor  # log(d of the teacher / d of the student)
    lead: Tensor  # the teacher's z less the student's, where the student's is 0
    top_1: Tensor
    inv_1: Tensor
    less_1: Tensor

    @staticmethod
    def of(sums: Sums) -> Numbers:
        """NaN where a row has nothing but -inf."""
        so = sums.so.masked_fill(sums.top == -torch.inf, torch.nan)
        so_t = sums.so_t.masked_fill(sums.top_t == -torch.inf, torch.nan)
        inv_d, inv_1 = 1 / (1 + so), 1 / (1 + sums.so_1)
        grown = sums.x * inv_d
        gap = torch.where(grown.abs() < 0.3, grown.log1p(), so_t.log1p() - so.log1p())
        return Numbers(
            sums.top, inv_d, sums.top_t, 1 / (1 + so_t), gap, sums.lead - finite_or_0(sums.top_t),
            sums.top_1, inv_1, sums.so_1 * inv_1,
        )  # fmt: skip


def forward(
    logits: Tensor,
    teacher: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    whose: Whose,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    out: RowOutputs,
) -> None:
    """Fill `out` and, unless it is None, `dlogits`, for the rows of this teacher.

    Both have the same columns; `dlogits` may be `logits` itself.
    """
    if whose.number == 0:
        out.zero_()
        _clear_ignored(dlogits, target, recipe)
    V = logits.shape[-1]
    need_stats = out.statistics is not None
    for rows in _parts(target, whose, recipe, V):
        pair = _Pair.of(logits, teacher, rows, recipe, divergence)
        numbers, sums, value = pair.compared(need_entropy=need_stats)
        r = value.new_ones(()) if row_weight is None else row_weight[rows, None]
        y, valid = target[rows, None], None
        if divergence.cross_entropy_weight or need_stats:
            valid = (y >= 0) & (y < V)
            s_y = pair.s_one.gather(1, y.clamp(0, V - 1)).masked_fill_(~valid, torch.nan)
            nll = (sums.top_1 - s_y) + sums.so_1.log1p()
            if divergence.cross_entropy_weight:  # 0 times an infinite one is NaN
                value = value + divergence.cross_entropy_weight * nll
            if out.statistics is not None:
                found = sums.statistics(numbers, s_y, recipe)
                for whole, column in zip(out.statistics, found, strict=True):
                    whole[rows] = column.squeeze(1)
        out.loss[rows] = (r * value).squeeze(1)
        if out.saved is not None:
            out.saved[rows] = torch.cat(sums, 1)
        if dlogits is not None:
            r = r if scale is None else r * scale
            _store(dlogits, rows, pair.gradient(numbers, sums.w, y, r))


def sums(
    logits: Tensor, teacher: Tensor, target: Tensor, recipe: Recipe, divergence: Divergence
) -> Tensor:
    """(N, SAVED) sums over some columns, with those of the entropy; 0 where ignored."""
    found = logits.new_zeros(target.numel(), SAVED, dtype=accumulation_dtype(logits.dtype))
    for rows in _parts(target, Whose(), recipe, logits.shape[-1]):
        pair = _Pair.of(logits, teacher, rows, recipe, divergence)
        found[rows] = torch.cat(pair.sums(need_entropy=True), 1)
    return found


def terms(
    logits: Tensor,
    teacher: Tensor,
    target: Tensor,
    saved: Tensor,
    recipe: Recipe,
    divergence: Divergence,
) -> Tensor:
    """(N, 2): what some columns add to a jsd and to KL(p || m), from the sums of all columns."""
    found = saved.new_zeros(target.numel(), 2)
    for rows in _parts(target, Whose(), recipe, logits.shape[-1]):
        pair = _Pair.of(logits, teacher, rows, recipe, divergence)
        found[rows] = torch.cat(pair.mixture_terms(Numbers.of(Sums.of(saved[rows]))), 1)
    return found


def backward(
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
    """Fill `dlogits`, which may be `logits` itself, from what the forward saved.

    `columns` says which ones of the row both logits are.
    """
    if whose.number == 0:
        _clear_ignored(dlogits, target, recipe)
    first, V = columns or Columns(0, logits.shape[-1])
    for rows in _parts(target, whose, recipe, logits.shape[-1]):
        pair = _Pair.of(logits, teacher, rows, recipe, divergence)
        sums = Sums.of(saved[rows])
        y = target[rows, None]
        r = saved.new_ones(()) if row_weight is None else row_weight[rows, None]
        if divergence.cross_entropy_weight:
            r = torch.where((y >= 0) & (y < V), r, torch.nan)
        _store(dlogits, rows, pair.gradient(Numbers.of(sums), sums.w, y - first, r))


class _Pair(NamedTuple):
    """Some rows (m, V) of both models."""

    x: Tensor  # the student's logits
    s_one: Tensor  # its scores at temperature 1
    s: Tensor  # at the temperature
    t: Tensor  # the teacher's
    recipe: Recipe
    divergence: Divergence
    at_one: bool  # whether the cross-entropy has sums of its own

    @staticmethod
    def of(
        logits: Tensor, teacher: Tensor, rows: Tensor, recipe: Recipe, divergence: Divergence
    ) -> _Pair:
        dtype = accumulation_dtype(logits.dtype)
        x = logits[row_index(logits, rows)].to(dtype)
        theirs = teacher[row_index(teacher, rows)].to(dtype)
        plain, at_one = divergence.of_student(recipe)
        s_one = score_(x, plain)
        s = s_one if recipe.temperature == 1.0 else s_one * (1 / recipe.temperature)
        t = score_(theirs, divergence.of_teacher(recipe))
        return _Pair(x, s_one, s, t, recipe, divergence, at_one)

    def sums(self, *, need_entropy: bool) -> Sums:
        top, so, z, e = without_largest(self.s)
        top_t, so_t, z_t, e_t = without_largest(self.t)
        lead = w = t_o = torch.zeros_like(top)
        a = _difference(z_t, z)
        x = apart(e, e_t, a).sum(1, keepdim=True)
        if self.divergence.kind == "forward_kl":
            w = _sum_of(e_t, a)
        else:
            lead = finite_or_0(self.t.gather(1, self.s.argmax(1, keepdim=True)))
        if self.divergence.kind == "reverse_kl":
            w = _sum_of(e, a - (lead - finite_or_0(top_t)))
        if need_entropy:
            t_o = _sum_of(e, z)
        top_1, so_1 = top, so
        if self.at_one:
            top_1, so_1, _, _ = without_largest(self.s_one)
        return Sums(top, so, top_t, so_t, top_1, so_1, x, lead, w, t_o)

    def compared(self, *, need_entropy: bool) -> tuple[Numbers, Sums, Tensor]:
        """(numbers, sums with what the gradient subtracts, divergences (m, 1))."""
        sums = self.sums(need_entropy=need_entropy)
        numbers = Numbers.of(sums)
        if self.divergence.kind == "jsd":
            value, w = self.mixture_terms(numbers)
        else:
            value, w = divergence_of(sums.w, numbers, self.divergence.kind)
        return numbers, sums._replace(w=w), value.clamp(min=0)  # below 0 it is a rounding

    def mixture_terms(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """(m, 1) each: of the jsd, and the sum of p (log(m / p) - that of the lead)."""
        beta, gap = self.divergence.beta, numbers.gap
        z, z_t = self.s - numbers.top, self.t - numbers.top_t
        p, q = z.exp() * numbers.inv_d, z_t.exp() * numbers.inv_d_t
        log_mp, log_mq = _log_of_mixture(_difference(z_t, z) - gap, beta)
        of_lead, _ = _log_of_mixture(numbers.lead - gap, beta)
        jsd = (-beta * _sum_of(q, log_mq)).sub_(_sum_of(p, log_mp), alpha=1 - beta)
        return jsd, _sum_of(p, log_mp - of_lead)

    def gradient(self, numbers: Numbers, kl: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """(m, V) of the student's logits; y (m, 1) may be a column that is not here."""
        d, gap = self.divergence, numbers.gap
        z, z_t = self.s - numbers.top, self.t - numbers.top_t
        p, a = z.exp() * numbers.inv_d, _difference(z_t, z)
        if d.kind == "forward_kl":
            g = -apart(p, z_t.exp() * numbers.inv_d_t, a - gap)
        elif d.kind == "reverse_kl":
            g = (-p * ((a - numbers.lead) - kl)).masked_fill_(p == 0, 0)
        else:
            log_mp, _ = _log_of_mixture(a - gap, d.beta)
            of_lead, _ = _log_of_mixture(numbers.lead - gap, d.beta)
            g = ((d.beta - 1) * (p * ((log_mp - of_lead) - kl))).masked_fill_(p == 0, 0)
        if self.recipe.temperature != 1.0:
            g *= 1 / self.recipe.temperature
        if d.cross_entropy_weight:
            p = (self.s_one - numbers.top_1).exp_() * numbers.inv_1
            is_here = (y >= 0) & (y < p.shape[1])
            column = y.clamp(0, p.shape[1] - 1)
            p_y = p.gather(1, column)
            is_top = self.s_one.gather(1, column) == numbers.top_1
            less = torch.where(is_top, -numbers.less_1, p_y - 1)
            p.scatter_(1, column, torch.where(is_here, less, p_y))
            g.add_(p, alpha=d.cross_entropy_weight)
        plain, _ = d.of_student(self.recipe)
        return multiply_by_slope_(g.mul_(r), self.x, plain)


class Scored(NamedTuple):
    """Rows of scores of both models, and how far they are from each other."""

    pair: _Pair
    numbers: Numbers
    value: Tensor  # (m, 1) divergences
    w: Tensor  # (m, 1): what the gradient subtracts

    @staticmethod
    def of(s: Tensor, t: Tensor, divergence: Divergence) -> Scored:
        """Of scores (m, V) each, with nothing but the divergence."""
        pair = _Pair(s, s, s, t, Recipe(), divergence._replace(cross_entropy_weight=0.0), False)
        numbers, sums, value = pair.compared(need_entropy=False)
        return Scored(pair, numbers, value, sums.w)

    def gradient(self) -> Tensor:
        """(m, V) of the sum of the divergences, for the student's scores."""
        some = torch.zeros_like(self.w, dtype=torch.int64)
        return self.pair.gradient(self.numbers, self.w, some, self.w.new_ones(()))


def finite_or_0(x: Tensor) -> Tensor:
    """What exponents are taken from: -inf stands for nothing."""
    return x.masked_fill(x == -torch.inf, 0)


def without_largest(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max, sum of exp(z) without one maximal column, z = s - max, exp(z))."""
    top = s.amax(1, keepdim=True)
    z = s - finite_or_0(top)
    e = z.exp()
    is_top = z == 0
    more = (is_top.sum(1, keepdim=True) - 1).clamp_(min=0)
    return top, e.masked_fill(is_top, 0).sum(1, keepdim=True) + more, z, e


def _difference(z: Tensor, other: Tensor) -> Tensor:
    """The difference of both, and 0 where they are equal: both may be -inf."""
    return torch.where(z == other, 0, z - other)


def _sum_of(e: Tensor, x: Tensor) -> Tensor:
    """Sum of e x (m, 1), where 0 times anything is 0."""
    return (e * x).masked_fill_(e == 0, 0).sum(1, keepdim=True)


def apart(e: Tensor, e_t: Tensor, a: Tensor) -> Tensor:
    """e_t - e, of e_t = e exp(a)."""
    return torch.where(a.abs() < SMALL, e * a.expm1(), e_t - e)


def divergence_of(w: Tensor, numbers: Numbers, kind: str) -> tuple[Tensor, Tensor]:
    """(the KL, what the gradient subtracts), from the running sum."""
    if kind == "forward_kl":
        return w * numbers.inv_d_t - numbers.gap, torch.zeros_like(w)
    kl = w * numbers.inv_d
    return (numbers.gap - numbers.lead) - kl, kl


def _log_of_mixture(rho: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log(m / p), log(m / q)) of rho = log(q / p)."""
    size = -rho.abs()
    # Of the smaller of p and q in m. (Two Python numbers would be a float32 tensor.)
    share = torch.where(rho > 0, rho.new_full((), 1 - beta), beta)
    y = share * size.expm1()
    log_m = torch.where(y > -0.3, y.log1p(), ((1 - share) + share * size.exp()).log())
    return log_m + rho.clamp(min=0), log_m + (-rho).clamp_(min=0)


def _parts(target: Tensor, whose: Whose, recipe: Recipe, V: int) -> tuple[Tensor, ...]:
    kept = whose.kept(target, recipe.ignore_index)
    return kept.split(max(1, by_torch.CHUNK_ELEMENTS // (2 * max(1, V)))) if kept.numel() else ()


def _clear_ignored(dlogits: Tensor | None, target: Tensor, recipe: Recipe) -> None:
    if dlogits is not None:
        rows = (target == recipe.ignore_index).nonzero().squeeze(1)
        dlogits[row_index(dlogits, rows)] = 0


def _store(x: Tensor, rows: Tensor, values: Tensor) -> None:
    x[row_index(x, rows)] = values.to(x.dtype)

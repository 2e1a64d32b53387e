"""The divergence of a student's rows from the few tokens of a teacher, an `sgp.TopK`.

With the tokens I of a row, the student's scores s and ``rest = log sum_{j not in I} exp s_j``,
everything is a function of k + 1 numbers: the scores of I, and rest, which stands for all other
classes. That is a divergence of rows of k + 1 columns (`two_by_torch`), and rest is differentiated
like any log-sum-exp, by the row operations, on rows in which the columns of I are -inf. So the mass
of the others is a sum, and not 1 less the mass of I, which would lose its digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.rows.by_torch import (
    RowOutputs,
    Upstream,
    Wanted,
    log_of_sum,
    multiply_by_slope_,
    new_outputs,
    row_index,
    score_,
)
from sgp.rows.divergence import Divergence
from sgp.rows.operations import implementation
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.top_k import TopK, rest_of
from sgp.rows.two_by_torch import Scored, without_largest

ELEMENTS = {True: 1 << 26, False: 1 << 20}  # of rows of logits at once, on a GPU or on a CPU


class Listed(NamedTuple):
    """Rows of an `sgp.TopK`, padded."""

    indices: Tensor  # (m, K) int64; a slot without an entry repeats the row's first index, or is 0
    log_probs: Tensor  # (m, K); -inf in a slot without an entry
    valid: Tensor | None  # (m, K) bool: has an entry; None: all have

    def part(self, rows: slice) -> Listed:
        """Some of them."""
        valid = None if self.valid is None else self.valid[rows]
        return Listed(self.indices[rows], self.log_probs[rows], valid)


def listed_of(
    name: str,
    label: str,
    teacher: TopK,
    kept: int,
    V: int,
    input: Tensor,  # noqa: A002
) -> Listed:
    """Those of `kept` tokens beside an input.

    Raises:
        ValueError: of another number of tokens, on another device, outside the vocabulary.
    """
    teacher.check_rows(name, label, kept)
    if teacher.device != input.device:
        raise ValueError(
            f"{name}: input is on {input.device} and {label} on {teacher.device}; move it with "
            f"{label}.to(input.device)"
        )
    teacher.check_vocabulary(name, V)
    return Listed(*teacher.padded())


def top_forward(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    listed: Listed,
    row_weight: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    *,
    stats: bool,
) -> RowOutputs:
    """Losses and statistics of every row (N,), of which `rows` (M,) are kept; 0 elsewhere."""
    wanted = Wanted(stats=stats)
    out = new_outputs(logits, target.numel(), wanted)
    out.zero_()
    for part, x in _parts(logits, rows):
        some = rows[part]
        here = new_outputs(x, len(some), wanted)
        r = None if row_weight is None else row_weight[some]
        top_rows(x, None, listed.part(part), target[some], r, None, recipe, divergence, here)
        for whole, values in zip(out, here, strict=True):
            if whole is not None and values is not None:
                whole[some] = values
    return out


def top_backward(
    logits: Tensor,
    target: Tensor,
    rows: Tensor,
    listed: Listed,
    row_weight: Tensor,
    recipe: Recipe,
    divergence: Divergence,
) -> Tensor:
    """The gradient of the logits, 0 in rows that are not kept."""
    dlogits = torch.zeros_like(logits)
    for part, x in _parts(logits, rows):
        some = rows[part]
        r = row_weight[some]
        top_rows(x, x, listed.part(part), target[some], r, None, recipe, divergence, None)
        dlogits[row_index(dlogits, some)] = x.to(dlogits.dtype)
    return dlogits


def _parts(logits: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Copies of the kept rows in the accumulation dtype, some at a time."""
    step = max(1, ELEMENTS[logits.is_cuda] // max(1, logits.shape[-1]))
    dtype = accumulation_dtype(logits.dtype)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield part, logits[row_index(logits, rows[part])].to(dtype)


def top_rows(
    logits: Tensor,
    dlogits: Tensor | None,
    listed: Listed,
    target: Tensor,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    out: RowOutputs | None,
) -> None:
    """Fill `out` and, unless it is None, `dlogits`. The logits are overwritten.

    Args:
        logits: (m, V) float32 or float64, rows that all carry loss.
        dlogits: (m, V); it may be `logits`, or a narrower view of the first half of each row.
        listed: (m, K) of the teacher.
        target: (m,) int64.
        row_weight: (m,); it multiplies loss and gradient.
        scale: () multiplies the gradient alone.
        recipe: of the student.
        divergence: how they are compared.
        out: of these rows; statistics too, where they are wanted. None: no losses.
    """
    if not len(target):
        return
    if out is not None and out.statistics is not None:
        rows = implementation(logits)
        plain = out._replace(saved=None)  # a divergence saves nothing here, it starts again
        rows.forward(logits, None, target, None, None, None, recipe, plain)
    chunk = _Chunk.of(logits, listed, target, recipe, divergence.cross_entropy_weight)
    others = chunk.others(recipe.temperature)
    scored = chunk.scored(others, divergence)
    value, of_target = scored.value.squeeze(1), None
    if chunk.weight:
        others_1 = others if recipe.temperature == 1.0 else chunk.others(1.0)
        of_target = _of_target(chunk, others_1)
        value = value + of_target.value
    r = value.new_ones(value.shape) if row_weight is None else row_weight
    r = r.masked_fill(chunk.bad, torch.nan)
    if out is not None:
        out.loss.copy_(r * value)
    if dlogits is not None:
        r = r if scale is None else r * scale
        _write_gradient(chunk, dlogits, scored.gradient(), of_target, others, r)


class _Others(NamedTuple):
    """All classes that are not listed, at some temperature."""

    top: Tensor  # (m,) the largest score; 0 where there are none
    lse: Tensor  # (m,) less that; -inf where there are none
    nll: Tensor  # (m,): -log of the target's share of them
    saved: Tensor  # (m, 3), what a backward needs


class _OfTarget(NamedTuple):
    """The cross-entropy, times its weight."""

    value: Tensor  # (m,)
    gradient: Tensor  # (m, K + 1), of the scores of those that are listed, and of the others
    of_others: Tensor  # (m,): weight of the target's share of the others, where it is one
    others: _Others


class _Chunk(NamedTuple):
    """Some rows of logits, of which those of the listed tokens have been set aside."""

    logits: Tensor  # (m, V) as stored, where the softcap's slope needs them
    s: Tensor  # (m, V) scores at temperature 1, -inf in the listed columns
    listed: Listed
    columns: Tensor  # (m, K) of the listed tokens, inside the vocabulary
    x_i: Tensor  # (m, K) logits of the listed tokens, as stored
    s_i: Tensor  # (m, K) scores, -inf in a slot without an entry
    y: Tensor  # (m,), inside the vocabulary
    bad: Tensor  # (m,) bool: an index or a target was not; the loss is NaN
    recipe: Recipe
    weight: float  # of the cross-entropy

    @staticmethod
    def of(logits: Tensor, listed: Listed, target: Tensor, recipe: Recipe, weight: float) -> _Chunk:
        V, at_one = logits.shape[1], recipe._replace(temperature=1.0)
        bad = ((listed.indices < 0) | (listed.indices >= V)).any(1)
        if weight:
            bad |= (target < 0) | (target >= V)
        index = listed.indices.clamp(0, V - 1)
        x_i = logits.gather(1, index)
        s_i = score_(x_i.clone(), at_one)
        s = score_(logits, at_one)  # in their place, unless the softcap's slope needs them
        aside = s_i.new_full((), -torch.inf).expand_as(s_i)
        if listed.valid is not None:
            s_i.masked_fill_(~listed.valid, -torch.inf)
            has_any = listed.valid.any(1, keepdim=True)
            aside = torch.where(has_any, aside, s.gather(1, index))
        s.scatter_(1, index, aside)
        y = target.clamp(0, V - 1)
        return _Chunk(logits, s, listed, index, x_i, s_i, y, bad, recipe, weight)

    def others(self, temperature: float) -> _Others:
        """What the row operations say of all classes that are left."""
        found = new_outputs(self.s, len(self.y), Wanted(saved=True))
        implementation(self.s).forward(
            self.s, None, self.y, None, None, None, Recipe(temperature=temperature), found
        )
        assert found.saved is not None, "asked for"  # noqa: S101
        top, inv_d, so_d = found.saved.unbind(1)
        is_empty = top == -torch.inf
        lse = torch.where(is_empty, top, log_of_sum(inv_d, so_d))
        saved = found.saved.masked_fill(is_empty[:, None], 0)
        return _Others(top.masked_fill(is_empty, 0), lse, found.loss, saved)

    def with_others(self, others: _Others, temperature: float) -> Tensor:
        """(m, K + 1) scores of the listed tokens and of all others, less the others' largest."""
        scores = self.s_i * (1 / temperature) - others.top[:, None]
        return torch.cat([scores, others.lse[:, None]], 1)

    def scored(self, others: _Others, divergence: Divergence) -> Scored:
        """The k + 1 numbers of both, and how far they are from each other."""
        student = self.with_others(others, self.recipe.temperature)
        log_q = self.listed.log_probs
        rest = rest_of(log_q, student.dtype)
        rest = rest.masked_fill(others.lse[:, None] == -torch.inf, 0)
        teacher = torch.cat([log_q, rest.log()], 1).to(student.dtype)
        return Scored.of(student, teacher, divergence)


def _of_target(chunk: _Chunk, others: _Others) -> _OfTarget:
    """The cross-entropy of k + 1 numbers and, where the target is not listed, of its share."""
    is_y = chunk.columns == chunk.y[:, None]
    if chunk.listed.valid is not None:
        is_y &= chunk.listed.valid
    is_other = ~is_y.any(1)
    is_y = torch.cat([is_y, is_other[:, None]], 1)
    s = chunk.with_others(others, 1.0)
    top, so, z, e = without_largest(s)
    s_y = torch.where(is_y, s, 0).sum(1, keepdim=True)
    value = ((top - s_y) + so.log1p()).squeeze(1) + torch.where(is_other, others.nll, 0)
    p = e / (1 + so)
    less = torch.where(z == 0, -so / (1 + so), p - 1)
    gradient = torch.where(is_y, less, p)
    w = chunk.weight
    return _OfTarget(w * value, w * gradient, w * is_other.to(p.dtype), others)


def _write_gradient(
    chunk: _Chunk,
    dlogits: Tensor,
    g: Tensor,
    of_target: _OfTarget | None,
    others: _Others,
    r: Tensor,
) -> None:
    """The gradient of the logits, from that of the k + 1 numbers; r (m,) multiplies it."""
    recipe, s = chunk.recipe, chunk.s
    T, at_one, is_capped = recipe.temperature, recipe._replace(temperature=1.0), recipe.softcap
    rows = implementation(s)
    of_listed = g[:, :-1] / T
    of_y, beside = torch.zeros_like(r), None
    u = r if is_capped is not None else r * recipe.logit_scale
    if of_target is not None:
        of_listed = of_listed + of_target.gradient[:, :-1]
        of_one, of_share = u * of_target.gradient[:, -1], u * of_target.of_others
    place = dlogits if is_capped is None else s
    upstream = u * g[:, -1]
    if of_target is not None and T == 1.0:
        upstream, of_y = upstream + of_one, of_share
    elif of_target is not None:
        beside = torch.empty_like(s)
        rows.backward(
            s, beside, chunk.y, of_target.others.saved, None, of_share, Recipe(), Upstream(of_one)
        )
        place = s
    plain = Recipe(temperature=T)
    rows.backward(s, place, chunk.y, others.saved, None, of_y, plain, Upstream(upstream))
    if beside is not None:
        place = beside.add_(s)  # in float32: a narrow gradient is rounded once
    if is_capped is not None:
        _multiply_by_slope_of_(place, chunk.logits, recipe)
    if place is not dlogits:
        dlogits.copy_(place)
    of_listed = multiply_by_slope_(of_listed * r[:, None], chunk.x_i, at_one)
    valid = chunk.listed.valid
    if valid is not None:  # every slot of an index writes the same
        of_listed = torch.where(valid, of_listed, of_listed[:, :1])
        as_is = dlogits.gather(1, chunk.columns).to(of_listed.dtype)
        of_listed = torch.where(valid.any(1, keepdim=True), of_listed, as_is)
    every = torch.arange(len(r), device=r.device)[:, None]
    dlogits[every, chunk.columns] = of_listed.to(dlogits.dtype)  # scatter_ copies it on a CPU


def _multiply_by_slope_of_(g: Tensor, x: Tensor, recipe: Recipe) -> None:
    """`multiply_by_slope_` of a softcap, where x may be overwritten: without a copy of either."""
    assert recipe.softcap is not None, "there is one"  # noqa: S101
    e = x.abs_().mul_(-2 * abs(recipe.logit_scale) / recipe.softcap).exp_()
    g.mul_(e).mul_(4 * recipe.logit_scale)
    g.div_(e.add_(1).square_())

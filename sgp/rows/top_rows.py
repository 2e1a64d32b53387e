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
from sgp.rows.top_k import TopK
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
    rows = implementation(logits)
    if out is not None and out.statistics is not None:
        rows.forward(logits, None, target, None, None, None, recipe, out)
    V, at_one = logits.shape[1], recipe._replace(temperature=1.0)
    weight = divergence.cross_entropy_weight
    bad = ((listed.indices < 0) | (listed.indices >= V)).any(1)  # where nobody could look: NaN
    if weight:
        bad |= (target < 0) | (target >= V)
    index, y = listed.indices.clamp(0, V - 1), target.clamp(0, V - 1)
    x_i = logits.gather(1, index)
    s_i = score_(x_i.clone(), at_one)
    if listed.valid is not None:
        s_i.masked_fill_(~listed.valid, -torch.inf)
    s = score_(logits, at_one)  # in their place, unless the softcap's slope needs them
    some = s_i.new_full((), -torch.inf).expand_as(s_i)
    if listed.valid is not None:
        some = torch.where(listed.valid.any(1, keepdim=True), some, s.gather(1, index))
    s.scatter_(1, index, some)

    def of_rest(temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """(log-sum-exp, -log of the target's share, what a backward needs) of the others."""
        found = new_outputs(s, len(y), Wanted(saved=True))
        rows.forward(s, None, y, None, None, None, Recipe(temperature=temperature), found)
        assert found.saved is not None, "asked for"  # noqa: S101
        top, inv_d, so_d = found.saved.unbind(1)
        empty = top == -torch.inf
        rest = torch.where(empty, top, top + log_of_sum(inv_d, so_d))
        return rest, found.loss, found.saved.masked_fill(empty[:, None], 0)

    rest, nll, saved = of_rest(recipe.temperature)
    buckets = torch.cat([s_i / recipe.temperature, rest[:, None]], 1)
    log_q = listed.log_probs.to(s.dtype)
    others = (1 - log_q.exp().sum(1)).clamp_(min=0).masked_fill_(rest == -torch.inf, 0)
    theirs = torch.cat([log_q, others.log()[:, None]], 1)
    scored = Scored.of(buckets, theirs, divergence)
    value = scored.value.squeeze(1)
    rest_1, nll_1, saved_1 = rest, nll, saved
    of_target = value.new_zeros(buckets.shape)
    is_other = torch.zeros_like(bad)
    if weight:
        if recipe.temperature != 1.0:
            rest_1, nll_1, saved_1 = of_rest(1.0)
        is_y = index == y[:, None]
        if listed.valid is not None:
            is_y &= listed.valid
        is_other = ~is_y.any(1)
        at = torch.cat([is_y, is_other[:, None]], 1)
        of_one = torch.cat([s_i, rest_1[:, None]], 1)
        top, so, z, e = without_largest(of_one)
        s_y = torch.where(at, of_one, 0).sum(1, keepdim=True)
        value = value + weight * ((top - s_y) + so.log1p()).squeeze(1)
        value = value + weight * torch.where(is_other, nll_1, 0)
        p = e / (1 + so)
        less = torch.where(z == 0, -so / (1 + so), p - 1)
        of_target = weight * torch.where(at, less, p)
    r = value.new_ones(value.shape) if row_weight is None else row_weight
    r = r.masked_fill(bad, torch.nan)
    if out is not None:
        out.loss.copy_(r * value)
    if dlogits is None:
        return
    r = r if scale is None else r * scale
    g = scored.gradient()
    of_listed = (g[:, :-1] / recipe.temperature + of_target[:, :-1]) * r[:, None]
    of_listed = multiply_by_slope_(of_listed, x_i, at_one)
    capped = recipe.softcap is not None
    r = r if capped else r * recipe.logit_scale
    place = s if capped else dlogits
    of_rest_1 = r * of_target[:, -1]
    of_y = torch.where(is_other, weight * r, 0)
    if not weight or recipe.temperature == 1.0:
        upstream = Upstream(r * g[:, -1] + of_rest_1)
        plain = Recipe(temperature=recipe.temperature)
        rows.backward(s, place, y, saved, None, of_y, plain, upstream)
    else:
        of_cross_entropy = torch.empty_like(s)
        rows.backward(s, of_cross_entropy, y, saved_1, None, of_y, Recipe(), Upstream(of_rest_1))
        upstream = Upstream(r * g[:, -1])
        plain = Recipe(temperature=recipe.temperature)
        rows.backward(s, s, y, saved, None, torch.zeros_like(r), plain, upstream)
        place = of_cross_entropy.add_(s)  # or a narrower gradient would be rounded twice
    if capped:
        _multiply_by_slope_(place, logits, at_one)
    if place is not dlogits:
        dlogits.copy_(place)
    if listed.valid is not None:  # every slot of an index writes the same
        of_listed = torch.where(listed.valid, of_listed, of_listed[:, :1])
        has_none = ~listed.valid.any(1, keepdim=True)
        of_listed = torch.where(has_none, dlogits.gather(1, index).to(of_listed.dtype), of_listed)
    every = torch.arange(len(index), device=index.device)[:, None]
    dlogits[every, index] = of_listed.to(dlogits.dtype)  # a CPU's scatter_ makes a wide copy


def _multiply_by_slope_(g: Tensor, x: Tensor, recipe: Recipe) -> None:
    """G times the slope of a softcap at x, as `multiply_by_slope_`; in the place of both."""
    assert recipe.softcap is not None, "there is one"  # noqa: S101
    e = x.abs_().mul_(-2 * abs(recipe.logit_scale) / recipe.softcap).exp_()
    g.mul_(e).mul_(4 * recipe.logit_scale)
    g.div_(e.add_(1).square_())

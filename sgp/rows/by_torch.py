"""The row operations by PyTorch's operators: CPU tensors, float64, and CUDA without Triton.

The same formulas as `kernels/arithmetic.py`, on the kept rows only, a few rows at a time so that
the working set stays in the cache. Rows without loss are not read; their gradient is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.reduction import reciprocal

Rows = Tensor | slice  # which rows: their numbers, or a range of them

CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32: the fastest of 2^16 to 2^24 on two CPU cores


class RowOutputs(NamedTuple):
    """What the forward of a row returns; None is what was not asked for."""

    loss: Tensor  # (N,)
    saved: Tensor | None  # (N, 3): max, 1/d, s_o/d
    log_prob: Tensor | None  # (N,)
    entropy: Tensor | None  # (N,)
    lse: Tensor | None  # (N,)
    is_top1: Tensor | None  # (N,) bool
    argmax: Tensor | None  # (N,) int64; not without the others
    dlogits: Tensor | None  # (..., V)

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(log_prob, entropy, lse, is_top1); all of them are wanted, or none."""
        _, _, log_prob, entropy, lse, is_top1, *_ = self
        if log_prob is None or entropy is None or lse is None or is_top1 is None:
            return None
        return log_prob, entropy, lse, is_top1

    def zero_(self) -> None:
        """Zero what is there of the rows' numbers at once; the gradient is left alone."""
        numbers = [x for x in self[:-3] if x is not None]
        torch._foreach_zero_(numbers)  # one launch
        for x in (self.is_top1, self.argmax):
            if x is not None:
                x.zero_()


class Wanted(NamedTuple):
    """Which outputs of a forward are wanted, beside the loss."""

    grad: bool = False
    saved: bool = False
    stats: bool = False
    argmax: bool = False  # only together with the statistics
    width: int = 3  # numbers a row that are saved


def new_outputs(logits: Tensor, N: int, wanted: Wanted) -> RowOutputs:
    """Uninitialised outputs, None where not wanted."""
    dtype = accumulation_dtype(logits.dtype)
    return RowOutputs(
        logits.new_empty(N, dtype=dtype),
        logits.new_empty((N, wanted.width), dtype=dtype) if wanted.saved else None,
        logits.new_empty(N, dtype=dtype) if wanted.stats else None,
        logits.new_empty(N, dtype=dtype) if wanted.stats else None,
        logits.new_empty(N, dtype=dtype) if wanted.stats else None,
        logits.new_empty(N, dtype=torch.bool) if wanted.stats else None,
        logits.new_empty(N, dtype=torch.int64) if wanted.argmax else None,
        logits.new_empty(logits.shape) if wanted.grad else None,
    )


class Upstream(NamedTuple):
    """Upstream gradients of a row's statistics; the one of its loss or log-probability is r."""

    lse: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)
    entropy_value: Tensor | None = None  # (N,): H itself; given exactly when `entropy` is


NOTHING = Upstream()


class Columns(NamedTuple):
    """Which columns of a row some logits are, where they are not all of it."""

    first: int
    vocabulary: int  # V: columns of the whole row


def forward(
    logits: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    out: RowOutputs,
    *,
    scratch: bool = False,
) -> None:
    """Fill `out` and, unless it is None, `dlogits`, which may be `logits` itself.

    `scratch` allows to overwrite the logits although no gradient is wanted.
    """
    kept = _clear_ignored(dlogits, target, recipe)
    out.zero_()
    statistics = out.statistics
    V = logits.shape[-1]
    for rows, x in _parts(logits, kept, overwrite=scratch or dlogits is logits):
        y, valid = _targets(target, rows, V)
        s = score_(x, recipe)
        s_y = s.gather(1, y).masked_fill_(~valid, torch.nan)
        top = s.amax(1, keepdim=True)
        reference = s_y.masked_fill(s_y == -torch.inf, 0.0)
        smooth = None
        if recipe.label_smoothing:
            smooth = _smoothing_sum(s, reference, weight)
        if out.argmax is not None:
            out.argmax[rows] = s.argmax(1)
        origin = top.masked_fill(top == -torch.inf, 0.0)  # a row, or a rank's part, of nothing
        s.sub_(origin)
        t = None if statistics is None else _entropy_sum(s)
        e = s.exp_().scatter_(1, y, 0.0)  # s is not needed any more
        s_o = e.sum(1, keepdim=True)
        e_y = (s_y - origin).exp_()
        d = s_o + e_y
        log_d = torch.where(s_y == top, s_o.log1p(), d.log())
        nll = (top - s_y) + log_d
        inv_d = 1.0 / d
        r = _row_factor(row_weight, rows, s)
        w_y = 1.0 if weight is None else weight[y]
        loss = w_y * nll
        if smooth is not None:
            from_reference = torch.where(reference == s_y, nll, top + log_d)
            w_mean = 1.0 if weight is None else weight.mean()
            loss = (1 - recipe.label_smoothing) * loss + recipe.label_smoothing * (
                w_mean * from_reference - smooth / V
            )
        if recipe.lse_square_scale:
            loss = loss + recipe.lse_square_scale * (top + log_d) ** 2
        out.loss[rows] = (r * loss).squeeze(1)
        if out.saved is not None:
            out.saved[rows] = torch.cat([top, inv_d, s_o * inv_d], 1)
        if statistics is not None and t is not None:
            # An infinite logit: the exponentials are NaN, lse is not, unless the maximum is.
            lse = torch.where(top == torch.inf, top, top + log_d)
            found = (-nll, log_d - t * inv_d, lse, s_y == top)
            for whole, column in zip(statistics, found, strict=True):
                whole[rows] = column.squeeze(1)
        if dlogits is not None:
            p = e.mul_(inv_d)  # the target's column is 0 and is written by _gradient
            g = _gradient(
                p, x, e_y * inv_d, y, valid, inv_d, s_o * inv_d, top,
                r if scale is None else r * scale, weight, recipe,
                V=V, place=_Place(y, None, slice(None)),
            )  # fmt: skip
            _store(dlogits, rows, g)


def backward(
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
    """Fill `dlogits`, which may be `logits` itself, from what the forward saved.

    `columns` says which ones of the row these logits are; `target`, `weight` and `saved` are always
    those of the whole row.
    """
    kept = _clear_ignored(dlogits, target, recipe)
    first, V = columns or Columns(0, logits.shape[-1])
    for rows, x in _parts(logits, kept, overwrite=dlogits is logits):
        y, valid = _targets(target, rows, V)
        place = _Place(y, None, slice(None))
        if columns is not None:
            place = _Place.of(y, first, x.shape[1])
        top, inv_d, so_d = saved[rows].split(1, 1)
        z = score_(x, recipe).sub_(top)
        entropy = None
        if upstream.entropy is not None and upstream.entropy_value is not None:
            log_p = z - log_of_sum(inv_d, so_d)
            p = log_p.exp()
            log_p += upstream.entropy_value[rows, None]
            entropy = p.mul_(log_p).masked_fill_(log_p == -torch.inf, 0.0)  # 0 x -inf is 0
            entropy.mul_(upstream.entropy[rows, None])
        p = z.exp_().mul_(inv_d)
        p_y = p.gather(1, place.column)
        r = _row_factor(row_weight, rows, p)
        from_lse = None if upstream.lse is None else upstream.lse[rows, None]
        g = _gradient(
            p, x, p_y, y, valid, inv_d, so_d, top, r, weight, recipe, from_lse, entropy,
            V=V, place=place,
        )  # fmt: skip
        _store(dlogits, rows, g)


def mean_scale(
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """1 / sum over kept rows of row_weight * weight[target], 0 for nothing; () in `dtype`."""
    kept = target != ignore_index
    if weight is None and row_weight is None:
        return reciprocal(kept.sum(), dtype)  # of whole numbers, exact
    counts = kept.to(dtype)
    if weight is not None:
        counts = counts * weight[target.clamp(0, weight.numel() - 1)]
    if row_weight is not None:
        counts = torch.where(kept, counts * row_weight, 0)
    return reciprocal(counts.sum(), dtype)


def multiply(dlogits: Tensor, target: Tensor | None, factor: Tensor, ignore_index: int) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing to do for 1."""
    if dlogits.device.type == "cpu" and factor == 1.0:
        return
    V = dlogits.shape[-1]
    if target is None:
        for part in dlogits.split(_rows_at_a_time(V)):
            part.copy_(part.to(factor.dtype).mul_(factor))
        return
    kept = (target != ignore_index).nonzero().squeeze(1)
    for rows in kept.split(_rows_at_a_time(V)):
        _store(dlogits, rows, _gather(dlogits, rows) * factor)


def _rows_at_a_time(V: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, V))


def _parts(logits: Tensor, kept: Tensor, *, overwrite: bool) -> Iterator[tuple[Rows, Tensor]]:
    """The kept rows, some at a time, in the accumulation dtype.

    Copies, or the logits' own memory where that may be overwritten and every row is kept.
    """
    step = _rows_at_a_time(logits.shape[-1])
    plain = logits.dim() == 2 and logits.dtype == accumulation_dtype(logits.dtype)
    if overwrite and plain and kept.numel() == logits.shape[0]:
        for start in range(0, kept.numel(), step):
            rows = slice(start, start + step)
            yield rows, logits[rows]
    else:
        for some in kept.split(step):
            yield some, _gather(logits, some)


def _clear_ignored(dlogits: Tensor | None, target: Tensor, recipe: Recipe) -> Tensor:
    """Zero the gradient of every ignored row; return the kept rows."""
    ignored = target == recipe.ignore_index
    if dlogits is not None:
        rows = ignored.nonzero().squeeze(1)
        if dlogits.is_contiguous():
            dlogits.view(-1, dlogits.shape[-1]).index_fill_(0, rows, 0.0)
        else:
            dlogits[row_index(dlogits, rows)] = 0.0
    return (~ignored).nonzero().squeeze(1)


def row_index(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of the flattened leading dimensions, as an index that needs no contiguous x.

    By arithmetic on the device: `torch.unravel_index` copies the shape there and waits.
    """
    index: tuple[Tensor, ...] = ()
    for size in reversed(x.shape[1:-1]):
        index = (rows % size, *index)
        rows = rows // size
    return (rows, *index)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """A copy (m, V) of some rows in the accumulation dtype."""
    return x[row_index(x, rows)].to(accumulation_dtype(x.dtype))


def _store(x: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, Tensor):
        x[row_index(x, rows)] = values.to(x.dtype)
    elif x.dtype != values.dtype or values.data_ptr() != x[rows].data_ptr():
        x[rows] = values  # else computed in its place


def _targets(target: Tensor, rows: Rows, V: int) -> tuple[Tensor, Tensor]:
    y = target[rows, None]
    valid = (y >= 0) & (y < V)
    return y.clamp(0, V - 1), valid


def _row_factor(row_weight: Tensor | None, rows: Rows, like: Tensor) -> Tensor:
    return like.new_ones(()) if row_weight is None else row_weight[rows, None]


def score_(x: Tensor, recipe: Recipe) -> Tensor:
    """Scored logits; in x's own place unless the softcap's slope will need x again."""
    if recipe.softcap is not None:
        # Divided, not multiplied by a rounded 1 / softcap, which would move all logits one way.
        if recipe.logit_scale == 1.0:
            x = x / recipe.softcap
        else:
            x = (x * recipe.logit_scale).div_(recipe.softcap)
        x = x.tanh_().mul_(recipe.softcap)
    elif recipe.logit_scale != 1.0:
        x = x.mul_(recipe.logit_scale)
    return x if recipe.temperature == 1.0 else x.mul_(1 / recipe.temperature)


def _smoothing_sum(s: Tensor, reference: Tensor, weight: Tensor | None) -> Tensor:
    """sum_j w_j (s_j - reference); a class of weight 0 is left out, even at -inf."""
    if weight is None:
        return (s - reference).sum(1, keepdim=True)
    return torch.where(weight == 0, 0.0, weight * (s - reference)).sum(1, keepdim=True)


def _entropy_sum(shifted: Tensor) -> Tensor:
    """sum_j (s_j - max) exp(s_j - max), where 0 x -inf is 0."""
    e = shifted.exp()
    return torch.where(e > 0, shifted * e, 0.0).sum(1, keepdim=True)


def log_of_sum(inv_d: Tensor, so_d: Tensor) -> Tensor:
    """log(d) from what is saved: as log1p(s_o) where the target has most of the mass."""
    return torch.where(so_d < 0.5, (so_d / inv_d).log1p(), -inv_d.log())


class _Place(NamedTuple):
    """Where the targets of some rows (m, 1) are among the columns that a gradient has."""

    column: Tensor  # (m, 1): any column where the target is elsewhere
    is_here: Tensor | None  # (m, 1) bool; None: all are
    classes: slice  # that the columns are

    @staticmethod
    def of(y: Tensor, first: int, columns: int) -> _Place:
        """Among so many columns from `first` on."""
        local = y - first
        is_here = (local >= 0) & (local < columns)
        return _Place(local.clamp(0, columns - 1), is_here, slice(first, first + columns))

    def put_(self, g: Tensor, g_y: Tensor) -> None:
        """The targets' own gradients (m, 1) into g (m, columns)."""
        if self.is_here is not None:
            g_y = torch.where(self.is_here, g_y, g.gather(1, self.column))
        g.scatter_(1, self.column, g_y)


def _gradient(
    p: Tensor,
    x: Tensor,
    p_y: Tensor,
    y: Tensor,
    valid: Tensor,
    inv_d: Tensor,
    so_d: Tensor,
    top: Tensor,
    r: Tensor,
    weight: Tensor | None,
    recipe: Recipe,
    from_lse: Tensor | None = None,
    from_entropy: Tensor | None = None,
    *,
    V: int,
    place: _Place,
) -> Tensor:
    """The gradient of some columns of some rows, in p's place; the target's is made from p_y."""
    r = torch.where(valid, r, torch.nan)
    b = r if weight is None else r * weight[y]
    of_lse = torch.zeros_like(r)
    if recipe.lse_square_scale:
        of_lse = 2 * recipe.lse_square_scale * (top + log_of_sum(inv_d, so_d)) * r
    if from_lse is not None:
        of_lse = of_lse + from_lse
    if recipe.label_smoothing:
        b = b * (1 - recipe.label_smoothing)
        c = r * recipe.label_smoothing
        c_mean = c if weight is None else c * weight.mean()
        spread = c / V if weight is None else c / V * weight[place.classes]
        g = p.mul_(b + (c_mean + of_lse)).sub_(spread)
        spread_y = c / V if weight is None else c / V * weight[y]
        # Where the target has most of the mass, c mean(w) p_y is c mean(w) (1 - s_o / d).
        near = (c_mean - spread_y) - c_mean * so_d
        smooth_y = torch.where(so_d < 0.5, near, c_mean * p_y - spread_y)
        g_y = of_lse * p_y - b * so_d + smooth_y
    else:
        g = p.mul_(b + of_lse)
        g_y = of_lse * p_y - b * so_d
    place.put_(g, g_y)
    if from_entropy is not None:
        g.sub_(from_entropy)
    return multiply_by_slope_(g, x, recipe)


def multiply_by_slope_(g: Tensor, x: Tensor, recipe: Recipe) -> Tensor:
    """G, in its place, times d(scored logit) / d(stored logit x)."""
    if recipe.softcap is not None:
        e = x.abs().mul_(-2 * abs(recipe.logit_scale) / recipe.softcap).exp_()
        g.mul_(e).mul_(4)
        g.div_(e.add_(1).square_())
    if recipe.logit_scale != 1.0:
        g.mul_(recipe.logit_scale)
    if recipe.temperature != 1.0:
        g.mul_(1 / recipe.temperature)
    return g

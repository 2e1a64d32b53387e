"""The row operations by PyTorch's operators: CPU tensors, float64, and CUDA without Triton.

The same formulas as `kernels/arithmetic.py`, on the kept rows only, a few rows at a time so that
the working set stays in the cache. Rows without loss are not read; their gradient is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgp.recipe import Recipe, accumulation_dtype

CHUNK_ELEMENTS = 1 << 20  # 4 MiB of float32: the fastest of 2^16 to 2^24 on two CPU cores


class RowOutputs(NamedTuple):
    """What the forward of a row returns; tensors that were not asked for are empty."""

    loss: Tensor  # (N,)
    saved: Tensor  # (N, 3): max, 1/d, s_o/d
    log_prob: Tensor  # (N,)
    entropy: Tensor  # (N,)
    lse: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool
    dlogits: Tensor  # (..., V)


def new_outputs(
    logits: Tensor, N: int, *, need_saved: bool, need_stats: bool, need_grad: bool
) -> RowOutputs:
    """Uninitialised outputs, empty where not wanted."""
    dtype = accumulation_dtype(logits.dtype)
    n_stats = N if need_stats else 0
    return RowOutputs(
        loss=logits.new_empty(N, dtype=dtype),
        saved=logits.new_empty((N, 3) if need_saved else 0, dtype=dtype),
        log_prob=logits.new_empty(n_stats, dtype=dtype),
        entropy=logits.new_empty(n_stats, dtype=dtype),
        lse=logits.new_empty(n_stats, dtype=dtype),
        is_top1=logits.new_empty(n_stats, dtype=torch.bool),
        dlogits=logits.new_empty(logits.shape if need_grad else 0),
    )


def forward(
    logits: Tensor,
    dlogits: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    out: RowOutputs,
) -> None:
    """Fill `out` and, unless it is None, `dlogits`, which may be `logits` itself."""
    kept = _clear_ignored(dlogits, target, recipe)
    for values in (out.loss, out.saved, out.log_prob, out.entropy, out.lse, out.is_top1):
        values.zero_()
    V = logits.shape[-1]
    for rows in kept.split(max(1, CHUNK_ELEMENTS // V)):
        x = _gather(logits, rows)
        y, valid = _targets(target, rows, V)
        s = _score(x, recipe)
        s_y = s.gather(1, y).masked_fill_(~valid, torch.nan)
        top = s.amax(1, keepdim=True)
        reference = s_y.masked_fill(s_y == -torch.inf, 0.0)
        smooth = None
        if recipe.label_smoothing:
            smooth = _smoothing_sum(s, reference, weight)
        s.sub_(top)
        t = _entropy_sum(s) if out.entropy.numel() else None
        e = s.exp_().scatter_(1, y, 0.0)  # s is not needed any more
        s_o = e.sum(1, keepdim=True)
        e_y = (s_y - top).exp_()
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
        if out.saved.numel():
            out.saved[rows] = torch.cat([top, inv_d, s_o * inv_d], 1)
        if t is not None:
            out.log_prob[rows] = -nll.squeeze(1)
            out.entropy[rows] = (log_d - t * inv_d).squeeze(1)
            out.lse[rows] = (top + log_d).squeeze(1)
            out.is_top1[rows] = (s_y == top).squeeze(1)
        if dlogits is not None:
            p = e.mul_(inv_d)  # the target's column is 0 and is written by _gradient
            _gradient(
                dlogits, rows, x, p, e_y * inv_d, y, valid, inv_d, s_o * inv_d, top,
                r if scale is None else r * scale, weight, recipe,
            )  # fmt: skip


def backward(
    logits: Tensor,
    dlogits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    recipe: Recipe,
) -> None:
    """Fill `dlogits`, which may be `logits` itself, from what the forward saved."""
    kept = _clear_ignored(dlogits, target, recipe)
    V = logits.shape[-1]
    for rows in kept.split(max(1, CHUNK_ELEMENTS // V)):
        x = _gather(logits, rows)
        y, valid = _targets(target, rows, V)
        top, inv_d, so_d = saved[rows].split(1, 1)
        p = _score(x, recipe).sub_(top).exp_().mul_(inv_d)
        p_y = p.gather(1, y)
        p.scatter_(1, y, 0.0)
        r = _row_factor(row_weight, rows, p)
        _gradient(
            dlogits, rows, x, p, p_y, y, valid, inv_d, so_d, top,
            r, weight, recipe,
        )  # fmt: skip


def multiply(dlogits: Tensor, target: Tensor, factor: Tensor, ignore_index: int) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing to do for 1."""
    if dlogits.device.type == "cpu" and factor == 1.0:
        return
    kept = (target != ignore_index).nonzero().squeeze(1)
    V = dlogits.shape[-1]
    for rows in kept.split(max(1, CHUNK_ELEMENTS // V)):
        _scatter(dlogits, rows, _gather(dlogits, rows) * factor)


def _clear_ignored(dlogits: Tensor | None, target: Tensor, recipe: Recipe) -> Tensor:
    """Zero the gradient of every ignored row; return the kept rows."""
    ignored = target == recipe.ignore_index
    if dlogits is not None:
        rows = ignored.nonzero().squeeze(1)
        if dlogits.is_contiguous():
            dlogits.view(-1, dlogits.shape[-1]).index_fill_(0, rows, 0.0)
        else:
            dlogits[_index(dlogits, rows)] = 0.0
    return (~ignored).nonzero().squeeze(1)


def _index(x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows of the flattened leading dimensions, as an index that needs no contiguous x."""
    return torch.unravel_index(rows, x.shape[:-1]) if x.dim() > 2 else (rows,)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """A copy (m, V) of some rows in the accumulation dtype."""
    return x[_index(x, rows)].to(accumulation_dtype(x.dtype))


def _scatter(x: Tensor, rows: Tensor, values: Tensor) -> None:
    x[_index(x, rows)] = values.to(x.dtype)


def _targets(target: Tensor, rows: Tensor, V: int) -> tuple[Tensor, Tensor]:
    y = target[rows, None]
    valid = (y >= 0) & (y < V)
    return y.clamp(0, V - 1), valid


def _row_factor(row_weight: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
    return like.new_ones(()) if row_weight is None else row_weight[rows, None]


def _score(x: Tensor, recipe: Recipe) -> Tensor:
    """Scored logits; in x's own place unless the softcap's slope will need x again."""
    if recipe.softcap is not None:
        return (x * (recipe.logit_scale / recipe.softcap)).tanh_().mul_(recipe.softcap)
    return x if recipe.logit_scale == 1.0 else x.mul_(recipe.logit_scale)


def _smoothing_sum(s: Tensor, reference: Tensor, weight: Tensor | None) -> Tensor:
    """sum_j w_j (s_j - reference); a class of weight 0 is left out, even at -inf."""
    if weight is None:
        return (s - reference).sum(1, keepdim=True)
    return torch.where(weight == 0, 0.0, weight * (s - reference)).sum(1, keepdim=True)


def _entropy_sum(shifted: Tensor) -> Tensor:
    """sum_j (s_j - max) exp(s_j - max), where 0 x -inf is 0."""
    e = shifted.exp()
    return torch.where(e > 0, shifted * e, 0.0).sum(1, keepdim=True)


def _gradient(
    dlogits: Tensor,
    rows: Tensor,
    x: Tensor,
    p: Tensor,
    p_y: Tensor,
    y: Tensor,
    valid: Tensor,
    inv_d: Tensor,
    so_d: Tensor,
    top: Tensor,
    r: Tensor,
    weight: Tensor | None,
    recipe: Recipe,
) -> None:
    """Write the gradient of some rows; p is used up, its target column is taken from p_y."""
    V = x.shape[1]
    r = torch.where(valid, r, torch.nan)
    b = r if weight is None else r * weight[y]
    a_minus_b = torch.zeros_like(r)
    if recipe.label_smoothing:
        b = b * (1 - recipe.label_smoothing)
        w_mean = 1.0 if weight is None else weight.mean()
        a_minus_b = r * recipe.label_smoothing * w_mean
    if recipe.lse_square_scale:
        a_minus_b = a_minus_b + 2 * recipe.lse_square_scale * (top - inv_d.log()) * r
    g = p.mul_(b + a_minus_b)
    g.scatter_(1, y, a_minus_b * p_y - b * so_d)
    if recipe.label_smoothing:
        g.sub_(r * (recipe.label_smoothing / V) * (1.0 if weight is None else weight))
    if recipe.softcap is not None:
        e = (x.abs() * (-2 * abs(recipe.logit_scale) / recipe.softcap)).exp_()
        g.mul_(4 * e / (1 + e).square_())
    if recipe.logit_scale != 1.0:
        g.mul_(recipe.logit_scale)
    _scatter(dlogits, rows, g)

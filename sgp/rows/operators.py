"""`torch.library` operators over the row operations: what autograd and torch.compile see.

Each is opaque and plain: shapes in, shapes out, a fake for tracing, no autograd of its own (that
is in autograd.py). Inside, `backend.choose` picks the kernels or PyTorch, and targets are checked
where that needs no wait for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgp.rows.by_torch import RowOutputs, Upstream, Wanted, new_outputs
from sgp.rows.operations import implementation
from sgp.rows.problem import check_mean_weights, check_targets, may_wait
from sgp.rows.recipe import Recipe, accumulation_dtype, cast
from sgp.rows.watched import operator


@operator()
def row_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    wanted: Wanted,
) -> RowOutputs:
    """Loss, saved statistics, reported statistics and gradient of every row, as RowOutputs.

    Args:
        logits: (..., V), any strides; leading dimensions flatten to N.
        target: (N,) int64.
        weight: (V,) class weights in the accumulation dtype.
        row_weight: (N,) weights in the accumulation dtype; they multiply loss and gradient.
        scale: () in the accumulation dtype; multiplies the gradient only.
        recipe: the constants of the loss.
        wanted: which outputs; the rest are None, and empty from the operator.
    """
    check_targets("sgp", target, logits.shape[-1], recipe.ignore_index)
    out = new_outputs(logits, target.numel(), wanted)
    implementation(logits).forward(
        logits, out.dlogits, target, weight, row_weight, scale, recipe, out
    )
    return out


@operator(mutates_args=("logits",))
def row_forward_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    wanted: Wanted,
) -> RowOutputs:
    """As row_forward, and the gradient, which is not among what is `wanted`, over the logits."""
    check_targets("sgp", target, logits.shape[-1], recipe.ignore_index)
    out = new_outputs(logits, target.numel(), wanted)
    implementation(logits).forward(logits, logits, target, weight, row_weight, scale, recipe, out)
    return out


@row_forward.register_fake
@row_forward_.register_fake
def _(logits: Tensor, target: Tensor, *options: Any) -> RowOutputs:
    return new_outputs(logits, target.numel(), options[-1])


@operator()
def row_backward(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    upstream: Upstream,
    recipe: Recipe,
) -> Tensor:
    """The gradient (..., V) of every row from row_forward's `saved`.

    Args:
        logits, target, weight, recipe: as in row_forward.
        saved: (N, 3) of row_forward.
        row_weight: (N,) row weight times upstream gradient of the loss (of -log_prob).
        upstream: those of the statistics.
    """
    dlogits = logits.new_empty(logits.shape)
    implementation(logits).backward(
        logits, dlogits, target, saved, weight, row_weight, recipe, upstream
    )
    return dlogits


@row_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@operator(mutates_args=("logits",))
def row_backward_(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    upstream: Upstream,
    recipe: Recipe,
) -> None:
    """As row_backward, the gradient written over the logits."""
    implementation(logits).backward(
        logits, logits, target, saved, weight, row_weight, recipe, upstream
    )


@operator(mutates_args=("dlogits",))
def multiply_rows_(
    dlogits: Tensor, target: Tensor | None, factor: Tensor, ignore_index: int
) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing happens for 1.

    Without a target every row is kept.
    """
    factor = cast(factor, accumulation_dtype(dlogits.dtype))
    implementation(dlogits).multiply(dlogits, target, factor, ignore_index)


@row_backward_.register_fake
@multiply_rows_.register_fake
def _(*_: Any) -> None:
    """Nothing is returned."""


@operator()
def mean_scale(
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """1 / sum over kept rows of row_weight * weight[target], 0 for nothing; () in `dtype`."""
    if row_weight is not None and may_wait(row_weight):
        check_mean_weights(name, target != ignore_index, row_weight)
    scale: Tensor = implementation(target, dtype).mean_scale(
        target, weight, row_weight, ignore_index, dtype
    )
    return scale


@mean_scale.register_fake
def _(target: Tensor, *options: Any) -> Tensor:
    return target.new_empty((), dtype=options[-2])

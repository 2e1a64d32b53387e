"""`torch.library` operators over the row implementations: what autograd and torch.compile see.

Each is opaque and plain: shapes in, shapes out, a fake for tracing, no autograd of its own (that
is in autograd.py). Inside, `backend.choose` picks the kernels or PyTorch, and targets are checked
where that needs no wait for a device.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgp import backend, row_torch
from sgp.problem import check_mean_weights, check_targets, may_wait
from sgp.recipe import Recipe, accumulation_dtype, cast
from sgp.row_torch import RowOutputs, Upstream, new_outputs
from sgp.watched import operator


def implementation(rows: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
    """The module, row_triton or row_torch, that does these rows."""
    if backend.choose(rows.device, dtype or rows.dtype) == "triton":
        return _kernels()
    return row_torch


@functools.cache
def _kernels() -> ModuleType:
    """`row_triton`, which imports Triton, at first use."""
    from sgp import row_triton  # noqa: PLC0415  (relative in a copy of the package, as the hub's)

    return row_triton


@operator()
def row_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    lse_square_scale: float,
    temperature: float,
    need_grad: bool,
    need_saved: bool,
    need_stats: bool,
    need_argmax: bool,
) -> RowOutputs:
    """Loss, saved statistics, reported statistics and gradient of every row, as RowOutputs.

    Args:
        logits: (..., V), any strides; leading dimensions flatten to N.
        target: (N,) int64.
        weight: (V,) class weights in the accumulation dtype.
        row_weight: (N,) weights in the accumulation dtype; they multiply loss and gradient.
        scale: () in the accumulation dtype; multiplies the gradient only.
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature: the
            Recipe.
        need_grad, need_saved, need_stats, need_argmax: which outputs are wanted, the last only
            together with the statistics; the rest are None, and empty from the operator.
    """
    recipe = Recipe(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature
    )
    check_targets("sgp", target, logits.shape[-1], ignore_index)
    out = new_outputs(
        logits, target.numel(), need_grad=need_grad, need_saved=need_saved, need_stats=need_stats,
        need_argmax=need_argmax,
    )  # fmt: skip
    implementation(logits).forward(
        logits, out.dlogits, target, weight, row_weight, scale, recipe, out
    )
    return out


@row_forward.register_fake
def _(logits: Tensor, target: Tensor, *options: Any) -> RowOutputs:
    need_grad, need_saved, need_stats, need_argmax = options[-4:]
    return new_outputs(
        logits, target.numel(), need_grad=need_grad, need_saved=need_saved, need_stats=need_stats,
        need_argmax=need_argmax,
    )  # fmt: skip


@operator(mutates_args=("logits",))
def row_forward_(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    lse_square_scale: float,
    temperature: float,
    need_stats: bool,
    need_argmax: bool,
) -> RowOutputs:
    """As row_forward with need_grad, the gradient written over the logits."""
    recipe = Recipe(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature
    )
    check_targets("sgp", target, logits.shape[-1], ignore_index)
    out = new_outputs(
        logits, target.numel(), need_grad=False, need_saved=False, need_stats=need_stats,
        need_argmax=need_argmax,
    )  # fmt: skip
    implementation(logits).forward(logits, logits, target, weight, row_weight, scale, recipe, out)
    return out


@row_forward_.register_fake
def _(logits: Tensor, target: Tensor, *options: Any) -> RowOutputs:
    need_stats, need_argmax = options[-2:]
    return new_outputs(
        logits, target.numel(), need_grad=False, need_saved=False, need_stats=need_stats,
        need_argmax=need_argmax,
    )  # fmt: skip


@operator()
def row_backward(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    lse_weight: Tensor | None,
    entropy_weight: Tensor | None,
    entropy: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    lse_square_scale: float,
    temperature: float,
) -> Tensor:
    """The gradient (..., V) of every row from row_forward's `saved`.

    Args:
        logits, target, weight: as in row_forward, and so is the Recipe.
        saved: (N, 3) of row_forward.
        row_weight: (N,) row weight times upstream gradient of the loss (of -log_prob).
        lse_weight, entropy_weight: (N,) upstream gradients of the statistics.
        entropy: (N,) of row_forward; given exactly when entropy_weight is.
    """
    recipe = Recipe(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature
    )
    dlogits = logits.new_empty(logits.shape)
    upstream = Upstream(lse_weight, entropy_weight, entropy)
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
    lse_weight: Tensor | None,
    entropy_weight: Tensor | None,
    entropy: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    lse_square_scale: float,
    temperature: float,
) -> None:
    """As row_backward, the gradient written over the logits."""
    recipe = Recipe(
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature
    )
    upstream = Upstream(lse_weight, entropy_weight, entropy)
    implementation(logits).backward(
        logits, logits, target, saved, weight, row_weight, recipe, upstream
    )


@row_backward_.register_fake
def _(*_: Any) -> None:
    """Nothing is returned."""


@operator(mutates_args=("dlogits",))
def multiply_rows_(
    dlogits: Tensor, target: Tensor | None, factor: Tensor, ignore_index: int
) -> None:
    """Multiply the kept rows of dlogits by factor (0-d) in place; nothing happens for 1.

    Without a target every row is kept.
    """
    factor = cast(factor, accumulation_dtype(dlogits.dtype))
    implementation(dlogits).multiply(dlogits, target, factor, ignore_index)


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


__all__ = [
    "RowOutputs",
    "implementation",
    "mean_scale",
    "multiply_rows_",
    "row_backward",
    "row_backward_",
    "row_forward",
    "row_forward_",
]

"""`torch.library` operators over the linear head: what autograd and torch.compile see.

Kept rows come as they are stored in a Selection: padded to N, with their number as a tensor on the
CPU that is read here, inside. So no shape depends on the mask, one compiled graph serves every
mask, and nothing waits for a device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sgp import head
from sgp.head import Gradients, Head, Needs
from sgp.head_problem import is_autocast
from sgp.problem import check_targets
from sgp.recipe import Recipe
from sgp.row_torch import Upstream, new_outputs
from sgp.selection import padded_rows
from sgp.shard import Shard
from sgp.watched import operator

RowsAndGradients = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
    Tensor | None, Tensor | None, Tensor | None, Tensor | None,
]  # loss, saved, the 5 statistics; gradients of input, weight, bias  # fmt: skip


# The number of kept rows is read on the host: a captured graph would replay the number of its
# capture, so compiled CUDA graphs must leave these operators out.
TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@operator(tags=TAGS)
def kept_rows(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(rows of the target (N,) that are not ignored, padded to N; their number () on the CPU).

    On a GPU this waits for the device, once: the number decides how much work there is.
    """
    return padded_rows(target, ignore_index)


@kept_rows.register_fake
def _(target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return target.new_empty(target.shape), torch.empty((), dtype=torch.int64, device="cpu")


def forward(
    shard: Shard | None,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    count: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    *options: Any,
) -> RowsAndGradients:
    """`head_forward`, and with a shard the same of a vocabulary split over ranks, no operator.

    The ranks must call it alike; `linear_weight` and `linear_bias` are the rank's own, `target` and
    `weight` are of the whole vocabulary.
    """
    *constants, compute_dtype, chunk_rows = options[:-7]
    of_input, of_weight, of_bias, wide, saved, stats, argmax = options[-7:]
    recipe = Recipe(*constants)
    V = linear_weight.shape[0] if shard is None else shard.V
    check_targets("sgp" if shard is None else shard.name, target, V, recipe.ignore_index)
    whole = Head(
        input, linear_weight, linear_bias, target, rows[: int(count)], weight, recipe,
        compute_dtype, chunk_rows, shard,
    )  # fmt: skip
    needs = Needs(of_input, of_weight, of_bias)
    with _without_autocast(input):
        out, gradients = head.forward(
            whole, row_weight, scale, needs, wide=wide, need_saved=saved, need_stats=stats,
            need_argmax=argmax,
        )  # fmt: skip
    return *out[:-1], *gradients


def backward(
    shard: Shard | None,
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    count: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    lse_weight: Tensor | None,
    entropy_weight: Tensor | None,
    entropy: Tensor | None,
    *options: Any,
) -> Gradients:
    """`head_backward`, and the same with a shard, as `forward`."""
    *constants, compute_dtype, chunk_rows, of_input, of_weight, of_bias = options
    whole = Head(
        input, linear_weight, linear_bias, target, rows[: int(count)], weight, Recipe(*constants),
        compute_dtype, chunk_rows, shard,
    )  # fmt: skip
    upstream = Upstream(lse_weight, entropy_weight, entropy)
    needs = Needs(of_input, of_weight, of_bias)
    with _without_autocast(input):
        return head.backward(whole, saved, row_weight, upstream, needs)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The matmuls' dtypes are ours; entering a context for nothing would cost as much as one."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


@operator(tags=TAGS)
def head_forward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    count: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    lse_square_scale: float,
    temperature: float,
    compute_dtype: torch.dtype,
    chunk_rows: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    wide: bool,
    need_saved: bool,
    need_stats: bool,
    need_argmax: bool,
) -> RowsAndGradients:
    """Loss, saved and reported statistics of every row, and the gradients of their weighted sum.

    Args:
        input: (..., D), any strides; leading dimensions flatten to N.
        linear_weight, linear_bias: (V, D) and (V,).
        target, rows, count: (N,) int64, (N,) int64 and () int64 on the CPU, as in a Selection.
        weight, row_weight, scale: as in row_forward, and so is the Recipe.
        compute_dtype: of the matmuls' operands; the autocast dtype, or the input's own.
        chunk_rows: rows of logits held at once.
        need_input, need_weight, need_bias: which gradients are wanted; the rest are None, and
            empty from the operator.
        wide: gradients in float32, for float16 operands whose upstream factor comes later.
        need_saved, need_stats, need_argmax: which row outputs are wanted.
    """
    return forward(
        None, input, linear_weight, linear_bias, target, rows, count, weight, row_weight, scale,
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature,
        compute_dtype, chunk_rows, need_input, need_weight, need_bias, wide, need_saved, need_stats,
        need_argmax,
    )  # fmt: skip


@head_forward.register_fake
def _(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    *options: Any,
) -> RowsAndGradients:
    *needs, wide, need_saved, need_stats, need_argmax = options[-7:]
    out = new_outputs(
        input, target.numel(), need_grad=False, need_saved=need_saved, need_stats=need_stats,
        need_argmax=need_argmax,
    )  # fmt: skip
    gradients = head.new_gradients(input, linear_weight, linear_bias, Needs(*needs), wide=wide)
    return *out[:-1], *gradients


@operator(tags=TAGS)
def head_backward(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    rows: Tensor,
    count: Tensor,
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
    compute_dtype: torch.dtype,
    chunk_rows: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """The gradients of a head for an upstream gradient a row; its logits are computed again.

    Arguments as in head_forward and row_backward.
    """
    return backward(
        None, input, linear_weight, linear_bias, target, rows, count, saved, weight, row_weight,
        lse_weight, entropy_weight, entropy,
        ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, temperature,
        compute_dtype, chunk_rows, need_input, need_weight, need_bias,
    )  # fmt: skip


@head_backward.register_fake
def _(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *options: Any,
) -> Gradients:
    needs = Needs(*options[-3:])
    return head.new_gradients(input, linear_weight, linear_bias, needs, wide=False)

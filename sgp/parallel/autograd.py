"""How logits of a split vocabulary meet autograd: forward exchanges, backward does not.

The joined statistics of a row are saved, so the gradient is each rank's own work and can be made
again: a second backward is right, unless the first wrote over the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.parallel.rows import ShardRows
from sgp.parallel.shard import Shard
from sgp.parallel.two_rows import ShardTwoRows
from sgp.rows.autograd import (
    contiguous,
    loss_upstream,
    mark_constant,
    once,
    row_upstream,
    saved_tensors,
)
from sgp.rows.by_torch import Upstream, Wanted, new_outputs
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.recipe import Recipe
from sgp.rows.two_by_torch import Whose


class Call(NamedTuple):
    """What is no tensor."""

    shard: Shard
    recipe: Recipe
    wanted: Wanted  # of the rows' outputs
    of_stats: bool = False  # whether the statistics are differentiable, and not the loss
    of_lse: bool = False  # whether the log-sum-exp is, beside the loss
    inplace: bool = False


class ShardLogits(torch.autograd.Function):
    """(loss, 5 statistics, saved) of each row (N,), the same on every rank."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        rows: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        call: Call,
    ) -> tuple[Tensor | None, ...]:
        out = new_outputs(logits, target.numel(), call.wanted._replace(saved=True))
        columns = logits[..., : call.shard.size]
        operations = ShardRows(call.shard, rows)
        operations.forward(columns, None, target, weight, row_weight, None, call.recipe, out)
        loss, saved, *stats, _ = out
        return loss, *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, rows, weight, row_weight, call = inputs
        loss, log_prob, entropy, lse, is_top1, argmax, saved = output
        constants = (loss,) if call.of_stats else (log_prob, entropy, None if call.of_lse else lse)
        mark_constant(ctx, *constants, is_top1, argmax, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, rows, weight, row_weight, saved, entropy)
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        of_lse = grads[3] if call.of_lse else None
        wanted = grads[1:4] if call.of_stats else (grads[0], of_lse)
        if all(gradient is None for gradient in wanted):
            return (None,) * 6
        logits, target, rows, weight, row_weight, saved, entropy = (
            saved_tensors(ctx, call.shard.name, "loss with inplace=True")
            if call.inplace
            else ctx.saved_tensors
        )
        with torch.no_grad():
            if call.of_stats:
                r, upstream = row_upstream(wanted, saved, entropy)
            else:
                r = loss_upstream(grads[0], row_weight, saved)
                upstream = Upstream(contiguous(of_lse))
            dlogits = logits.detach() if call.inplace else logits.new_empty(logits.shape)
            size = call.shard.size
            dlogits[..., size:] = 0  # padding
            ShardRows(call.shard, rows).backward(
                logits[..., :size], dlogits[..., :size], target, saved, weight, r, call.recipe,
                upstream,
            )  # fmt: skip
        return (once(call.shard.name, dlogits, saved, *wanted), *(None,) * 5)


class DivergenceCall(NamedTuple):
    """What is no tensor beside a teacher."""

    shard: Shard
    recipe: Recipe
    divergence: Divergence
    stats: bool


class ShardDivergence(torch.autograd.Function):
    """(loss, 5 statistics, saved) of each row (N,) beside a teacher's, the same on every rank."""

    @staticmethod
    def forward(
        logits: Tensor,
        teacher: Tensor,
        target: Tensor,
        rows: Tensor,
        row_weight: Tensor | None,
        call: DivergenceCall,
    ) -> tuple[Tensor | None, ...]:
        wanted = Wanted(saved=True, stats=call.stats, width=SAVED)
        out = new_outputs(logits, target.numel(), wanted)
        size = call.shard.size
        ShardTwoRows(call.shard, rows).forward(
            logits[..., :size], teacher[..., :size], None, target, Whose(), row_weight, None,
            call.recipe, call.divergence, out,
        )  # fmt: skip
        loss, saved, *stats, _ = out
        return loss, *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, call = inputs
        _, *stats, saved = output
        mark_constant(ctx, *stats, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: DivergenceCall = ctx.call
        if grads[0] is None:
            return (None,) * 6
        logits, teacher, target, rows, row_weight, saved = ctx.saved_tensors
        size = call.shard.size
        with torch.no_grad():
            dlogits = logits.new_zeros(logits.shape)
            ShardTwoRows(call.shard, rows).backward(
                logits[..., :size], teacher[..., :size], dlogits[..., :size], target, Whose(),
                saved, loss_upstream(grads[0], row_weight, saved), call.recipe, call.divergence,
            )  # fmt: skip
        return (once(call.shard.name, dlogits, saved, grads[0]), *(None,) * 5)

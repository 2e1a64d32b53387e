"""How the divergence of logits meets autograd; the functions of autograd.py for two rows.

Teachers are constants. `DivergenceSum` computes the gradient in forward, `DivergenceRows` in
backward, `DivergenceTop` in backward from the few tokens of an `sgp.TopK`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgp.rows.autograd import loss_upstream, mark_constant, once, saved_tensors
from sgp.rows.by_torch import Wanted
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.operators import multiply_rows_
from sgp.rows.recipe import Recipe
from sgp.rows.top_rows import Listed, top_backward, top_forward
from sgp.rows.two_rows import DISTILLATION, two_rows_backward, two_rows_forward


class DivergenceSum(torch.autograd.Function):
    """(loss (), 5 statistics (N,), gradient) of the sum over rows, times `scale`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        index: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        divergence: Divergence,
        stats: bool,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        wanted = Wanted(grad=True, stats=stats)
        loss, _, *rest = two_rows_forward(
            logits, list(teachers), target, index, row_weight, scale, recipe, divergence, wanted
        )
        total = loss.sum()
        return total if scale is None else total * scale, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *stats, dlogits = output
        mark_constant(ctx, *stats, origin=dlogits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogits, inputs[1])
        ctx.ignore_index, ctx.num_inputs = inputs[5].ignore_index, len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        number: int = ctx.num_inputs
        if grads[0] is None:
            return (None,) * number
        origin, target = saved_tensors(ctx, DISTILLATION, "'mean' or 'sum' loss")
        dlogits = origin.detach()
        with torch.no_grad():
            multiply_rows_(dlogits, target, grads[0], ctx.ignore_index)
        gradient = once(DISTILLATION, dlogits, origin, grads[0])
        return gradient, *(None,) * (number - 1)


class DivergenceRows(torch.autograd.Function):
    """(losses (N,), 5 statistics (N,), saved (N, SAVED)), each row's loss times its weight."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        index: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        divergence: Divergence,
        stats: bool,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        wanted = Wanted(saved=True, stats=stats, width=SAVED)
        loss, saved, *found, _ = two_rows_forward(
            logits, list(teachers), target, index, row_weight, None, recipe, divergence, wanted
        )
        return loss, *found, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, index, row_weight, recipe, divergence, _, *teachers = inputs
        _, *stats, saved = output
        mark_constant(ctx, *stats, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, index, row_weight, saved, *teachers)
        ctx.recipe, ctx.divergence, ctx.num_inputs = recipe, divergence, len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        number: int = ctx.num_inputs
        if grads[0] is None:
            return (None,) * number
        logits, target, index, row_weight, saved, *teachers = ctx.saved_tensors
        with torch.no_grad():
            dlogits = two_rows_backward(
                logits, teachers, target, index, saved, loss_upstream(grads[0], row_weight, saved),
                ctx.recipe, ctx.divergence,
            )  # fmt: skip
        gradient = once(DISTILLATION, dlogits, saved, grads[0])
        return gradient, *(None,) * (number - 1)


class DivergenceTop(torch.autograd.Function):
    """(losses (N,), 5 statistics (N,)), each row's loss times its weight; some rows at a time."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        rows: Tensor,
        indices: Tensor,
        log_probs: Tensor,
        valid: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        divergence: Divergence,
        stats: bool,
    ) -> tuple[Tensor | None, ...]:
        listed = Listed(indices, log_probs, valid)
        out = top_forward(logits, target, rows, listed, row_weight, recipe, divergence, stats=stats)
        return out.loss, out.log_prob, out.entropy, out.lse, out.is_top1, out.argmax

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, recipe, divergence, _ = inputs
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.recipe, ctx.divergence = recipe, divergence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 10
        logits, target, rows, indices, log_probs, valid, row_weight = ctx.saved_tensors
        with torch.no_grad():
            r = grads[0] if row_weight is None else grads[0] * row_weight
            dlogits = top_backward(
                logits, target, rows, Listed(indices, log_probs, valid), r, ctx.recipe,
                ctx.divergence,
            )  # fmt: skip
        return once(DISTILLATION, dlogits, logits, grads[0]), *(None,) * 9

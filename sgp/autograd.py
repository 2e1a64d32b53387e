"""How the row operators meet autograd: two functions, by when the upstream gradient is known.

`ScalarLoss` computes the gradient in forward, as one launch with the loss, and multiplies it by
the upstream factor in backward, which for a plain `loss.backward()` is 1 and costs nothing.
`RowLoss` returns one loss a row and computes the gradient in backward: for upstream gradients that
differ by row, and for float16, whose gradients must not be rounded before the loss scaler's factor
is in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgp import operators
from sgp.recipe import Recipe

Stats = tuple[Tensor, Tensor, Tensor, Tensor]

USED_UP = (
    "sgp.cross_entropy: backward a second time through a {what}, whose gradient was computed with "
    "the loss and has been handed over. Compute the loss again, or sum the losses before one "
    "backward; reduction='none' (summed by hand) keeps what a second backward needs"
)
NOT_TWICE = (
    "sgp.cross_entropy has no second derivative: its gradient is computed with the loss. For "
    "create_graph=True, gradient penalties and Hessians use torch.nn.functional.cross_entropy or "
    "sgp.reference.cross_entropy"
)


class _Once(torch.autograd.Function):
    """The identity on a gradient; differentiating it raises our message.

    The anchors are what the gradient depends on (the logits, by an empty slice, and the upstream
    gradient), so that every way to a second derivative leads through here.
    """

    @staticmethod
    def forward(gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(NOT_TWICE)


def anchor(logits: Tensor) -> Tensor | None:
    """An empty tensor with the logits' place in the graph, and none of their memory."""
    return None if torch.compiler.is_compiling() else logits[..., :0].clone()


def _once(gradient: Tensor, *anchors: Tensor | None) -> Tensor:
    """The gradient, closed to a second derivative where one is being recorded."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    return _Once.apply(gradient, *anchors)  # type: ignore[no-any-return,no-untyped-call]


def _saved(ctx: Any, what: str) -> tuple[Tensor, ...]:
    """The saved tensors; our message where our own first backward has written over them."""
    try:
        saved = tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if getattr(ctx, "used", False) and "inplace operation" in str(error):
            raise RuntimeError(USED_UP.format(what=what)) from error
        raise
    if not torch.compiler.is_compiling():
        ctx.used = True
    return saved


class ScalarLoss(torch.autograd.Function):
    """(loss (), 4 statistics (N,), gradient) of sum over rows, times `scale`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        need_stats: bool,
        inplace: bool,
        origin: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if inplace:
            # A detached alias shares the version counter, so autograd sees the change.
            loss, _, *rest = operators.row_forward_(
                logits.detach(), target, weight, row_weight, scale, *recipe, need_stats
            )
        else:
            loss, _, *rest = operators.row_forward(
                logits, target, weight, row_weight, scale, *recipe, True, False, need_stats
            )
        total = loss.sum()
        return total if scale is None else total * scale, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, *_, recipe, _, inplace, origin = inputs
        _, *stats, dlogits = output
        ctx.mark_non_differentiable(*stats, dlogits)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits if inplace else dlogits, target, origin)
        ctx.ignore_index = recipe.ignore_index

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 9
        dlogits, target, origin = _saved(ctx, "'mean' or 'sum' loss")
        with torch.no_grad():
            dlogits = dlogits.detach()
            operators.multiply_rows_(dlogits, target, grads[0], ctx.ignore_index)
        return (_once(dlogits, origin, grads[0]), *(None,) * 8)


class RowLoss(torch.autograd.Function):
    """(losses (N,), 4 statistics (N,), saved (N, 3)), each row's loss times its weight."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        need_stats: bool,
        inplace: bool,
        origin: Tensor | None,
    ) -> tuple[Tensor, ...]:
        loss, saved, *stats, _ = operators.row_forward(
            logits, target, weight, row_weight, None, *recipe, False, True, need_stats
        )
        return loss, *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, row_weight, recipe, _, inplace, origin = inputs
        _, *stats, saved = output
        ctx.mark_non_differentiable(*stats, saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, row_weight, saved, origin)
        ctx.recipe, ctx.inplace = recipe, inplace

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 8
        logits, target, weight, row_weight, saved, origin = _saved(ctx, "loss with inplace=True")
        with torch.no_grad():
            factor = grads[0] if row_weight is None else grads[0] * row_weight
            arguments = (target, saved, weight, factor.contiguous(), *ctx.recipe)
            if ctx.inplace:
                dlogits = logits.detach()
                operators.row_backward_(dlogits, *arguments)
            else:
                dlogits = operators.row_backward(logits, *arguments)
        return (_once(dlogits, origin, grads[0]), *(None,) * 7)

"""How the linear head meets autograd, by when the upstream gradient is known.

`HeadScalarLoss`: gradients in forward, three matmuls; in backward they are multiplied by the
upstream factor, which for a plain `loss.backward()` is 1 and costs nothing. `HeadRowLoss`: one
loss a row; in backward the logits are computed again, or, where only `input` requires grad, its
gradient from forward is multiplied row by row. `HeadStatistics`: log-probability, entropy and
log-sum-exp of each row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.head import operators
from sgp.head.algorithm import HeadCall, LinearHead, Needs
from sgp.head.chunks import MOST_ROWS, default_chunk_rows
from sgp.head.problem import compute_dtype
from sgp.rows.autograd import (
    Transformed,
    contiguous,
    loss_upstream,
    mark_constant,
    once,
    row_upstream,
    saved_tensors,
)
from sgp.rows.by_torch import Upstream, Wanted
from sgp.rows.operations import RowOperations
from sgp.rows.operators import multiply_rows_
from sgp.rows.problem import Problem
from sgp.rows.recipe import Recipe
from sgp.selection import Selection

LINEAR_CROSS_ENTROPY = "sgp.linear_cross_entropy"
LINEAR_LOG_PROBS = "sgp.linear_token_log_probs"


class HeadOptions(NamedTuple):
    """What is no tensor; with methods and no properties, as `Problem`."""

    recipe: Recipe
    compute_dtype: torch.dtype
    chunk_rows: int
    needs: Needs
    wanted: Wanted
    of_lse: bool = False  # whether the log-sum-exp of HeadRowLoss is differentiable
    operations: RowOperations | None = None  # None: whole rows, by the operators

    def forward(self, *arguments: Any) -> Any:
        """The operator's outputs, or those of what it calls, with other row operations."""
        if self.operations is None:
            return operators.head_forward(*arguments)
        return operators.forward(self.operations, *arguments)

    def backward(self, *arguments: Any) -> Any:
        """The same of the backward."""
        if self.operations is None:
            return operators.head_backward(*arguments)
        return operators.backward(self.operations, *arguments)

    def call(self, needs: Needs, *, saved: bool = False, wide: bool = False) -> HeadCall:
        """One pass that computes these gradients, and what a backward needs where asked."""
        wanted = self.wanted
        if saved:
            wanted = Wanted(saved=True, stats=wanted.stats, argmax=wanted.argmax)
        return HeadCall(self.recipe, self.compute_dtype, self.chunk_rows, needs, wanted, wide)

    def named(self, single: str) -> str:
        """The function that was called, for messages; `single` on one device."""
        return single if self.operations is None else self.operations.name

    def is_scaled(self) -> bool:
        """Whether rows of d_input wait for one upstream factor each: all that HeadRowLoss needs."""
        return self.needs == Needs(input=True) and not self.of_lse

    def is_wide(self) -> bool:
        """Whether gradients wait for the upstream factor in float32: those of float16 matmuls."""
        return self.compute_dtype == torch.float16


def linear_head(
    weight: Tensor, bias: Tensor | None, target: Tensor | Selection, problem: Problem
) -> LinearHead:
    """The head of a problem; labels on a GPU are counted, which waits for it."""
    p = problem
    if isinstance(target, Selection):
        kept = (target.padded_rows, target.count)
    else:
        kept = operators.kept_rows(p.target, p.recipe.ignore_index)
    return LinearHead(p.input, weight, bias, p.target, *kept)


def head_options(
    recipe: Recipe,
    head: LinearHead,
    chunk_rows: int | None,
    wanted: Wanted,
    operations: RowOperations | None = None,
) -> HeadOptions:
    """What this call computes, in which dtype, and how many rows at a time."""

    def needed(x: Tensor | None) -> bool:
        return x is not None and x.requires_grad and torch.is_grad_enabled()

    rows = chunk_rows or default_chunk_rows(head.weight.shape[0], head.input.device.type)
    return HeadOptions(
        recipe=recipe,
        compute_dtype=compute_dtype(head.input),
        chunk_rows=min(rows, MOST_ROWS),
        needs=Needs(*map(needed, head[:3])),
        wanted=wanted,
        operations=operations,
    )


def _of_kept_rows(upstream: Tensor, target: Tensor, recipe: Recipe, d_input: Tensor) -> Tensor:
    """Upstream gradients (N,) for d_input (..., D): 0 at ignored rows, which stay +0."""
    if not d_input.numel():
        return upstream.new_zeros(())
    ignored = target == recipe.ignore_index
    return upstream.masked_fill(ignored, 0).view(*d_input.shape[:-1], 1)


def _give(
    name: str, gradients: tuple[Tensor | None, ...], needs: Needs, *anchors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The wanted gradients, closed to a second derivative; None for the others."""
    pairs = zip(gradients, needs, strict=True)
    return tuple(
        once(name, g, *anchors) if needed and g is not None else None for g, needed in pairs
    )


class HeadScalarLoss(torch.autograd.Function):
    """(loss (), 5 statistics (N,), 3 gradients) of the sum over rows, times `scale`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        o: HeadOptions
        *head, weight, row_weight, scale, o = arguments
        call = o.call(o.needs, wide=o.is_wide())
        loss, _, *rest = o.forward(LinearHead(*head), weight, row_weight, scale, call)
        total = loss.sum()
        return total if scale is None else total * scale, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input_, weight, bias, target, *_, options = inputs
        _, *stats, d_input, d_weight, d_bias = output
        origin, *others = (g for g in (d_input, d_weight, d_bias) if g is not None)
        mark_constant(ctx, *stats, *others, origin=origin)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(d_input, d_weight, d_bias, target)
        ctx.options = options
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (input_, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[0]
        if upstream is None:
            return (None,) * 10
        *gradients, target = saved_tensors(
            ctx, ctx.options.named(LINEAR_CROSS_ENTROPY), "'mean' or 'sum' loss"
        )
        options: HeadOptions = ctx.options
        origin = next(g for g in gradients if g is not None)
        given: list[Tensor | None] = []
        with torch.no_grad():
            # Ignored rows of d_input are zero already and are not read.
            pairs = zip(gradients, (target, None, None), options.needs, ctx.dtypes, strict=True)
            for g, rows, needed, dtype in pairs:
                if not needed:
                    given.append(None)
                    continue
                values = g.detach()
                matrix = values if values.dim() > 1 else values[None]
                multiply_rows_(matrix, rows, upstream, options.recipe.ignore_index)
                given.append(values.to(dtype) if options.is_wide() else values)
        closed = _give(
            options.named(LINEAR_CROSS_ENTROPY), tuple(given), options.needs, origin, upstream
        )
        return *closed, *(None,) * 7


class HeadRowLoss(Transformed):
    """(losses (N,), 5 statistics (N,), saved (N, 3), d_input) of each row, times its weight.

    Of the statistics the log-sum-exp is differentiable where the options ask for it.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        o: HeadOptions
        *head, weight, row_weight, o = arguments
        call = o.call(Needs(input=o.is_scaled()), wide=o.is_wide(), saved=not o.is_scaled())
        loss, saved, *stats, d_input, _, _ = o.forward(
            LinearHead(*head), weight, row_weight, None, call
        )
        return loss, *stats, saved, d_input

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, options = inputs
        _, log_prob, entropy, lse, is_top1, argmax, saved, d_input = output
        scaled = options.is_scaled()
        origin, other = (d_input, saved) if scaled else (saved, d_input)
        constants = (log_prob, entropy, None if options.of_lse else lse, is_top1, argmax)
        mark_constant(ctx, *constants, other, origin=origin)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.dtype = options, tensors[0].dtype
        target = tensors[3]
        kept = (None, None, None, target, *(None,) * 4) if scaled else tensors
        ctx.save_for_backward(*kept, saved, d_input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_lse = grads[0], grads[3] if ctx.options.of_lse else None
        if of_loss is None and of_lse is None:
            return (None,) * 9
        *tensors, weight, row_weight, saved, d_input = ctx.saved_tensors
        o: HeadOptions = ctx.options
        gradients: tuple[Tensor | None, ...]
        with torch.no_grad():
            if o.is_scaled() and of_loss is not None:
                by_row = _of_kept_rows(of_loss, tensors[3], o.recipe, d_input)
                gradients = ((d_input * by_row).to(ctx.dtype), None, None)
            else:
                r = loss_upstream(of_loss, row_weight, saved)
                upstream = Upstream(contiguous(of_lse))
                gradients = o.backward(
                    LinearHead(*tensors), saved, weight, r, upstream, o.call(o.needs)
                )
        origin = d_input if o.is_scaled() else saved
        given = _give(o.named(LINEAR_CROSS_ENTROPY), gradients, o.needs, origin, of_loss, of_lse)
        return *given, *(None,) * 6


class HeadStatistics(Transformed):
    """(5 statistics, saved) of every row; the first three statistics are differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        o: HeadOptions
        *head, o = arguments
        call = o.call(Needs(), saved=True)
        _, saved, *stats, _, _, _ = o.forward(LinearHead(*head), None, None, None, call)
        return *stats, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, options = inputs
        _, entropy, _, is_top1, argmax, saved = output
        mark_constant(ctx, is_top1, argmax, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*tensors, saved, entropy)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[:3]
        if all(gradient is None for gradient in upstream):
            return (None,) * 7
        *tensors, saved, entropy = ctx.saved_tensors
        o: HeadOptions = ctx.options
        with torch.no_grad():
            r, rest = row_upstream(upstream, saved, entropy)
            gradients = o.backward(LinearHead(*tensors), saved, None, r, rest, o.call(o.needs))
        given = _give(o.named(LINEAR_LOG_PROBS), gradients, o.needs, saved, *upstream)
        return *given, *(None,) * 4

"""How the linear head meets autograd, by when the upstream gradient is known.

`HeadScalarLoss`: gradients in forward, three matmuls; in backward they are multiplied by the
upstream factor, which for a plain `loss.backward()` is 1 and costs nothing; `HeadOwnLoss`: the same
of gradients that a loss of the caller's has given. `HeadRowLoss`: one
loss a row; in backward the logits are computed again, or, where only `input` requires grad, its
gradient from forward is multiplied row by row. `HeadStatistics`: log-probability, entropy and
log-sum-exp of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.head import operators
from sgp.head.calls import Gradients, HeadCall, LinearHead, Needs
from sgp.head.chunks import MOST, SCALED_ELEMENTS, UNSET
from sgp.head.problem import Pieces, compute_dtype
from sgp.head.teachers import NO_TEACHERS, Teachers
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
from sgp.rows.operations import ONE_DEVICE, RowOperations
from sgp.rows.operators import multiply_rows_
from sgp.rows.problem import Problem
from sgp.rows.recipe import Recipe
from sgp.rows.watched import is_traced
from sgp.selection import Selection

LINEAR_CROSS_ENTROPY = "sgp.linear_cross_entropy"
LINEAR_LOG_PROBS = "sgp.linear_token_log_probs"
LINEAR_LOSS = "sgp.linear_loss"


class HeadOptions(NamedTuple):
    """What is no input of the graph; with methods and no properties, as `Problem`."""

    call: HeadCall  # of a pass that makes every gradient that is needed
    of_lse: bool = False  # whether the log-sum-exp of HeadRowLoss is differentiable
    operations: RowOperations | None = None  # None: whole rows, by the operators
    may_hold: bool = False  # whether logits may wait for the backward
    into: Tensor | None = None  # what the weight's gradient is added to
    parameter: Tensor | None = None  # whose gradient that is; the head's weight may be part of it
    teachers: Teachers = NO_TEACHERS

    def forward(
        self,
        call: HeadCall,
        head: LinearHead,
        weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[tuple[Any, ...], Tensor | None]:
        """The operator's outputs, or those of what it calls, with other row operations or held."""
        may_hold = self.may_hold and call.late
        if self.operations is None and not may_hold:
            if call.divergence.is_on():
                rest = (self.teachers, row_weight, scale, call)
                return operators.distilled_forward(head, *rest), None
            return operators.head_forward(head, weight, row_weight, scale, call), None
        return operators.forward(
            self._rows(), head, self.teachers, weight, row_weight, scale, call, may_hold=may_hold
        )

    def backward(
        self,
        held: Tensor | None,
        head: LinearHead,
        saved: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        upstream: Upstream,
    ) -> Gradients:
        """The same of the backward, of all gradients; `held` is used up."""
        call = self.call
        if self.operations is None and self.into is None and held is None:
            if call.divergence.is_on():
                rest = (self.teachers, saved, row_weight, call)
                return Gradients(*operators.distilled_backward(head, *rest))
            rows = (saved, weight, row_weight, upstream)
            return Gradients(*operators.head_backward(head, *rows, call))
        found = operators.backward(
            self._rows(), head, self.teachers, saved, weight, row_weight, upstream, call, held=held,
            into=self.into,
        )  # fmt: skip
        if self.into is None:
            return found
        return found._replace(weight=self._told_to_megatron(head.weight, self.into))

    def _told_to_megatron(self, weight: Tensor, into: Tensor) -> Tensor | None:
        """What autograd gets for a weight whose gradient has been added: nothing.

        Megatron's hooks add a `.grad` to `main_grad` unless `grad_added_to_main_grad` is set, and
        where they overlap the reduction they ask for some `.grad`: such a weight gets zeros.
        """
        main = getattr(self.parameter, "main_grad", None)
        if main is None or not hasattr(self.parameter, "grad_added_to_main_grad"):
            return None
        if main.data_ptr() != into.data_ptr():
            return None
        self.parameter.grad_added_to_main_grad = True  # type: ignore[union-attr]
        return weight.new_zeros(()).expand(weight.shape)

    def without_teachers(self) -> HeadOptions:
        """Without the tensors, which autograd saves."""
        return self._replace(teachers=self.teachers.emptied())

    def with_teachers(self, tensors: Sequence[Tensor | None]) -> HeadOptions:
        """With them again."""
        return self._replace(teachers=self.teachers.again(tensors))

    def _rows(self) -> RowOperations:
        return self.operations or ONE_DEVICE

    def losses(self, *, saved: bool = False) -> HeadCall:
        """A pass without gradients, and what a backward needs where asked."""
        wanted = self.call.wanted
        if saved:
            wanted = wanted._replace(grad=False, saved=True)
        return self.call._replace(needs=Needs(), wanted=wanted)

    def early(self) -> HeadCall:
        """A pass that makes gradients which wait for an upstream factor, float16's in float32."""
        wide = self.call.compute_dtype == torch.float16
        return self.call._replace(wide=wide)

    def in_backward(self) -> HeadOptions:
        """The same of a call whose gradients are made in backward, if it has any."""
        scaled = self.is_scaled()
        late = any(self.call.needs) and not scaled
        return self._replace(call=self.call._replace(late=late, scaled=scaled))

    def must_be_late(self) -> bool:
        """Whether even a sum's gradients have to be made in backward.

        A caller's tensor is added to when the upstream factor is known; and float16 gradients that
        wait for it in float32 would break a budget.
        """
        half = self.call.compute_dtype == torch.float16 and self.call.needs.weight
        return self.into is not None or (half and self.call.memory_budget != UNSET)

    def named(self, single: str) -> str:
        """The function that was called, for messages; `single` on one device."""
        if self.call.divergence.is_on():
            return self.call.name
        return single if self.operations is None else self.operations.name

    def is_scaled(self) -> bool:
        """Whether rows of d_input wait for one upstream factor each: all that HeadRowLoss needs."""
        return self.call.needs == Needs(input=True) and not self.of_lse


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
    pieces: Pieces,
    wanted: Wanted,
    operations: RowOperations | None = None,
    *,
    name: str,
) -> HeadOptions:
    """What this call computes, in which dtype, and in which pieces."""

    def needed(x: Tensor | None) -> bool:
        return x is not None and x.requires_grad and torch.is_grad_enabled()

    needs = Needs(*map(needed, head[:3]))
    budget = min(pieces.memory_budget or UNSET, MOST)
    into = pieces.accumulate_into if needs.weight else None
    call = HeadCall(
        recipe=recipe,
        compute_dtype=compute_dtype(head.input),
        chunk_rows=min(pieces.chunk_rows or UNSET, MOST),
        needs=needs,
        wanted=wanted,
        memory_budget=budget,
        planned=needs,
        into=into is not None,
        name=name,
    )
    may_hold = budget != UNSET and any(needs) and not is_traced(*head)
    return HeadOptions(call, False, operations, may_hold, into, pieces.weight)


def _where_there(x: Tensor | None) -> tuple[Tensor, ...]:
    """An output, and none that is None, which torch.compile would not take."""
    return () if x is None else (x,)


def _held(ctx: Any, held: tuple[Tensor, ...], *upstream: Tensor | None) -> Tensor | None:
    """The logits that were held, for the first backward; later ones make them again."""
    if not held or getattr(ctx, "has_used_held", False) or is_traced(*upstream):
        return None
    ctx.has_used_held = True
    return held[0].data  # written over, unnoticed by autograd


def _times_rows(
    d_input: Tensor, upstream: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """D_input (..., D) times an upstream gradient a row (N,), in `dtype`; a few rows at a time.

    Ignored rows stay +0. `d_input` is left as it is, for another backward.
    """
    of_rows = upstream.masked_fill(target == ignore_index, 0)[:, None]
    if is_traced(d_input, upstream):
        return (d_input * of_rows.view(*d_input.shape[:-1], 1)).to(dtype)
    out = torch.empty_like(d_input, dtype=dtype)
    if out.numel():
        flat, D = out.view(-1, out.shape[-1]), out.shape[-1]
        step = max(1, SCALED_ELEMENTS // D)
        triples = zip(flat.split(step), d_input.view(-1, D).split(step), of_rows.split(step),
                      strict=True)  # fmt: skip
        for place, rows, factors in triples:
            place.copy_(rows.to(factors.dtype, copy=True).mul_(factors))
    return out


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
        (loss, _, *rest), _ = o.forward(o.early(), LinearHead(*head), weight, row_weight, scale)
        total = loss.sum()
        return total if scale is None else total * scale, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *stats, d_input, d_weight, d_bias = output
        gradients = Gradients(d_input, d_weight, d_bias)
        _wait(ctx, inputs[:3], inputs[3], gradients, inputs[-1], stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 10
        name, what = ctx.options.named(LINEAR_CROSS_ENTROPY), "'mean' or 'sum' loss"
        return *_times_upstream(ctx, grads[0], name, what)[0], *(None,) * 7


class HeadOwnLoss(torch.autograd.Function):
    """(loss (), 3 gradients) of a loss of the caller's, which have been made.

    Its last inputs are the numbers () of which it is the sum, where they have a graph.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        computed: Computed = arguments[4]
        return computed.loss, *computed.gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _wait(ctx, inputs[:3], inputs[3], Gradients(*output[1:]), inputs[5], ())
        ctx.num_sums = len(inputs) - 6

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        num_sums: int = ctx.num_sums
        upstream = grads[0]
        if upstream is None:
            return (None,) * (6 + num_sums)
        name = ctx.options.named(LINEAR_LOSS)
        found, origin = _times_upstream(ctx, upstream, name, "loss")
        of_sum: Tensor = once(name, upstream, origin, upstream)
        return *found, *(None,) * 3, *(of_sum,) * num_sums


class Computed(NamedTuple):
    """A loss and its gradients; no tensor to autograd."""

    loss: Tensor
    gradients: Gradients


def _wait(
    ctx: Any,
    head: Sequence[Tensor | None],
    target: Tensor,
    gradients: Gradients,
    options: HeadOptions,
    constants: Sequence[Tensor | None],
) -> None:
    """Keep gradients that were made with the loss until its upstream factor is known."""
    origin, *others = (g for g in gradients if g is not None)
    mark_constant(ctx, *constants, *others, origin=origin)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients, target)
    ctx.options = options.without_teachers()
    ctx.dtypes = tuple(None if x is None else x.dtype for x in head)


def _times_upstream(
    ctx: Any, upstream: Tensor, name: str, what: str
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradients of the head times the factor, in place, once only; and the anchor of `once`."""
    *gradients, target = saved_tensors(ctx, name, what)
    options: HeadOptions = ctx.options
    origin = next(g for g in gradients if g is not None)
    given: list[Tensor | None] = []
    with torch.no_grad():
        # Ignored rows of d_input are zero already and are not read.
        needs = options.call.needs
        pairs = zip(gradients, (target, None, None), needs, ctx.dtypes, strict=True)
        for g, rows, needed, dtype in pairs:
            if not needed:
                given.append(None)
                continue
            values = g.detach()
            matrix = values if values.dim() > 1 else values[None]
            multiply_rows_(matrix, rows, upstream, options.call.recipe.ignore_index)
            given.append(values.to(dtype))
    return _give(name, tuple(given), needs, origin, upstream), origin


class HeadRowLoss(Transformed):
    """(losses (N,), 5 statistics (N,), saved, d_input, held) of each row, times its weight.

    Of the statistics the log-sum-exp is differentiable where the options ask for it.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        o: HeadOptions
        *head, weight, row_weight, o = arguments
        call = o.early() if o.is_scaled() else o.losses(saved=True)
        (loss, saved, *stats, d_input, _, _), held = o.forward(
            call, LinearHead(*head), weight, row_weight
        )
        return loss, *stats, saved, d_input, *_where_there(held)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, options = inputs
        _, log_prob, entropy, lse, is_top1, argmax, saved, d_input, *held = output
        scaled = options.is_scaled()
        origin, other = (d_input, saved) if scaled else (saved, d_input)
        constants = (log_prob, entropy, None if options.of_lse else lse, is_top1, argmax, *held)
        mark_constant(ctx, *constants, other, origin=origin)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.dtype = options.without_teachers(), tensors[0].dtype
        target = tensors[3]
        kept = (None, None, None, target, *(None,) * 4) if scaled else tensors
        teachers = [] if scaled else options.teachers.tensors()
        ctx.num_held = len(held)
        ctx.save_for_backward(*kept, saved, d_input, *held, *teachers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, of_lse = grads[0], grads[3] if ctx.options.of_lse else None
        if of_loss is None and of_lse is None:
            return (None,) * 9
        kept = ctx.saved_tensors  # once: a checkpoint unpacks no tensor twice
        *tensors, weight, row_weight, saved, d_input = kept[:10]
        o: HeadOptions = ctx.options
        needs = o.call.needs
        gradients: tuple[Tensor | None, ...]
        with torch.no_grad():
            if o.is_scaled() and of_loss is not None:
                ignored = o.call.recipe.ignore_index
                of_input = _times_rows(d_input, of_loss, tensors[3], ignored, ctx.dtype)
                gradients = (of_input, None, None)
            else:
                r = loss_upstream(of_loss, row_weight, saved)
                upstream = Upstream(contiguous(of_lse))
                held, teachers = kept[10 : 10 + ctx.num_held], kept[10 + ctx.num_held :]
                gradients = o.with_teachers(teachers).backward(
                    _held(ctx, held, of_loss, of_lse), LinearHead(*tensors), saved, weight, r,
                    upstream,
                )  # fmt: skip
        origin = d_input if o.is_scaled() else saved
        given = _give(o.named(LINEAR_CROSS_ENTROPY), gradients, needs, origin, of_loss, of_lse)
        return *given, *(None,) * 6


class HeadStatistics(Transformed):
    """(5 statistics, saved, held) of every row; the first three are differentiable."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        o: HeadOptions
        *head, o = arguments
        (_, saved, *stats, _, _, _), held = o.forward(o.losses(saved=True), LinearHead(*head))
        return *stats, saved, *_where_there(held)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, options = inputs
        _, entropy, _, is_top1, argmax, saved, *held = output
        mark_constant(ctx, is_top1, argmax, *held, origin=saved)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*tensors, saved, entropy, *held)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grads[:3]
        if all(gradient is None for gradient in upstream):
            return (None,) * 7
        kept = ctx.saved_tensors
        *tensors, saved, entropy = kept[:8]
        o: HeadOptions = ctx.options
        with torch.no_grad():
            r, rest = row_upstream(upstream, saved, entropy)
            gradients = o.backward(
                _held(ctx, kept[8:], *upstream), LinearHead(*tensors), saved, None, r, rest
            )
        given = _give(o.named(LINEAR_LOG_PROBS), gradients, o.call.needs, saved, *upstream)
        return *given, *(None,) * 4

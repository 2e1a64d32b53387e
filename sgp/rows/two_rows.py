"""A student's rows of logits beside a teacher's: operators, and how they meet autograd.

The functions of rows.autograd for a divergence; teachers are constants.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgp.rows import backend, two_by_torch
from sgp.rows.autograd import loss_upstream, mark_constant, once, saved_tensors
from sgp.rows.by_torch import RowOutputs, Wanted, new_outputs
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.operators import multiply_rows_
from sgp.rows.problem import check_targets
from sgp.rows.recipe import Recipe
from sgp.rows.two_by_torch import Whose
from sgp.rows.watched import operator

DISTILLATION = "sgp.distillation"


def implementation(logits: Tensor) -> ModuleType:
    """The module, two_by_triton or two_by_torch, that does these rows."""
    if backend.choose(logits.device, logits.dtype) == "triton":
        return _kernels()
    return two_by_torch


@functools.cache
def _kernels() -> ModuleType:
    """`two_by_triton`, which imports Triton, at first use."""
    from sgp.rows import two_by_triton  # noqa: PLC0415

    return two_by_triton


def of_same_columns(logits: Tensor, teachers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Both without the columns beyond the shortest, in dtypes that a kernel reads together."""
    V = min(x.shape[-1] for x in (logits, *teachers))
    narrow = logits.dtype != torch.float64
    return logits[..., :V], [
        (x.float() if narrow and x.dtype == torch.float64 else x)[..., :V] for x in teachers
    ]


def check_labels(
    name: str, target: Tensor, V: int, recipe: Recipe, divergence: Divergence, *, stats: bool
) -> None:
    """Raise IndexError for a target outside [0, V), where it matters and that can be seen."""
    if divergence.cross_entropy_weight or stats:
        check_targets(name, target, V, recipe.ignore_index)


@operator()
def two_rows_forward(
    logits: Tensor,
    teachers: list[Tensor],
    target: Tensor,
    index: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
    wanted: Wanted,
) -> RowOutputs:
    """Loss, saved statistics, reported statistics and gradient of every row, as RowOutputs.

    Args:
        logits: (..., V) of the student, any strides; leading dimensions flatten to N.
        teachers: one or more (..., V) of the same leading dimensions; V may differ.
        target: (N,) int64.
        index: (N,) int64, which teacher a row has; None with one.
        row_weight, scale, recipe, wanted: as in row_forward.
        divergence: how they are compared.
    """
    out = new_outputs(logits, target.numel(), wanted)
    x, theirs = of_same_columns(logits, teachers)
    V = x.shape[-1]
    check_labels(DISTILLATION, target, V, recipe, divergence, stats=wanted.stats)
    dlogits = None
    if out.dlogits is not None:
        dlogits = _cleared(out.dlogits, V)
    for number, teacher in enumerate(theirs):
        implementation(x).forward(
            x, teacher, dlogits, target, Whose(index, number), row_weight, scale, recipe,
            divergence, out,
        )  # fmt: skip
    return out


@two_rows_forward.register_fake
def _(logits: Tensor, teachers: list[Tensor], target: Tensor, *options: Any) -> RowOutputs:
    return new_outputs(logits, target.numel(), options[-1])


@operator()
def two_rows_backward(
    logits: Tensor,
    teachers: list[Tensor],
    target: Tensor,
    index: Tensor | None,
    saved: Tensor,
    row_weight: Tensor | None,
    recipe: Recipe,
    divergence: Divergence,
) -> Tensor:
    """The gradient (..., V) of every row from two_rows_forward's `saved`.

    Args:
        logits, teachers, target, index, recipe, divergence: as in two_rows_forward.
        saved: (N, SAVED) of two_rows_forward.
        row_weight: (N,) row weight times upstream gradient of the loss.
    """
    dlogits = logits.new_empty(logits.shape)
    x, theirs = of_same_columns(logits, teachers)
    for number, teacher in enumerate(theirs):
        implementation(x).backward(
            x, teacher, _cleared(dlogits, x.shape[-1]), target, Whose(index, number), saved,
            row_weight, recipe, divergence,
        )  # fmt: skip
    return dlogits


@two_rows_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _cleared(dlogits: Tensor, V: int) -> Tensor:
    """The first V columns of a gradient; those beyond are zeroed."""
    if dlogits.shape[-1] > V:
        dlogits[..., V:] = 0
    return dlogits[..., :V]


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
        if grads[0] is None:
            return (None,) * ctx.num_inputs
        origin, target = saved_tensors(ctx, DISTILLATION, "'mean' or 'sum' loss")
        dlogits = origin.detach()
        with torch.no_grad():
            multiply_rows_(dlogits, target, grads[0], ctx.ignore_index)
        gradient = once(DISTILLATION, dlogits, origin, grads[0])
        return gradient, *(None,) * (ctx.num_inputs - 1)


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
        if grads[0] is None:
            return (None,) * ctx.num_inputs
        logits, target, index, row_weight, saved, *teachers = ctx.saved_tensors
        with torch.no_grad():
            dlogits = two_rows_backward(
                logits, teachers, target, index, saved, loss_upstream(grads[0], row_weight, saved),
                ctx.recipe, ctx.divergence,
            )  # fmt: skip
        gradient = once(DISTILLATION, dlogits, saved, grads[0])
        return gradient, *(None,) * (ctx.num_inputs - 1)

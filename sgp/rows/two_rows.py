"""`torch.library` operators over a student's rows of logits and a teacher's, as in operators.py."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgp.rows import backend, two_by_torch
from sgp.rows.by_torch import RowOutputs, Wanted, new_outputs
from sgp.rows.divergence import Divergence
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
    if divergence.needs_label(stats=wanted.stats):
        check_targets(DISTILLATION, target, V, recipe.ignore_index)
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
def _(logits: Tensor, _: list[Tensor], target: Tensor, *options: Any) -> RowOutputs:
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

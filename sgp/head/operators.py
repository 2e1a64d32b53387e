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

from sgp.head import algorithm
from sgp.head.algorithm import OwnLoss, Statistics
from sgp.head.calls import Gradients, Head, HeadCall, LinearHead, new_gradients
from sgp.head.problem import is_autocast
from sgp.head.teachers import NO_TEACHERS, TeacherRows, Teachers
from sgp.labels import padded_rows
from sgp.rows.by_torch import NOTHING, Upstream, new_outputs
from sgp.rows.operations import ONE_DEVICE, RowOperations
from sgp.rows.problem import check_targets
from sgp.rows.units import Units
from sgp.rows.watched import operator

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
    operations: RowOperations,
    head: LinearHead,
    teachers: Teachers,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    call: HeadCall,
    *,
    may_hold: bool = False,
) -> tuple[RowsAndGradients, Tensor | None]:
    """`head_forward` by these row operations, and no operator; and the logits that are held.

    Where others hold columns too, all of them must call it alike; the head's weight and bias are
    one's own, its target and `weight` are of the whole vocabulary.
    """
    V = operations.vocabulary(call.classes or head.weight.shape[0])
    if not call.divergence.is_on() or call.divergence.needs_label(stats=call.wanted.stats):
        check_targets(call.name_of(operations), head.target, V, call.recipe.ignore_index)
    with _without_autocast(head.input):
        kept = _kept(head, teachers, weight, operations, call)
        out, gradients, held = algorithm.forward(kept, row_weight, scale, may_hold=may_hold)
    return (*out[:-1], *gradients), held


def backward(
    operations: RowOperations,
    head: LinearHead,
    teachers: Teachers,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    upstream: Upstream,
    call: HeadCall,
    *,
    held: Tensor | None = None,
    into: Tensor | None = None,
) -> Gradients:
    """`head_backward` by these row operations, as `forward`.

    `held` is what `forward` held and is used up; the weight's gradient is added to `into`.
    """
    kept = _kept(head, teachers, weight, operations, call)._replace(into=into)
    with _without_autocast(head.input):
        return algorithm.backward(kept, saved, row_weight, upstream, held)


def with_loss(
    operations: RowOperations, head: LinearHead, call: HeadCall, units: Units, loss: OwnLoss
) -> tuple[Statistics, Gradients]:
    """The statistics of every row (N,), and the gradients for a loss of the caller's.

    By these row operations and no operator: its lines are no tensor. As `forward` otherwise.
    """
    V = operations.vocabulary(head.weight.shape[0])
    check_targets(operations.name, head.target, V, call.recipe.ignore_index)
    with _without_autocast(head.input):
        out, gradients = algorithm.with_loss(
            _kept(head, NO_TEACHERS, None, operations, call), units, loss
        )
    assert out.statistics is not None, "they are made"  # noqa: S101
    return out.statistics, gradients


def _kept(
    head: LinearHead,
    teachers: Teachers,
    weight: Tensor | None,
    operations: RowOperations,
    call: HeadCall,
) -> Head:
    """The head without the padding of its rows, whose number is read here."""
    rows = head.rows[: int(head.num_kept)]
    if teachers.are_there():
        operations = TeacherRows(
            operations, teachers, call.divergence, call.teacher_ends, call.teacher_dtype
        )
    of_head, padding = head[:4], 0
    if call.classes:
        padding = len(head.weight) - call.classes
        bias = None if head.bias is None else head.bias[: call.classes]
        of_head = (head.input, head.weight[: call.classes], bias, head.target)
    return Head(*of_head, rows, weight, operations, call, teachers=teachers, padding=padding)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Off where it is on; else nothing, which costs nothing."""
    if not is_autocast(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@operator(tags=TAGS)
def head_forward(
    head: LinearHead,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    call: HeadCall,
) -> RowsAndGradients:
    """Loss, saved and reported statistics of every row, and the gradients of their weighted sum.

    Args:
        head: what is multiplied with what.
        weight, row_weight, scale: as in row_forward.
        call: everything else; gradients that it does not need are None, and empty from the
            operator, as are outputs that it does not want.
    """
    return forward(ONE_DEVICE, head, NO_TEACHERS, weight, row_weight, scale, call)[0]


@operator(tags=TAGS)
def distilled_forward(
    head: LinearHead,
    teachers: Teachers,
    row_weight: Tensor | None,
    scale: Tensor | None,
    call: HeadCall,
) -> RowsAndGradients:
    """`head_forward` of a call with a divergence, and what its logits are compared with."""
    return forward(ONE_DEVICE, head, teachers, None, row_weight, scale, call)[0]


@head_forward.register_fake
@distilled_forward.register_fake
def _(head: LinearHead, *others: Any) -> RowsAndGradients:
    call: HeadCall = others[-1]
    out = new_outputs(head.input, head.target.numel(), call.wanted)
    return *out[:-1], *new_gradients(head, call)


@operator(tags=TAGS)
def head_backward(
    head: LinearHead,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    upstream: Upstream,
    call: HeadCall,
) -> Gradients:
    """The gradients of a head for an upstream gradient a row; its logits are computed again.

    Arguments as in head_forward and row_backward.
    """
    return backward(ONE_DEVICE, head, NO_TEACHERS, saved, weight, row_weight, upstream, call)


@operator(tags=TAGS)
def distilled_backward(
    head: LinearHead,
    teachers: Teachers,
    saved: Tensor,
    row_weight: Tensor | None,
    call: HeadCall,
) -> Gradients:
    """`head_backward` of a call with a divergence."""
    return backward(ONE_DEVICE, head, teachers, saved, None, row_weight, NOTHING, call)


@head_backward.register_fake
@distilled_backward.register_fake
def _(head: LinearHead, *others: Any) -> Gradients:
    return new_gradients(head, others[-1])

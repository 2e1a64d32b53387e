"""`distillation` and `linear_distillation` over a vocabulary that is split for both models."""

from __future__ import annotations

import torch
from torch import Tensor

from sgp.head.autograd import head_options
from sgp.head.problem import Pieces, is_autocast
from sgp.linear import head_loss
from sgp.linear_distilling import teachers_of
from sgp.losses import token_statistics
from sgp.parallel.autograd import DivergenceCall, ShardDivergence
from sgp.parallel.problem import (
    agree_on_head,
    agree_on_logits,
    agree_on_teacher,
    head_problem,
    logits_problem,
)
from sgp.parallel.rows import ShardRows
from sgp.parallel.shard import Group, sampled
from sgp.reference import TokenLogProbs
from sgp.rows.autograd import apply
from sgp.rows.by_torch import Wanted
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.divisor import as_mean
from sgp.rows.problem import check_flags
from sgp.rows.recipe import Recipe, shown
from sgp.rows.reduction import check_reduction, reduce_rows
from sgp.rows.teachers import teacher_logits
from sgp.rows.watched import not_compiled
from sgp.selection import Selection


@not_compiled
def distillation(
    local_logits: Tensor,
    local_teacher: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    shift: bool | int = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """`sgp.distillation` of logits whose vocabularies are split over the ranks of a group.

    Example:
        >>> # under torchrun, with heads of V / P rows on each of P ranks
        >>> loss = sgp.parallel.distillation(                       # doctest: +SKIP
        ...     hidden @ local_head.T, large @ local_large_head.T, labels)

    Args:
        local_logits, target, group, vocab_size: as in `cross_entropy`.
        local_teacher: this rank's columns of the teacher's logits: the same classes as those of
            `local_logits`, but for padding behind the last class. One teacher.
        divergence, beta, temperature, cross_entropy_weight, ignore_index, reduction, token_weight,
            denominator, softcap, logit_scale, teacher_softcap, teacher_logit_scale, shift,
            return_stats: as in `sgp.distillation`.

    Returns:
        As `sgp.distillation`, the same bits on every rank. The gradient is computed in backward,
        which needs no exchange.

    Exchanged: 192 bytes a call, and 40 bytes a kept row (4 more where the label matters, 8 more for
    a "jsd", in a second all-gather; twice as many for float64).

    Raises:
        As `cross_entropy`, and as `sgp.distillation` for its arguments; ValueError on every rank
        where a rank holds other classes of one model than of the other.
    """
    name = "sgp.parallel.distillation"
    check_flags(name, return_stats=return_stats)
    recipe, options = _constants(
        name, divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale,
        ignore_index, softcap, logit_scale, temperature,
    )  # fmt: skip
    denominator = check_reduction(name, reduction, denominator)
    problem = logits_problem(name, local_logits, target, token_weight, recipe, shift)
    _check_one_teacher(name, "local_teacher", local_teacher)
    teacher = teacher_logits(name, "local_teacher", local_teacher, local_logits, target, part=True)
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(name, problem, denominator)
    asked = (reduction, return_stats, options)
    shard, rows = agree_on_logits(name, group, problem, target, vocab_size, scale, asked)
    shard = agree_on_teacher(
        name, group, shard, problem, len(rows), (teacher, -1), sampled(teacher, rows), vocab_size
    )
    call = DivergenceCall(shard, problem.recipe, options, return_stats)
    out: tuple[Tensor, ...] = apply(
        ShardDivergence, problem.input, teacher, problem.target, rows, problem.token_weight, call
    )
    loss = shard.checked(reduce_rows(problem, out[0], reduction, scale))
    if not return_stats:
        return loss
    return loss, token_statistics(problem, out[1:6], need_argmax=False)


@not_compiled
def linear_distillation(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    local_weight: Tensor,
    target: Tensor | Selection,
    teacher_input: Tensor,
    local_teacher_weight: Tensor,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    shift: bool | int = False,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """`sgp.linear_distillation` with heads whose rows are split over the ranks of a group.

    Example:
        >>> # under torchrun, with heads of V / P rows on each of P ranks
        >>> loss = sgp.parallel.linear_distillation(                # doctest: +SKIP
        ...     hidden, local_head, labels, large, local_large_head, shift=True)

    Args:
        input, local_weight, target, group, vocab_size, sum_input_grad, linear_bias: as in
            `linear_cross_entropy`.
        teacher_input: the teacher's hidden states (..., D_t), the same on every rank. One teacher.
        local_teacher_weight: this rank's rows of its head (V_r, D_t): the same classes as those of
            `local_weight`, but for padding behind the last class.
        teacher_bias: this rank's part (V_r,) or None.
        chunk_rows, memory_budget: as in `linear_cross_entropy`, of both models' logits.
        divergence, beta, temperature, cross_entropy_weight, ignore_index, reduction, token_weight,
            denominator, softcap, logit_scale, teacher_softcap, teacher_logit_scale, shift,
            return_stats: as in `sgp.linear_distillation`.

    Returns:
        As `sgp.linear_distillation`, the same bits on every rank. Exchanged: what `distillation`
        does for each kept row, and the gradient of `input` as by `linear_cross_entropy`.

    Raises:
        As `distillation` and `linear_cross_entropy`.
    """
    name = "sgp.parallel.linear_distillation"
    check_flags(name, sum_input_grad=sum_input_grad, return_stats=return_stats)
    recipe, options = _constants(
        name, divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale,
        ignore_index, softcap, logit_scale, temperature,
    )  # fmt: skip
    denominator = check_reduction(name, reduction, denominator)
    pieces = Pieces(chunk_rows, memory_budget)
    problem, head = head_problem(
        name, input, local_weight, linear_bias, target, token_weight, recipe, pieces, shift
    )
    _check_one_teacher(name, "teacher_input", teacher_input)
    teachers = teachers_of(
        name, input, teacher_input, local_teacher_weight, teacher_bias, part=True
    )
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(name, problem, denominator)
    asked = (reduction, return_stats, *pieces.asked(), sum_input_grad, options)
    shard, head = agree_on_head(
        name, group, problem, head, vocab_size, scale, asked, sums_input_grad=sum_input_grad
    )
    weight = teachers.weights[0]
    shard = agree_on_teacher(
        name, group, shard, problem, int(head.num_kept), (weight, 0), sampled(weight), vocab_size
    )
    classes = shard.size if shard.size < len(head.weight) else 0
    wanted = Wanted(stats=return_stats, width=SAVED)
    chosen = head_options(problem.recipe, head, pieces, wanted, ShardRows(shard), name=name)
    dtype = torch.get_autocast_dtype(input.device.type) if is_autocast(input) else None
    call = chosen.call._replace(divergence=options, classes=classes, teacher_dtype=dtype)
    chosen = chosen._replace(call=call, teachers=teachers, may_hold=False)
    result = head_loss(problem, head, scale, chosen, reduction)
    if isinstance(result, Tensor):
        return shard.checked(result)
    return shard.checked(result[0]), result[1]


def _constants(
    name: str,
    divergence: str,
    beta: float,
    cross_entropy_weight: float,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    ignore_index: int | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> tuple[Recipe, Divergence]:
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    options = Divergence(
        divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale
    )
    return recipe, options.check(name)


def _check_one_teacher(name: str, label: str, teacher: object) -> None:
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"{name}: {label} = {shown(teacher)}; expected one teacher's tensor: an sgp.TopK and "
            "several teachers need the whole vocabulary on each rank"
        )

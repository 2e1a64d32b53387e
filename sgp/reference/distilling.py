"""The definitions of the losses of a student and its teachers.

For a kept row with the student's scored logits s, the teacher's t and a temperature T, over the
first V columns, which both have::

    p = softmax(s / T)   q = softmax(t / T)   m = beta q + (1 - beta) p      0 log 0 = 0
    forward_kl = sum q (log q - log p)
    reverse_kl = sum p (log p - log q)
    jsd        = beta sum q (log q - log m) + (1 - beta) sum p (log p - log m)
    loss       = r (divergence + weight of the cross-entropy * -log softmax(s)[target])
    mean       = sum(loss) / sum(r)                                          nothing times T^2

Of an `sgp.TopK` q has k + 1 entries, of which the last is max(2^-24, 1 - the others), over their
sum (2^-53 of log-probabilities in float64);
p's are the student's probabilities of the same tokens and of all others together. A row that lists
all V tokens has no last entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp.labels import tokens_ahead
from sgp.reference.losses import TokenLogProbs, token_log_probs
from sgp.reference.steps import head_logits, reduce_kept, scatter_kept, score, select
from sgp.rows.divergence import Divergence
from sgp.rows.problem import (
    INTEGERS,
    check_flags,
    check_mean_weights,
    check_targets,
    make_problem,
)
from sgp.rows.recipe import Recipe, accumulation_dtype
from sgp.rows.reduction import check_reduction
from sgp.rows.teachers import (
    Teacher,
    index_of_teachers,
    named_teachers,
    refuse_with_top_k,
    teacher_heads,
    teacher_logits,
)
from sgp.rows.top_k import TopK, rest_of
from sgp.selection import Selection


def distillation(
    input: Tensor,  # noqa: A002
    teacher: Teacher,
    target: Tensor | Selection,
    *,
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
    teacher_index: Tensor | None = None,
    shift: bool | int = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """The definition of `sgp.distillation`.

    Example:
        >>> student = torch.tensor([[0.5, 0.5]]).log()
        >>> teacher = torch.tensor([[0.8, 0.2]]).log()
        >>> distillation(student, teacher, torch.tensor([0]))    # 0.8 log 1.6 + 0.2 log 0.4
        tensor(0.1927)
    """
    name = "sgp.reference.distillation"
    check_flags(name, return_stats=return_stats)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    options = Divergence(
        divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale
    ).check(name)
    of_teacher = options.of_teacher(recipe)
    problem = make_problem(name, input, target, None, token_weight, recipe, shift=shift)
    if problem.has_probabilities():
        raise TypeError(f"{name}: target is {problem.target.dtype}; expected class indices")
    denominator = check_reduction(name, reduction, denominator)
    given = named_teachers(name, "teacher", teacher)
    logits = problem.input.reshape(-1, problem.input.shape[-1])
    kept = (problem.target != ignore).nonzero().squeeze(1)
    if isinstance(given, TopK):
        refuse_with_top_k(name, of_teacher, teacher_index)
        given.check_rows(name, "teacher", len(kept))
        V = logits.shape[-1]
        given.check_vocabulary(name, V)
    else:
        given_rows = (teacher_logits(name, *item, input, target) for item in given.items())
        rows = [x.flatten(0, -2) for x in given_rows]
        V = min(x.shape[-1] for x in (logits, *rows))
        index = index_of_teachers(name, "teacher", teacher, teacher_index, target, problem, shift)
        of_row = torch.zeros_like(kept) if index is None else index[kept]
    logits, y = logits[kept][:, :V], problem.target[kept]
    s = score(logits, recipe)
    log_p = F.log_softmax(s / float(temperature), -1)
    if isinstance(given, TopK):
        losses = divergence_of(*_buckets(given, log_p), options)
    else:
        chosen = s.new_empty(s.shape)
        for number, all_rows in enumerate(rows):
            mine = of_row == number
            chosen[mine] = all_rows[kept[mine], :V].to(s.dtype)
        log_q = F.log_softmax(score(chosen, of_teacher) / float(temperature), -1)
        losses = divergence_of(log_p, log_q, options)
    if options.cross_entropy_weight or return_stats:
        check_targets(name, problem.target, V, ignore)
    if options.cross_entropy_weight:
        losses = losses + options.cross_entropy_weight * F.cross_entropy(s, y, reduction="none")
    r = torch.ones_like(losses)
    if problem.token_weight is not None:
        if reduction == "mean" and denominator is None:
            scored = torch.zeros_like(problem.token_weight, dtype=torch.bool)
            check_mean_weights(name, scored.index_fill(0, kept, True), problem.token_weight)
        r = problem.token_weight[kept].to(losses.dtype)
    loss = reduce_kept(problem, kept, r * losses, r, reduction, denominator)
    if not return_stats:
        return loss
    found = token_log_probs(
        logits.detach(), y, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    stats = (scatter_kept(problem, kept, x).view(problem.shape) for x in found if x is not None)
    return loss, TokenLogProbs(*stats)


def linear_distillation(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor | Selection,
    teacher_input: Teacher,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    shift: bool | int = False,
    ignore_index: int | None = -100,
    token_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    return_stats: bool = False,
    **loss: Any,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """`distillation` of both models' `hidden @ weight.T + bias`, on the kept rows.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> wide, teachers_head = torch.randn(2, 5, 16), torch.randn(11, 16)
        >>> labels = torch.randint(11, (2, 5))
        >>> linear_distillation(hidden, head, labels, wide, teachers_head, shift=True).shape
        torch.Size([])
    """
    name = "sgp.reference.linear_distillation"
    Divergence("forward_kl", cross_entropy_weight=cross_entropy_weight).check(name)
    check_flags(name, return_stats=return_stats)
    ignore = Recipe(-100 if ignore_index is None else ignore_index).check(name).ignore_index
    labels = target
    needs_label = cross_entropy_weight or return_stats
    if isinstance(target, Tensor) and target.dtype in INTEGERS and not needs_label:
        # Any label that is not ignored will do, also one that no Selection takes.
        labels, ignore = torch.where(target.long() == ignore, -100, 0), -100
    selection = select(name, input, labels, ignore, shift, token_weight)
    logits = head_logits(name, input, linear_weight, linear_bias, selection)
    teachers: Teacher
    if isinstance(teacher_input, TopK):
        for label, value in (("teacher_weight", teacher_weight), ("teacher_bias", teacher_bias)):
            if value is not None:
                raise ValueError(
                    f"{name}: {label} together with an sgp.TopK, which has the teacher's "
                    "log-probabilities; leave it out"
                )
        teachers = teacher_input
    else:
        named_teachers(name, "teacher_input", teacher_input)
        heads = teacher_heads(name, input, teacher_input, teacher_weight, teacher_bias)
        dtype = accumulation_dtype(input.dtype)
        made = [head_logits(name, *x, selection, dtype, names) for names, x in heads]
        teachers = made if isinstance(teacher_input, (list, tuple)) else made[0]
    if isinstance(target, Tensor) and isinstance(teacher_index, Tensor):
        ahead = tokens_ahead(name, shift, input.shape[-2] if input.dim() > 1 else 0)
        if teacher_index.numel() == target.numel():  # else refused below
            teacher_index = teacher_index.reshape(-1).roll(-ahead)
    result = distillation(
        logits, teachers, selection, teacher_index=teacher_index,
        cross_entropy_weight=cross_entropy_weight, return_stats=return_stats, **loss,
    )  # fmt: skip
    value, stats = result if isinstance(result, tuple) else (result, None)
    value = value.reshape(target.shape) if loss.get("reduction") == "none" else value
    if stats is None:
        return value
    return value, TokenLogProbs(*(x.reshape(target.shape) for x in stats if x is not None))


def divergence_of(log_p: Tensor, log_q: Tensor, options: Divergence) -> Tensor:
    """(M,) divergences of log-probabilities (M, V) of the student and of the teacher."""
    p, q, beta = log_p.exp(), log_q.exp(), options.beta
    if options.kind == "forward_kl":
        return _relative_entropy(q, log_q, log_p)
    if options.kind == "reverse_kl":
        return _relative_entropy(p, log_p, log_q)
    m = beta * q + (1 - beta) * p
    log_m = m.masked_fill(m == 0, 1).log()
    of_teacher, of_student = (_relative_entropy(x, lx, log_m) for x, lx in ((q, log_q), (p, log_p)))
    return beta * of_teacher + (1 - beta) * of_student


def _relative_entropy(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """The sum of a (log a - log b), where 0 log 0 is 0, in the gradient too."""
    none = a == 0
    return (a * (log_a.masked_fill(none, 0) - log_b.masked_fill(none, 0))).sum(-1)


def _buckets(teacher: TopK, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """(M, k + 1) log-probabilities of the student and the teacher: the tokens, and the rest."""
    indices, log_q, valid = teacher.padded()
    left, log_q = rest_of(log_q, log_p.dtype).to(log_p.dtype), log_q.to(log_p.dtype)
    valid = torch.ones_like(log_q, dtype=torch.bool) if valid is None else valid
    listed = torch.zeros_like(log_p, dtype=torch.int64).scatter_add(1, indices, valid.long()) > 0
    others = torch.where(listed, -math.inf, log_p)
    some = ~listed.all(1, keepdim=True)
    rest = torch.where(some, others, 0).logsumexp(1, keepdim=True)
    of_student = torch.where(valid, log_p.gather(1, indices), -math.inf)
    mass = log_q.exp().sum(1, keepdim=True)
    tail = torch.where(some, left, 0)
    of_teacher = torch.cat([log_q, tail.log()], 1) - (mass + tail).log()
    return torch.cat([of_student, torch.where(some, rest, -math.inf)], 1), of_teacher

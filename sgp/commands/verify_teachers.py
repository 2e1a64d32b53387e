"""The cases of `sgp verify` in which a student's rows are compared with a teacher's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp import reference
from sgp.distilling import distillation
from sgp.linear_distilling import linear_distillation

Function = Callable[..., Tensor]

BETA = 0.3  # the teacher's share of the mixture
EVERYTHING = {
    "temperature": 1.7,
    "cross_entropy_weight": 0.3,
    "softcap": 30.0,
    "logit_scale": 0.8,
    "teacher_softcap": 20.0,
    "teacher_logit_scale": 1.2,
}


def columns(V: int, *, everything: bool) -> int:
    """The teacher's vocabulary beside a student's of V: a shorter one, or a longer one."""
    return max(1, V - V // 8 - 1) if everything else V + 5


def options(
    divergence: str, reduction: str, token_weight: Tensor, *, everything: bool
) -> dict[str, Any]:
    """The keywords of a call."""
    found: dict[str, Any] = {"divergence": divergence, "reduction": reduction}
    if divergence == "jsd":
        found["beta"] = BETA
    return found | EVERYTHING | {"token_weight": token_weight} if everything else found


def functions(teacher: list[Tensor]) -> tuple[Function, Function, Function]:
    """(reference in float64, plain PyTorch, sgp) of a student's leaves and a target.

    Args:
        teacher: its logits (N, V_t), or hidden states (N, D_t) and head (V_t, D_t).
    """
    if len(teacher) == 1:
        truth, ours = reference.distillation, distillation
        return (
            functools.partial(_reference64, _logits_form(truth), teacher),
            functools.partial(_plain, teacher),
            functools.partial(_logits_form(ours), teacher),
        )
    of_heads = functools.partial(linear_distillation, chunk_rows=2)
    return (
        functools.partial(_reference64, _head_form(reference.linear_distillation), teacher),
        functools.partial(_plain, teacher),
        functools.partial(_head_form(of_heads), teacher),
    )


def _logits_form(function: Any) -> Function:
    def call(teacher: list[Tensor], logits: Tensor, target: Tensor, **keywords: Any) -> Tensor:
        loss: Tensor = function(logits, *teacher, target, **keywords)
        return loss

    return call


def _head_form(function: Any) -> Function:
    def call(
        teacher: list[Tensor], hidden: Tensor, head: Tensor, target: Tensor, **keywords: Any
    ) -> Tensor:
        loss: Tensor = function(hidden, head, target, *teacher, **keywords)
        return loss

    return call


def _reference64(
    function: Function, teacher: list[Tensor], *arguments: Tensor, **keywords: Any
) -> Tensor:
    weight = keywords.pop("token_weight", None)
    weight = None if weight is None else weight.double()
    return function([x.double() for x in teacher], *arguments, token_weight=weight, **keywords)


def _plain(
    teacher: list[Tensor],
    *arguments: Tensor,
    divergence: str,
    reduction: str,
    beta: float = BETA,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
) -> Tensor:
    """What a user would write with PyTorch's operators, in the student's own dtype."""
    *student, target = arguments
    kept = target != -100
    dtype = student[0].dtype

    def scored(parts: list[Tensor], scale: float, cap: float | None) -> Tensor:
        first, *head = (x.to(dtype) for x in parts)
        logits = first[kept]
        logits = scale * (F.linear(logits, *head) if head else logits)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    s = scored([*student], logit_scale, softcap)
    t = scored(teacher, teacher_logit_scale, teacher_softcap)
    V = min(s.shape[1], t.shape[1])
    s, t = s[:, :V], t[:, :V]
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (s, t))
    rows = _divergence(log_p, log_q, divergence, beta)
    if cross_entropy_weight:
        nll = F.cross_entropy(s, target[kept], reduction="none")
        rows = rows + cross_entropy_weight * nll
    r = torch.ones_like(rows) if token_weight is None else token_weight[kept].to(dtype)
    if reduction == "none":
        return rows.new_zeros(kept.shape).masked_scatter(kept, r * rows)
    if reduction == "sum" or not len(rows):
        return (r * rows).sum()
    return (r * rows).sum() / r.sum()


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)

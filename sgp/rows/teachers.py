"""What a loss checks of its teachers: logits, hidden states and heads, or a TopK."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgp.labels import tokens_ahead
from sgp.rows.problem import FLOATS, INTEGERS, Problem, check_tensor, may_wait, moved_ahead
from sgp.rows.recipe import Recipe, shown
from sgp.rows.top_k import TopK
from sgp.selection import Selection

Teacher = Tensor | Sequence[Tensor] | TopK


def named_teachers(name: str, label: str, teacher: Teacher) -> TopK | dict[str, Tensor]:
    """The teachers by the words that an error calls them; or the few tokens of one."""
    if isinstance(teacher, TopK):
        return teacher
    if isinstance(teacher, (list, tuple)):
        if not teacher:
            raise ValueError(f"{name}: {label} is an empty list; expected a teacher or more")
        if any(isinstance(x, TopK) for x in teacher):
            raise TypeError(
                f"{name}: {label} is a list with an sgp.TopK in it; one sgp.TopK has the rows of "
                "all tokens, whichever teacher they are from"
            )
        return {f"{label}[{number}]": x for number, x in enumerate(teacher)}
    if not isinstance(teacher, Tensor):
        raise TypeError(
            f"{name}: {label} is a {type(teacher).__name__}; expected a torch.Tensor, a list of "
            "them or an sgp.TopK"
        )
    return {label: teacher}


def refuse_with_top_k(name: str, of_teacher: Recipe, teacher_index: Tensor | None) -> None:
    """Raise ValueError for what would change log-probabilities that are final."""
    given = {
        "teacher_softcap": of_teacher.softcap,
        "teacher_logit_scale": None if of_teacher.logit_scale == 1.0 else of_teacher.logit_scale,
        "teacher_index": teacher_index,
    }
    for label, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: {label} = {shown(value)} together with an sgp.TopK, whose "
                "log-probabilities are final; leave it out"
            )


def teacher_logits(
    name: str,
    label: str,
    teacher: Tensor,
    input: Tensor,  # noqa: A002
    target: Tensor | Selection,
    *,
    part: bool = False,
) -> Tensor:
    """(..., V_t) logits of a teacher, vocabulary last, with the rows of the student's."""
    _check_teacher(name, label, teacher, input)
    dim = -1 if isinstance(target, Selection) or input.dim() == 1 else 1
    if teacher.dim() != input.dim() or (
        teacher.movedim(dim, -1).shape[:-1] != input.movedim(dim, -1).shape[:-1]
    ):
        raise ValueError(
            f"{name}: {label} is {tuple(teacher.shape)} and input {tuple(input.shape)}; expected "
            "the same shape, but for the length of the vocabulary"
        )
    if not (part or teacher.shape[dim]):
        raise ValueError(f"{name}: {label} {tuple(teacher.shape)} has a vocabulary of 0")
    rows = teacher.detach()
    return rows[None] if rows.dim() == 1 else rows.movedim(dim, -1)


def check_vocabulary(name: str, label: str, columns: int, student: int) -> None:
    """Raise ValueError where one vocabulary is not even half as long as the other.

    That is no padding: hidden states in the place of logits, say.
    """
    if min(columns, student) * 2 < max(columns, student):
        raise ValueError(
            f"{name}: {label} has {columns} classes and the student {student}; expected the same "
            "tokens, whose number may differ by padding"
        )


def _check_teacher(name: str, label: str, value: Tensor, input: Tensor) -> None:  # noqa: A002
    check_tensor(name, label, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: {label} is {value.dtype}; expected float32, float64, bfloat16 or float16"
        )
    if value.device != input.device:
        raise ValueError(f"{name}: input is on {input.device} and {label} on {value.device}")


def teacher_heads(
    name: str,
    input: Tensor,  # noqa: A002
    hidden: Any,
    weight: Any,
    bias: Any,
) -> list[tuple[tuple[str, str, str], tuple[Tensor, Tensor, Tensor | None]]]:
    """For each teacher what an error calls its parts, and these."""
    several = isinstance(hidden, (list, tuple))
    if not several:
        hidden, weight, bias = [hidden], [weight], [bias]
    else:
        bias = [None] * len(hidden) if bias is None else bias
        weight = [weight] * len(hidden) if isinstance(weight, Tensor) else weight  # one for all
    if several and weight is None:
        raise ValueError(
            f"{name}: teacher_input is a list of {len(hidden)} teachers and teacher_weight None; "
            f"expected a list of {len(hidden)} heads. For the most probable tokens of one, pass "
            "sgp.TopK(indices, log_probs)"
        )
    for label, values in (("teacher_weight", weight), ("teacher_bias", bias)):
        if not isinstance(values, (list, tuple)) or len(values) != len(hidden):
            kind = (
                f"a list of {len(values)}" if isinstance(values, (list, tuple)) else shown(values)
            )
            raise ValueError(
                f"{name}: {label} is {kind}; expected a list of {len(hidden)}, as teacher_input is"
            )
    found = []
    for number, parts in enumerate(zip(hidden, weight, bias, strict=True)):
        at = f"[{number}]" if several else ""
        names = (f"teacher_input{at}", f"teacher_weight{at}", f"teacher_bias{at}")
        if parts[1] is None:
            raise TypeError(
                f"{name}: {names[1]} is None; expected (V_t, D_t) beside {names[0]}: only an "
                "sgp.TopK goes without a head, and sgp.distillation takes a teacher's logits"
            )
        for label, value in zip(names, parts, strict=True):
            if value is not None or label != names[2]:
                _check_teacher(name, label, value, input)
        h, w, b = parts
        if not h.dim() or h.shape[:-1] != input.shape[:-1]:
            raise ValueError(
                f"{name}: {names[0]} is {tuple(h.shape)} and input {tuple(input.shape)}; expected "
                "the same leading dimensions"
            )
        found.append((names, (h.detach(), w.detach(), None if b is None else b.detach())))
    return found


def index_of_teachers(
    name: str,
    label: str,
    teacher: object,
    teacher_index: Tensor | None,
    target: Tensor | Selection,
    problem: Problem,
    shift: bool | int,
) -> Tensor | None:
    """(N,) int64: the number of each row's teacher; None: there is one.

    Raises:
        ValueError, TypeError: one without the other, shapes, dtypes, devices.
        IndexError: a number that no teacher has, on a CPU or with SGP_CHECK=1.
    """
    if not isinstance(teacher, (list, tuple)):
        if teacher_index is not None:
            raise ValueError(
                f"{name}: teacher_index = {shown(teacher_index)} with one teacher; pass a list of "
                "teachers"
            )
        return None
    if teacher_index is None:
        raise ValueError(
            f"{name}: {label} is a list of {len(teacher)} and teacher_index None; expected int64, "
            "which teacher belongs to each token"
        )
    check_tensor(name, "teacher_index", teacher_index)
    if teacher_index.dtype not in INTEGERS:
        raise TypeError(f"{name}: teacher_index is {teacher_index.dtype}; expected int64")
    N = math.prod(problem.shape)
    if tuple(teacher_index.shape) not in (tuple(problem.shape), (N,)):
        raise ValueError(
            f"{name}: teacher_index is {tuple(teacher_index.shape)}; expected "
            f"{tuple(problem.shape)} or ({N},), one a token"
        )
    if teacher_index.device != problem.input.device:
        raise ValueError(
            f"{name}: input is on {problem.input.device} and teacher_index on "
            f"{teacher_index.device}"
        )
    index = teacher_index.reshape(-1).to(torch.int64)
    if isinstance(target, Tensor) and problem.shape:
        ahead = tokens_ahead(name, shift, problem.shape[-1])
        _, moved = moved_ahead(index, index, problem.shape, -100, ahead)
        index = index if moved is None else moved
    index = index.contiguous()
    if not torch.compiler.is_compiling() and may_wait(index):
        kept = problem.target != problem.recipe.ignore_index
        bad = kept & ((index < 0) | (index >= len(teacher)))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise IndexError(
                f"{name}: teacher_index of row {at} is {int(index[at])}; expected a number in "
                f"[0, {len(teacher)}), of a teacher"
            )
    return index


def with_index(
    problem: Problem, index: Tensor | None, number: int
) -> tuple[Problem, Tensor | None]:
    """The problem with a weight of NaN, and an index of 0, where there is no such teacher."""
    if index is None:
        return problem, None
    bad = (index < 0) | (index >= number)
    weight = problem.token_weight
    weight = index.new_ones(index.shape, dtype=problem.dtype()) if weight is None else weight
    weight = weight.masked_fill(bad, torch.nan)
    return problem._replace(token_weight=weight), index.masked_fill(bad, 0)

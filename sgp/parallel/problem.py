"""From what a caller passes to a problem of a split vocabulary on which the ranks agree."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from sgp.dtensors import is_dtensor
from sgp.head.autograd import linear_head
from sgp.head.calls import LinearHead
from sgp.head.operators import kept_rows
from sgp.head.problem import Pieces, check_head, compute_dtype, make_head_problem
from sgp.parallel.shard import (
    Group,
    Header,
    Shard,
    agree,
    checksum,
    process_group,
    sampled,
    without_padding,
)
from sgp.rows.autograd import refuse_forward_mode
from sgp.rows.problem import Problem, check_targets, check_tensor, class_weight, make_problem
from sgp.rows.recipe import Recipe, whole_number
from sgp.selection import Selection


def logits_problem(
    name: str,
    local_logits: Tensor,
    target: Tensor | Selection,
    token_weight: Tensor | None,
    recipe: Recipe,
    shift: bool | int,
) -> Problem:
    """The rows of a rank's logits; class weights come later.

    Raises:
        ValueError, TypeError: with what was passed; class probabilities and DTensors among it.
        RuntimeError: under `torch.func` transforms.
    """
    _refuse_dtensors(name, local_logits)
    with _calling("input", "local_logits"):
        problem = make_problem(
            name, local_logits, target, None, token_weight, recipe, shift=shift, part=True
        )
    if problem.has_probabilities():
        raise TypeError(
            f"{name}: target is {problem.target.dtype}; expected class indices: class "
            "probabilities over a split vocabulary are not supported"
        )
    _refuse_transforms(name, local_logits)
    return problem


def head_problem(
    name: str,
    input: Tensor,  # noqa: A002
    local_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor | Selection,
    token_weight: Tensor | None,
    recipe: Recipe,
    pieces: Pieces,
    shift: bool | int,
) -> tuple[Problem, LinearHead]:
    """The rows of a head's hidden states, and the rank's part of the head.

    Raises:
        ValueError, TypeError: with what was passed; DTensors among it.
        RuntimeError: under `torch.func` transforms.
    """
    _refuse_dtensors(name, input, local_weight, linear_bias)
    with _calling("linear_weight", "local_weight"):
        check_head(name, input, local_weight, linear_bias, target, part=True)
        pieces.check(name, local_weight)
        problem = make_head_problem(
            name, input, local_weight, target, None, token_weight, recipe, shift=shift
        )
    _refuse_transforms(name, input, local_weight, linear_bias)
    return problem, linear_head(local_weight, linear_bias, target, problem)


@contextlib.contextmanager
def _calling(whole: str, part: str) -> Iterator[None]:
    """Errors of the checks for a whole vocabulary, with the argument as a rank's own is called."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(re.sub(rf"\b{whole}\b", part, str(error))) from None


def _refuse_dtensors(name: str, *inputs: Tensor | None) -> None:
    if is_dtensor(*inputs):
        raise TypeError(
            f"{name}: got a DTensor; pass it to {name.replace('.parallel', '')}, which knows its "
            "group, or pass its .to_local()"
        )


def _refuse_transforms(name: str, *inputs: Tensor | None) -> None:
    refuse_forward_mode(name, *inputs)
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001  (no public name)
        raise RuntimeError(f"{name}: ranks exchange numbers, which torch.func transforms cannot do")


def agree_on_logits(
    name: str,
    group: Group,
    problem: Problem,
    target: Tensor | Selection,
    vocab_size: int | None,
    scale: Tensor | None,
    options: tuple[object, ...],
) -> tuple[Shard, Tensor]:
    """The shard, and the kept rows (M,)."""
    p = problem
    group = process_group(name, group)
    if isinstance(target, Selection):
        rows, count = target.padded_rows, target.count
    else:
        rows, count = kept_rows(p.target, p.recipe.ignore_index)
    header = Header(
        function=checksum(name),
        options=checksum(p.recipe, options),
        dtypes=checksum(p.input.dtype),
        grads=checksum(torch.is_grad_enabled() and p.input.requires_grad),
        columns=p.input.shape[-1],
        vocab_size=_given(name, vocab_size),
        tokens=p.target.numel(),
        kept=int(count),
        width=0,
    )
    rows = rows[: int(count)]
    sample = sampled(p.input, rows)
    shard = agree(name, group, header, p.target, (p.token_weight, p.weight, scale), sample)
    check_targets(name, p.target, shard.V, p.recipe.ignore_index)
    return shard, rows


def agree_on_head(
    name: str,
    group: Group,
    problem: Problem,
    head: LinearHead,
    vocab_size: int | None,
    scale: Tensor | None,
    options: tuple[object, ...],
    *,
    sums_input_grad: bool,
) -> tuple[Shard, LinearHead]:
    """The shard, and the head without rows of padding."""
    p = problem
    grad = torch.is_grad_enabled()
    needs = tuple(
        grad and x is not None and x.requires_grad for x in (p.input, head.weight, head.bias)
    )
    header = Header(
        function=checksum(name),
        options=checksum(p.recipe, head.bias is None, options),
        dtypes=checksum(p.input.dtype, compute_dtype(p.input), head.weight.dtype),
        grads=checksum(needs),
        columns=head.weight.shape[0],
        vocab_size=_given(name, vocab_size),
        tokens=p.target.numel(),
        kept=int(head.num_kept),
        width=head.weight.shape[1],
    )
    weights = (p.token_weight, p.weight, scale)
    shard = agree(
        name, group, header, p.target, weights, sampled(head.weight),
        sums_input_grad=sums_input_grad,
    )  # fmt: skip
    if shard.size < head.weight.shape[0]:
        bias = None if head.bias is None else head.bias[: shard.size]
        head = head._replace(weight=head.weight[: shard.size], bias=bias)
    return shard, head


def agree_on_teacher(
    name: str,
    group: Group,
    shard: Shard,
    problem: Problem,
    kept: int,
    teacher: tuple[Tensor, int],
    sample: Tensor,
    vocab_size: int | None,
) -> Shard:
    """The shard of the classes that student and teacher have, the same ones on each rank.

    `teacher` is what holds its columns, and which dimension they are.

    Raises:
        ValueError: on every rank, where the ranks hold other classes of one than of the other.
    """
    x, dim = teacher
    header = Header(
        function=checksum(name, "teacher"),
        options=checksum(dim),
        dtypes=checksum(x.dtype),
        grads=0,
        columns=x.shape[dim],
        vocab_size=_given(name, vocab_size),
        tokens=problem.target.numel(),
        kept=kept,
        width=0 if dim else x.shape[1],
    )
    other = agree(name, process_group(name, group), header, problem.target, (), sample)
    V = min(shard.V, other.V)
    ours, theirs = (without_padding(name, sizes, V) for sizes in (shard.sizes, other.sizes))
    if ours != theirs:
        raise ValueError(
            f"{name}: the ranks hold {list(shard.sizes)} columns of the student's vocabulary and "
            f"{list(other.sizes)} of the teacher's; expected the same classes on each rank, but "
            "for padding behind the last: split both alike"
        )
    agreed = shard.agreed if other.agreed is None else other.agreed
    if shard.agreed is not None and other.agreed is not None:
        agreed = shard.agreed & other.agreed
    return shard._replace(sizes=ours, agreed=agreed)


def _given(name: str, vocab_size: int | None) -> int:
    if vocab_size is None:
        return -1
    return whole_number(name, "vocab_size", vocab_size, 1)


def weight_of_any_length(name: str, weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Class weights whose length is not known to be right yet."""
    if weight is None:
        return None
    check_tensor(name, "weight", weight)
    return class_weight(name, weight, like, weight.numel())


def check_weight_length(name: str, weight: Tensor | None, shard: Shard) -> None:
    """Refuse class weights that are not of the whole vocabulary."""
    if weight is not None and weight.numel() != shard.V:
        raise ValueError(
            f"{name}: weight is {tuple(weight.shape)}; expected ({shard.V},), one a class of the "
            f"whole vocabulary, of which the ranks hold {list(shard.sizes)}; if the last columns "
            "are padding, pass vocab_size"
        )

"""`linear_distillation`: two heads and the divergence of what they give, without their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from sgp.distilling import (
    BatchOptions,
    DivergenceOptions,
    checked_options,
    refuse_dtensors,
    refuse_transforms,
)
from sgp.head.autograd import head_options, linear_head
from sgp.head.calls import LinearHead
from sgp.head.chunks import check_sizes
from sgp.head.problem import Pieces, check_head, is_autocast, make_head_problem
from sgp.head.teachers import Teachers
from sgp.linear import check_size, head_loss
from sgp.reference import TokenLogProbs
from sgp.rows.by_torch import Wanted
from sgp.rows.divergence import SAVED, Divergence
from sgp.rows.divisor import as_mean
from sgp.rows.problem import check_flags
from sgp.rows.recipe import Recipe
from sgp.rows.reduction import check_reduction
from sgp.rows.teachers import (
    Teacher,
    check_vocabulary,
    index_of_teachers,
    named_teachers,
    refuse_with_top_k,
    teacher_heads,
    with_index,
)
from sgp.rows.top_k import TopK
from sgp.rows.top_rows import listed_of
from sgp.rows.watched import not_compiled
from sgp.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on

NAME = "sgp.linear_distillation"


class HeadOptions(BatchOptions, total=False):
    """The keywords of `linear_distillation`."""

    linear_bias: Tensor | None
    teacher_bias: Tensor | Sequence[Tensor | None] | None
    chunk_rows: int | None
    memory_budget: int | None


@overload
def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Selection,
    teacher_input: Teacher,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[HeadOptions],
) -> Tensor: ...


@overload
def linear_distillation(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Selection,
    teacher_input: Teacher,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, TokenLogProbs]: ...


def linear_distillation(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    linear_weight: Tensor,
    target: Tensor | Selection,
    teacher_input: Teacher,
    teacher_weight: Tensor | Sequence[Tensor] | None = None,
    *,
    linear_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
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
    teacher_index: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """`distillation` of two linear heads on hidden states, without the N x V logits of either.

    The kept rows of both are gathered, and their logits are made, compared and forgotten in pieces.
    The teacher's head may have another width; teachers get no gradient.

    Example:
        >>> import torch, sgp
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)       # (B, T, D) of the student
        >>> head = torch.nn.Linear(8, 11, bias=False)               # (V, D)
        >>> large, large_head = torch.randn(2, 5, 16), torch.randn(11, 16)      # the teacher's
        >>> labels = torch.randint(11, (2, 5))                      # token ids: shift them
        >>> labels[:, :3] = -100                                    # context
        >>> loss = sgp.linear_distillation(
        ...     hidden, head.weight, labels, large, large_head, divergence="reverse_kl", shift=True)
        >>> loss.backward()
        >>> hidden.grad.abs().sum(-1) > 0                # the row before a token predicts it
        tensor([[False, False,  True,  True, False],
                [False, False,  True,  True, False]])

    Args:
        input, linear_weight, target, linear_bias, shift: as in `linear_cross_entropy`, class
            indices or a Selection only.
        teacher_input: the teacher's hidden states (..., D_t), at the same tokens as `input`; or an
            `sgp.TopK`, without `teacher_weight`; or a list of several teachers' hidden states.
        teacher_weight: (V_t, D_t), in the dtype of `teacher_input` unless autocast is on, which
            need not be that of `input`; a list for several teachers, or one for all of them.
        teacher_bias: (V_t,) or None; a list for several.
        chunk_rows: rows of float32 logits of either model at once.
        memory_budget: as in `linear_cross_entropy`, of both models' logits; no logits are held
            for the backward, and a TopK goes by chunks of rows alone.
        divergence, beta, temperature, cross_entropy_weight, ignore_index, reduction, token_weight,
            denominator, softcap, logit_scale, teacher_softcap, teacher_logit_scale, teacher_index,
            return_stats: as in `distillation`.

    Returns:
        The loss in nats, float32 (float64 for float64 input); shapes as in `cross_entropy`.

    Cost: matmuls take `M V (6 D + 2 D_t)` floating-point operations with gradients for "mean" and
    "sum" (without the term in D_t for a TopK), `M V (8 D + 4 D_t)` where the logits are made twice:
    for other reductions, and where a small budget asks for it. `M V (2 D + 2 D_t)` without
    gradients. Labels on a GPU cost one wait for the device, and several teachers another one.

    Raises:
        ValueError, TypeError, IndexError: as `distillation` and `linear_cross_entropy`.
        RuntimeError: a second backward through "mean" or "sum", a second derivative, `torch.func`
            transforms.

    Source: as `distillation`; the pieces are those of `linear_cross_entropy`.
    """
    refuse_dtensors(
        NAME, input, linear_weight, target, linear_bias, teacher_input, teacher_weight,
        teacher_bias, token_weight, teacher_index,
    )  # fmt: skip
    check_flags(NAME, return_stats=return_stats)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    options = Divergence(
        divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale
    ).check(NAME)
    denominator = check_reduction(NAME, reduction, denominator)
    pieces = Pieces(chunk_rows, memory_budget)
    check_head(NAME, input, linear_weight, linear_bias, target)
    pieces.check(NAME, linear_weight)
    problem = make_head_problem(
        NAME, input, linear_weight, target, None, token_weight, recipe, shift=shift
    )
    refuse_transforms(NAME, input, linear_weight, linear_bias)
    given = named_teachers(NAME, "teacher_input", teacher_input)
    index, teacher_dtype, classes = None, None, 0
    if isinstance(given, TopK):
        _refuse_heads(teacher_weight, teacher_bias)
        refuse_with_top_k(NAME, options.of_teacher(recipe), teacher_index)
        teachers = Teachers()
    else:
        teachers = teachers_of(NAME, input, teacher_input, teacher_weight, teacher_bias)
        for weight in teachers.weights:
            check_vocabulary(NAME, "teacher_weight", len(weight), len(linear_weight))
        V = min(len(weight) for weight in teachers.weights)
        classes = V if len(linear_weight) > V else 0
        index = index_of_teachers(
            NAME, "teacher_input", teacher_input, teacher_index, target, problem, shift
        )
        problem, index = with_index(problem, index, len(teachers.inputs))
        if is_autocast(input):
            teacher_dtype = torch.get_autocast_dtype(input.device.type)
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(NAME, problem, denominator)
    head = linear_head(linear_weight, linear_bias, target, problem)
    if isinstance(given, TopK):
        teachers = _few_tokens(given, head)
    ends: list[int] = []
    if index is not None:
        head, ends = _by_teacher(head, index, len(teachers.inputs))
    wanted = Wanted(stats=return_stats, width=SAVED)
    chosen = head_options(problem.recipe, head, pieces, wanted, name=NAME)
    call = chosen.call._replace(
        divergence=options, classes=classes, teacher_dtype=teacher_dtype, teacher_ends=ends
    )
    chosen = chosen._replace(call=call, teachers=teachers, may_hold=False)
    return head_loss(problem, head, scale, chosen, reduction)


@not_compiled
def _few_tokens(teacher: TopK, head: LinearHead) -> Teachers:
    kept, V = int(head.num_kept), len(head.weight)
    listed = listed_of(NAME, "teacher_input", teacher, kept, V, head.input)
    return Teachers([], [], [], *listed)


def _refuse_heads(weight: object, bias: object) -> None:
    for label, value in (("teacher_weight", weight), ("teacher_bias", bias)):
        if value is not None:
            raise ValueError(
                f"{NAME}: {label} together with an sgp.TopK, which has the teacher's "
                "log-probabilities; leave it out"
            )


def teachers_of(
    name: str,
    input: Tensor,  # noqa: A002
    hidden: Teacher,
    weight: Tensor | Sequence[Tensor] | None,
    bias: Tensor | Sequence[Tensor | None] | None,
    *,
    part: bool = False,
) -> Teachers:
    """What the arguments hold of them, which fits together.

    `part`: the weight holds some rows of a vocabulary, maybe none.

    Raises:
        ValueError, TypeError: with what was passed.
    """
    found = Teachers([], [], [])
    cast = is_autocast(input)
    for names, (h, w, b) in teacher_heads(name, input, hidden, weight, bias):
        if w.dim() != 2 or w.shape[-1] != h.shape[-1] or not (part or w.numel()):
            raise ValueError(
                f"{name}: {names[0]} is {tuple(h.shape)} and {names[1]} {tuple(w.shape)}; expected "
                "(..., D_t) and (V_t, D_t)"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(
                f"{name}: {names[2]} is {tuple(b.shape)}; expected {tuple(w.shape[:1])}, as "
                f"{names[1]} is {tuple(w.shape)}"
            )
        if h.dtype != w.dtype and not cast:
            raise TypeError(
                f"{name}: {names[0]} is {h.dtype} and {names[1]} {w.dtype}; convert one, or use "
                "torch.autocast"
            )
        found.inputs.append(h)
        found.weights.append(w)
        found.biases.append(w.new_zeros(len(w)) if b is None else b)
    any_bias = bias is not None and (
        not isinstance(bias, (list, tuple)) or any(b is not None for b in bias)
    )
    return found if any_bias else found._replace(biases=[])


@not_compiled
def _by_teacher(head: LinearHead, index: Tensor, number: int) -> tuple[LinearHead, list[int]]:
    """The head with its kept rows in the order of their teachers, and where each one's end.

    On a GPU this waits for the device: the numbers decide how much work each matmul has.
    """
    kept = int(head.num_kept)
    rows = head.rows[:kept]
    of_row = index[rows]
    order = of_row.argsort(stable=True)
    ends = (of_row[:, None] <= torch.arange(number, device=rows.device)).sum(0).tolist()
    return head._replace(rows=torch.cat([rows[order], head.rows[kept:]])), ends


class LinearDistillationLoss(nn.Module):
    """`linear_distillation` with the student's head inside.

    Example:
        >>> loss_function = sgp.LinearDistillationLoss(8, 11, divergence="reverse_kl")
        >>> hidden, teacher = torch.zeros(2, 8), torch.zeros(2, 16)
        >>> loss_function(hidden, torch.tensor([1, -100]), teacher, torch.zeros(11, 16)).shape
        torch.Size([])
        >>> loss_function.linear = torch.nn.Linear(8, 11)           # or a model's own head

    Args:
        in_features: D.
        num_classes: V.
        bias: whether the head has one.
        device, dtype: of the head.
        chunk_rows, memory_budget, return_stats: as in `linear_distillation`.
        options: the keywords of `sgp.DistillationLoss`.

    `token_weight`, `denominator` and `teacher_index` change from batch to batch: give them to the
    call.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        memory_budget: int | None = None,
        return_stats: bool = False,
        **options: Unpack[DivergenceOptions],
    ) -> None:
        super().__init__()
        name = "sgp.LinearDistillationLoss"
        check_size(name, "in_features", in_features)
        check_size(name, "num_classes", num_classes)
        check_flags(name, bias=bias, return_stats=return_stats)
        check_sizes(name, chunk_rows, memory_budget)
        self.options = checked_options(name, options)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.chunk_rows, self.memory_budget = chunk_rows, memory_budget
        self.return_stats = return_stats

    def forward(
        self,
        input: Tensor,  # noqa: A002
        target: Tensor | Selection,
        teacher_input: Teacher,
        teacher_weight: Tensor | Sequence[Tensor] | None = None,
        *,
        teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        teacher_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenLogProbs]:
        """The loss of these hidden states; shapes and errors as in `linear_distillation`."""
        return linear_distillation(  # type: ignore[call-overload,misc,no-any-return]
            input, self.linear.weight, target, teacher_input, teacher_weight,
            linear_bias=self.linear.bias, teacher_bias=teacher_bias, token_weight=token_weight,
            denominator=denominator, teacher_index=teacher_index, chunk_rows=self.chunk_rows,
            memory_budget=self.memory_budget, return_stats=self.return_stats, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that were given."""
        sizes = {"chunk_rows": self.chunk_rows, "memory_budget": self.memory_budget}
        given = {k: v for k, v in sizes.items() if v is not None} | dict(self.options)
        given |= {"return_stats": True} if self.return_stats else {}
        return ", ".join(f"{k}={v!r}" for k, v in given.items())

"""`distillation`: a student learns a teacher's whole distribution, from the logits of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from sgp import dtensors
from sgp.head.operators import kept_rows
from sgp.labels import tokens_ahead
from sgp.losses import token_statistics
from sgp.reference import TokenLogProbs
from sgp.rows.autograd import apply, refuse_forward_mode
from sgp.rows.by_torch import Wanted
from sgp.rows.divergence import Divergence
from sgp.rows.divisor import as_mean
from sgp.rows.problem import Problem, check_flags, check_targets, make_problem
from sgp.rows.recipe import Recipe
from sgp.rows.reduction import check_reduction, reduce_rows
from sgp.rows.teachers import (
    Teacher,
    check_vocabulary,
    index_of_teachers,
    named_teachers,
    refuse_with_top_k,
    teacher_logits,
    with_index,
)
from sgp.rows.top_k import TopK
from sgp.rows.top_rows import listed_of, top_forward
from sgp.rows.two_autograd import DivergenceRows, DivergenceSum, DivergenceTop
from sgp.rows.two_rows import DISTILLATION, two_rows_forward
from sgp.rows.watched import not_compiled
from sgp.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on


class DivergenceOptions(TypedDict, total=False):
    """The keywords that do not change from batch to batch."""

    divergence: str
    beta: float
    temperature: float
    cross_entropy_weight: float
    ignore_index: int | None
    reduction: str
    softcap: float | None
    logit_scale: float
    teacher_softcap: float | None
    teacher_logit_scale: float
    shift: bool | int


class BatchOptions(DivergenceOptions, total=False):
    """And those that do."""

    token_weight: Tensor | None
    denominator: float | Tensor | None
    teacher_index: Tensor | None


@overload
def distillation(
    input: Tensor,
    teacher: Teacher,
    target: Tensor | Selection,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[BatchOptions],
) -> Tensor: ...


@overload
def distillation(
    input: Tensor,
    teacher: Teacher,
    target: Tensor | Selection,
    *,
    return_stats: Literal[True],
    **options: Unpack[BatchOptions],
) -> tuple[Tensor, TokenLogProbs]: ...


def distillation(
    input: Tensor,  # noqa: A002  (PyTorch's name)
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
    """The divergence of a student's distribution from a teacher's, at the tokens that carry loss.

    Rows whose target is ignored are read in neither model's logits, whatever they hold (NaN
    included), and their gradient is exactly zero; so it is where both rows are equal.

    Example:
        >>> import torch, sgp
        >>> student = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log().requires_grad_()
        >>> teacher = torch.tensor([[0.8, 0.2], [0.1, 0.9]]).log()
        >>> labels = torch.tensor([0, -100])                        # the second row is context
        >>> loss = sgp.distillation(student, teacher, labels)       # 0.8 log 1.6 + 0.2 log 0.4
        >>> loss
        tensor(0.1927, grad_fn=<DivergenceSumBackward>)
        >>> loss.backward()
        >>> student.grad                                            # p - q
        tensor([[-0.3000,  0.3000],
                [ 0.0000,  0.0000]])

    Args:
        input: the student's logits, as in `cross_entropy`: (V,), (N, V), (N, V, d1, ...), or
            (..., V) with a Selection; float32, float64, bfloat16 or float16, any strides.
        teacher: the teacher's logits, laid out as `input`, of any of these dtypes; a constant,
            which gets no gradient. Where one vocabulary is longer (padding), its columns beyond the
            shorter one are left out of both distributions. Or an `sgp.TopK`: the few most probable
            tokens at each token that carries loss, and one term for the rest of the mass. Or a list
            of several teachers' logits, cut to the shortest vocabulary of all.
        target: labels or a Selection, as in `cross_entropy`, which say what carries loss. Which
            class a label is matters to `cross_entropy_weight` and `return_stats` alone.
        divergence: "forward_kl" is KL(teacher || student), "reverse_kl" KL(student || teacher), and
            "jsd" beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student.
        beta: of a "jsd", between 0 and 1.
        temperature: divides both models' scores, after scale and softcap. Nothing is multiplied by
            its square (as in TRL; Hinton et al. 2015 do multiply): the gradient falls with it. The
            log-probabilities of a TopK have to be those at this temperature already.
        cross_entropy_weight: adds this times the cross-entropy of the target, at temperature 1 and
            over the columns that both have.
        ignore_index, reduction, token_weight, denominator, shift: as in `cross_entropy`. "mean"
            divides by the sum of the kept tokens' weights.
        softcap, logit_scale: of the student, as in `cross_entropy`; `teacher_softcap` and
            `teacher_logit_scale` of the teacher.
        teacher_index: which of several teachers a token has: integers of the target's shape, or
            flattened (N,). `shift` moves them with the labels; beside a Selection, whose targets
            have been moved already, they are those of the rows that predict the tokens.
        return_stats: return (loss, TokenLogProbs), detached: the student's at `temperature`.

    Returns:
        The loss in nats, float32 (float64 for float64 input); shapes as in `cross_entropy`.

    Cost: a kernel reads each kept logit of both twice and writes the gradient, three times for a
    "jsd"; once and twice without a gradient. Reductions other than "mean" and "sum" and float16
    read them once more in backward. With a TopK the kept rows are copied, some at a time; labels
    beside it cost one wait on a GPU, and `offsets` another one. Where two vocabularies are of
    lengths that differ by no multiple of 8, accesses to memory are of single elements.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or constants that do not fit.
        IndexError: a target outside the vocabulary, where it matters, or a teacher that is not
            there; on a CPU or with SGP_CHECK=1. On a GPU such a row's loss and gradient are NaN;
            with `return_stats` alone, its log-probability is.
        RuntimeError: a second backward through "mean" or "sum", a second derivative, `torch.func`
            transforms, float64 with SGP_BACKEND=triton.

    Source: Agarwal et al. 2024 (On-Policy Distillation of Language Models), equations 1 to 3; how
    nothing cancels where both are nearly certain or nearly equal is in `kernels/divergence.py`.
    """
    name = DISTILLATION
    refuse_dtensors(name, input, teacher, target, token_weight, teacher_index)
    check_flags(name, return_stats=return_stats)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    options = Divergence(
        divergence, beta, cross_entropy_weight, teacher_softcap, teacher_logit_scale
    ).check(name)
    _check_layout(name, input, target, shift)
    problem = make_problem(name, input, target, None, token_weight, recipe, shift=shift)
    if problem.has_probabilities():
        raise TypeError(
            f"{name}: target is {problem.target.dtype}; expected class indices or a Selection; the "
            "order is (input, teacher, target)"
        )
    denominator = check_reduction(name, reduction, denominator)
    given = named_teachers(name, "teacher", teacher)
    refuse_transforms(name, input)
    scale = None
    if isinstance(given, TopK):
        refuse_with_top_k(name, options.of_teacher(recipe), teacher_index)
        if reduction == "mean":
            problem, scale = as_mean(name, problem, denominator)
        rows, stats = _top_rows(name, given, target, problem, options, stats=return_stats)
        loss = reduce_rows(problem, rows, reduction, scale)
    else:
        teachers = [teacher_logits(name, *item, input, target) for item in given.items()]
        for label, x in zip(given, teachers, strict=True):
            check_vocabulary(name, label, x.shape[-1], problem.input.shape[-1])
        index = index_of_teachers(name, "teacher", teacher, teacher_index, target, problem, shift)
        problem, index = with_index(problem, index, len(teachers))
        if reduction == "mean":
            problem, scale = as_mean(name, problem, denominator)
        loss, stats = _row_losses(problem, teachers, index, options, reduction, scale, return_stats)
    return (loss, token_statistics(problem, stats, need_argmax=False)) if return_stats else loss


def _check_layout(
    name: str,
    input: Tensor,  # noqa: A002
    target: Tensor | Selection,
    shift: bool | int,
) -> None:
    """Raise ValueError for labels beside logits (B, T, V), which have the vocabulary second."""
    if not isinstance(target, Tensor) or not isinstance(input, Tensor) or input.dim() < 3:
        return
    if target.shape == input.shape[:-1] and target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            f"{name}: input is {tuple(input.shape)} and target {tuple(target.shape)}; labels need "
            "the vocabulary second, as in PyTorch. Where it is last, pass "
            f"sgp.Selection.from_labels(target, shift={shift}) as target, without shift here"
        )


def _row_losses(
    problem: Problem,
    teachers: list[Tensor],
    index: Tensor | None,
    divergence: Divergence,
    reduction: str,
    scale: Tensor | None,
    stats: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """(the loss, the statistics) of logits."""
    p = problem
    need_grad = torch.is_grad_enabled() and p.input.requires_grad
    rest = (p.recipe, divergence, stats, *teachers)
    out: tuple[Any, ...]
    if need_grad and reduction in ("mean", "sum") and p.input.dtype != torch.float16:
        out = apply(DivergenceSum, p.input, p.target, index, p.token_weight, scale, *rest)
        return out[0], out[1:6]
    if need_grad:
        out = apply(DivergenceRows, p.input, p.target, index, p.token_weight, *rest)
        loss, found = out[0], out[1:6]
    else:
        loss, _, *found, _ = two_rows_forward(
            p.input.detach(), teachers, p.target, index, p.token_weight, None, p.recipe,
            divergence, Wanted(stats=stats),
        )  # fmt: skip
    return reduce_rows(p, loss, reduction, scale), tuple(found)


@not_compiled
def _top_rows(
    name: str,
    teacher: TopK,
    target: Tensor | Selection,
    problem: Problem,
    divergence: Divergence,
    *,
    stats: bool,
) -> tuple[Tensor, tuple[Any, ...]]:
    """(one loss a row (N,), the statistics) beside a few tokens of a teacher."""
    p = problem
    V, ignored = p.input.shape[-1], p.recipe.ignore_index
    if isinstance(target, Selection):
        rows = target.rows
    else:
        padded, count = kept_rows(p.target, ignored)
        rows = padded[: int(count)]
    listed = listed_of(name, "teacher", teacher, len(rows), V, p.input)
    if divergence.needs_label(stats=stats):
        check_targets(name, p.target, V, ignored)
    if torch.is_grad_enabled() and p.input.requires_grad:
        out: tuple[Any, ...] = apply(
            DivergenceTop, p.input, p.target, rows, *listed, p.token_weight, p.recipe, divergence,
            stats,
        )  # fmt: skip
        return out[0], out[1:6]
    found = top_forward(
        p.input.detach(), p.target, rows, listed, p.token_weight, p.recipe, divergence, stats=stats
    )
    return found.loss, found[2:7]


def refuse_dtensors(name: str, *values: Any) -> None:
    """Raise TypeError for a DTensor, alone or in a list."""
    flat = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    if dtensors.is_dtensor(*flat):
        raise TypeError(
            f"{name}: got a DTensor; pass each one's .to_local() where every rank has whole rows, "
            f"or to {name.replace('sgp.', 'sgp.parallel.')} where the vocabulary is sharded"
        )


def refuse_transforms(name: str, *inputs: Tensor | None) -> None:
    """Raise RuntimeError for dual numbers and under `torch.func` transforms."""
    refuse_forward_mode(name, *inputs)
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001  (no public name)
        raise RuntimeError(
            f"{name}: torch.func transforms cannot follow it; use sgp.reference"
            f"{name.removeprefix('sgp')}"
        )


class DistillationLoss(nn.Module):
    """`distillation` as a module, with its keywords.

    Example:
        >>> loss_function = sgp.DistillationLoss(divergence="jsd", temperature=2.0)
        >>> loss_function(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(0.)

    Args:
        divergence, beta, temperature, cross_entropy_weight, ignore_index, reduction, softcap,
            logit_scale, teacher_softcap, teacher_logit_scale, shift, return_stats: as in
            `distillation`.

    `token_weight`, `denominator` and `teacher_index` change from batch to batch: give them to the
    call.
    """

    def __init__(self, *, return_stats: bool = False, **options: Unpack[DivergenceOptions]) -> None:
        super().__init__()
        name = "sgp.DistillationLoss"
        check_flags(name, return_stats=return_stats)
        self.options, self.return_stats = checked_options(name, options), return_stats

    def forward(
        self,
        input: Tensor,  # noqa: A002
        teacher: Teacher,
        target: Tensor | Selection,
        *,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        teacher_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenLogProbs]:
        """The loss of these logits; shapes and errors as in `distillation`."""
        return distillation(  # type: ignore[call-overload,misc,no-any-return]
            input, teacher, target, token_weight=token_weight, denominator=denominator,
            teacher_index=teacher_index, return_stats=self.return_stats, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options that were given."""
        given = dict(self.options) | ({"return_stats": True} if self.return_stats else {})
        return ", ".join(f"{k}={v!r}" for k, v in given.items())


def checked_options(name: str, options: DivergenceOptions) -> DivergenceOptions:
    """The options of a module, of which those that were given are checked.

    Raises:
        ValueError, TypeError: where a constant has no meaning, or there is no such option.
    """
    unknown = sorted(set(options) - set(DivergenceOptions.__annotations__))
    if unknown:
        raise TypeError(
            f"{name}: there is no option {unknown[0]!r} (what changes from batch to batch is an "
            "argument of the call); expected some of "
            f"{', '.join(sorted(DivergenceOptions.__annotations__))}"
        )
    ignore = options.get("ignore_index")
    Recipe(
        -100 if ignore is None else ignore,
        softcap=options.get("softcap"),
        logit_scale=options.get("logit_scale", 1.0),
        temperature=options.get("temperature", 1.0),
    ).check(name)
    Divergence(
        options.get("divergence", "forward_kl"),
        options.get("beta", 0.5),
        options.get("cross_entropy_weight", 0.0),
        options.get("teacher_softcap"),
        options.get("teacher_logit_scale", 1.0),
    ).check(name)
    check_reduction(name, options.get("reduction", "mean"), None)
    tokens_ahead(name, options.get("shift", False), 1)
    return options

"""`cross_entropy` over the tokens that carry loss, and its module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from sgp import dtensors
from sgp.labels import tokens_ahead
from sgp.reference import TokenLogProbs
from sgp.rows import operators, probabilities
from sgp.rows.autograd import RowLoss, ScalarLoss, apply, refuse_forward_mode
from sgp.rows.by_torch import Wanted
from sgp.rows.divisor import as_mean
from sgp.rows.problem import Problem, check_flags, check_mean_weights, check_tensor, make_problem
from sgp.rows.recipe import LossOptions, Recipe
from sgp.rows.reduction import (
    check_reduction,
    per_sequence,
    reciprocal,
    reduce_rows,
    sequence_z_loss,
    without_z_loss,
)
from sgp.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on

NAME = "sgp.cross_entropy"


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    inplace: bool = False,
    return_stats: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    inplace: bool = False,
    return_stats: Literal[True],
    return_argmax: bool = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, TokenLogProbs]: ...


def cross_entropy(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    shift: bool | int = False,
    inplace: bool = False,
    return_stats: bool = False,
    return_argmax: bool = False,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """Cross-entropy between logits and targets, for the price of the tokens that carry loss.

    Takes what `torch.nn.functional.cross_entropy` takes, by the same names and with the same
    meaning. Rows whose target is ignored are never read, whatever they hold (NaN included), and
    their gradient is exactly zero. On a GPU one kernel launch over the logits gives loss and
    gradient; besides it there are only operations on N numbers.

    Example:
        >>> import torch, sgp
        >>> logits = torch.log(torch.tensor([[0.2, 0.8], [0.8, 0.2]])).requires_grad_()
        >>> sgp.cross_entropy(logits, torch.tensor([-100, 0]))      # -log 0.8; row 0 is context
        tensor(0.2231, grad_fn=<ScalarLossBackward>)

    Args:
        input: logits, float32, float64, bfloat16 or float16; (V,), (N, V) or (N, V, d1, ...) as in
            PyTorch, any strides. With a Selection: (N, V) or (..., V) whose leading dimensions
            flatten to the Selection's N tokens.
        target: class indices (), (N,) or (N, d1, ...), integers; or class probabilities of the
            shape of `input`, of any float dtype and strides, with a gradient where they require
            one (on all rows; a class of probability 0 and logit -inf adds nothing); or a Selection.
        weight: (V,) weight of each class. Multiplies the cross-entropy, not the z-loss.
        ignore_index: targets of this value carry no loss; None means -100.
        reduction: "mean" (sum of losses / sum of `token_weight * weight[target]` over kept
            tokens, as PyTorch; the z-loss, which has no class weights, is divided by the sum of
            `token_weight`), "sum", "none" (shape of the target, 0 where ignored), "sequence_sum"
            or "sequence_mean" (one value a sequence: a row of a 2-D target, or a packed sequence of
            the Selection; 0 for one without targets).
        label_smoothing: eps in [0, 1]; that much of the target is spread over all classes.
        token_weight: weight of each token's whole loss, of the target's shape. A constant. A
            weight of 0 is not the same as ignored: the row is read and, if NaN, stays NaN.
        denominator: replaces the divisor of "mean", of the z-loss too: a number or a tensor of one
            element (never waited for). What gradient accumulation and data parallelism need: the
            count over the whole batch.
        softcap: logits become `softcap * tanh(logits / softcap)`, after `logit_scale`.
        logit_scale: multiplies the logits first.
        lse_square_scale: adds this times the squared log-sum-exp (z-loss) to each token's loss;
            token weights multiply it, class weights do not.
        shift: labels[..., t] is token t itself (Hugging Face's convention), so the row before it
            predicts it; labels and weights are moved along their last dimension, which is time, and
            `input` is not. A whole number k: row t predicts token t + k (multi-token prediction);
            True is 1. Logits (B, T, V) are passed as `logits.movedim(-1, 1)`, which copies nothing.
        inplace: write the gradient over `input` instead of a new tensor of its size. `input` must
            not be used afterwards (autograd notices where it is), and not be a leaf.
        return_stats: return (loss, TokenLogProbs): log-probability, entropy, log-sum-exp and
            is-top-1 of each token, detached, from the same launch.
        return_argmax: fill `argmax` of these statistics: the most probable class of each token.

    Returns:
        The loss in nats: float32 (float64 for float64 input), never rounded to `input`'s dtype.
        Shape () for "mean" and "sum", of the target for "none", (S,) for the sequence forms. A
        divisor of 0 gives 0 with zero gradients, where PyTorch gives NaN; a kept row whose loss is
        not finite gives NaN here too.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or constants that do not fit, repeated in
            the message; "mean" over negative token weights on a CPU.
        IndexError: a target outside [0, V), on a CPU or with SGP_CHECK=1. A GPU does not wait to
            check: such a row's loss and gradient are NaN.
        RuntimeError: a second backward through "mean" or "sum", or a second derivative (class
            probabilities in float64 or on a CPU have both).

    A DTensor sharded on the vocabulary goes to `sgp.parallel.cross_entropy`; one sharded on the
    batch or the sequence stays where it is, and "mean" divides by the count of all ranks. The
    result is a replicated DTensor, as under PyTorch's `loss_parallel`; that of "none" is sharded as
    the tokens are.

    Source: the formulas and their error are in `kernels/arithmetic.py`; z-loss from Chowdhery et
    al. 2022 (PaLM), softcap from Gemma Team 2024 (Gemma 2), smoothing from Szegedy et al. 2016.
    """
    if dtensors.is_dtensor(input, target):
        return dtensors.server().of_logits(  # type: ignore[no-any-return]
            cross_entropy, input, target, weight=weight, ignore_index=ignore_index,
            reduction=reduction, label_smoothing=label_smoothing, token_weight=token_weight,
            denominator=denominator, softcap=softcap, logit_scale=logit_scale,
            lse_square_scale=lse_square_scale, shift=shift, inplace=inplace,
            return_stats=return_stats, return_argmax=return_argmax,
        )  # fmt: skip
    check_flags(NAME, inplace=inplace, return_stats=return_stats, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale)
    problem = make_problem(NAME, input, target, weight, token_weight, recipe, shift=shift)
    denominator = check_reduction(NAME, reduction, denominator)
    check_argmax(NAME, return_stats, return_argmax)
    need_grad = torch.is_grad_enabled() and input.requires_grad
    if inplace and need_grad:
        check_inplace(NAME, input)
    if problem.has_probabilities():
        if inplace or return_stats:
            raise ValueError(
                f"{NAME}: inplace and return_stats need class indices; target holds class "
                f"probabilities {tuple(problem.target.shape)}"
            )
        return _probability_loss(problem, reduction, denominator)
    if not torch.compiler.is_compiling():
        refuse_forward_mode(NAME, input)
    # Only these two are one number times the sum over rows, whatever comes upstream.
    scalar = reduction in ("mean", "sum")
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(NAME, problem, denominator)
    fused = (
        scalar
        and need_grad
        and input.dtype != torch.float16
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001  (no public name)
    )
    rows = without_z_loss(problem, reduction)
    of_lse = rows is not problem
    wanted = Wanted(stats=return_stats or of_lse, argmax=return_argmax)
    loss, stats = _row_losses(rows, scale, fused, need_grad, wanted, of_lse, inplace)
    if not fused:
        loss = reduce_rows(problem, loss, reduction, scale)
    if of_lse:
        loss = loss + sequence_z_loss(problem, stats[2])
        stats = (*stats[:2], stats[2].detach(), *stats[3:])
    if not return_stats:
        return loss
    return loss, token_statistics(problem, stats, return_argmax)


def _row_losses(
    problem: Problem,
    scale: Tensor | None,
    fused: bool,
    need_grad: bool,
    wanted: Wanted,
    of_lse: bool,
    inplace: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(reduced loss if fused, else one loss a row; the statistics).

    The log-sum-exp is differentiable where `of_lse` asks for it.
    """
    p = problem
    out: tuple[Tensor, ...]
    if fused:
        out = apply(
            ScalarLoss, p.input, p.target, p.weight, p.token_weight, scale, p.recipe, wanted,
            inplace,
        )  # fmt: skip
        return out[0], out[1:6]
    if need_grad:
        out = apply(
            RowLoss, p.input, p.target, p.weight, p.token_weight, p.recipe, wanted, of_lse,
            inplace,
        )  # fmt: skip
        return out[0], out[1:6]
    loss, _, *stats, _ = operators.row_forward(
        p.input.detach(), p.target, p.weight, p.token_weight, None, p.recipe, wanted
    )
    return loss, tuple(stats)


def token_statistics(problem: Problem, stats: Sequence[Tensor], need_argmax: bool) -> TokenLogProbs:
    """The statistics of rows (N,), of which the last is `argmax`, in the shape of the target."""
    return TokenLogProbs(*map(problem.shaped, stats[: 4 + need_argmax]))


def check_argmax(name: str, return_stats: bool, return_argmax: bool) -> None:
    """Refuse to find an argmax that would not be returned."""
    if return_argmax and not return_stats:
        raise ValueError(
            f"{name}: return_argmax=True fills a field of the statistics; pass return_stats=True "
            "too"
        )


def _probability_loss(
    problem: Problem, reduction: str, denominator: float | Tensor | None
) -> Tensor:
    """Class probabilities, on all rows: a mean divides by how many there are, or by weights."""
    p = problem
    r = p.token_weight
    scale = None
    if reduction == "mean":
        if denominator is None:
            if r is not None:
                check_mean_weights(NAME, torch.ones_like(r, dtype=torch.bool), r)
            denominator = math.prod(p.shape) if r is None else r.sum()
        _, scale = as_mean(NAME, p, denominator)
    if reduction in ("mean", "sum"):
        total = probabilities.weighted_sum(p, scale)
        if total is not None:
            return total
    rows = probabilities.row_losses(p)
    rows = rows if r is None else rows * r
    if reduction == "sequence_mean":
        counts = torch.ones_like(rows) if r is None else r
        return per_sequence(p, rows) * reciprocal(per_sequence(p, counts), rows.dtype)
    return reduce_rows(p, rows, reduction, scale)


def check_inplace(name: str, input: Tensor) -> None:  # noqa: A002
    """Refuse an input whose place cannot take its gradient.

    Raises:
        ValueError, RuntimeError: with what was passed.
    """
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001  (no public name)
        raise RuntimeError(f"{name}: inplace=True does not work under torch.func transforms")
    base = input if input._base is None else input._base  # noqa: SLF001  (no public name)
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{name}: inplace=True would overwrite input {tuple(input.shape)}, a leaf that "
            "requires grad or a view of one, with its gradient; pass the output of a layer, or "
            "inplace=False"
        )
    reach = 0  # how far the dimensions of smaller stride go
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= reach and input.numel():
            raise ValueError(
                f"{name}: inplace=True needs one place for each gradient, but input "
                f"{tuple(input.shape)} with strides {input.stride()} overlaps itself"
            )
        reach += (size - 1) * stride


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` as a module, with its keywords; a thin shell, drop-in for PyTorch's.

    Example:
        >>> loss_function = sgp.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss_function(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)

    Args:
        weight: (V,) class weights, a buffer that moves with the module.
        ignore_index, reduction, label_smoothing, softcap, logit_scale, lse_square_scale, shift,
            inplace, return_stats, return_argmax: as in `cross_entropy`.

    `token_weight` and `denominator` change from batch to batch: give them to the call.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        shift: bool | int = False,
        inplace: bool = False,
        return_stats: bool = False,
        return_argmax: bool = False,
    ) -> None:
        super().__init__()
        name = "sgp.CrossEntropyLoss"
        check_flags(name, inplace=inplace, return_stats=return_stats, return_argmax=return_argmax)
        if weight is not None:
            check_tensor(name, "weight", weight)
        self.register_buffer("weight", weight)
        self.ignore_index = -100 if ignore_index is None else ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.shift = shift
        self.inplace = inplace
        self.return_stats, self.return_argmax = return_stats, return_argmax
        check_reduction(name, reduction, None)
        check_argmax(name, return_stats, return_argmax)
        tokens_ahead(name, shift, 1)
        Recipe(self.ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale).check(
            name
        )

    def forward(
        self,
        input: Tensor,  # noqa: A002
        target: Tensor | Selection,
        *,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenLogProbs]:
        """The loss of these logits; shapes and errors as in `cross_entropy`."""
        return cross_entropy(  # type: ignore[call-overload,misc,no-any-return]
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            denominator=denominator,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            shift=self.shift,
            inplace=self.inplace,
            return_stats=self.return_stats,
            return_argmax=self.return_argmax,
        )

    def extra_repr(self) -> str:
        """The options that are not at their default."""
        defaults = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "softcap": None,
            "logit_scale": 1.0,
            "lse_square_scale": 0.0,
            "shift": False,
            "inplace": False,
            "return_stats": False,
            "return_argmax": False,
        }
        shown = {k: getattr(self, k) for k, v in defaults.items() if getattr(self, k) != v}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())

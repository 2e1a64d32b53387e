"""`linear_cross_entropy`: a linear head and its loss over the tokens that carry loss."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sgp import dtensors
from sgp.head.autograd import (
    LINEAR_CROSS_ENTROPY,
    HeadOptions,
    HeadRowLoss,
    HeadScalarLoss,
    head_options,
    linear_head,
)
from sgp.head.calls import LinearHead
from sgp.head.chunks import check_sizes
from sgp.head.problem import Pieces, check_head, make_head_problem
from sgp.labels import tokens_ahead
from sgp.losses import check_argmax, cross_entropy, token_statistics
from sgp.reference import TokenLogProbs
from sgp.rows.autograd import apply, refuse_forward_mode
from sgp.rows.by_torch import Wanted
from sgp.rows.divisor import as_mean
from sgp.rows.problem import Problem, check_flags, check_tensor
from sgp.rows.recipe import LossOptions, Recipe, shown
from sgp.rows.reduction import check_reduction, reduce_rows, sequence_z_loss, without_z_loss
from sgp.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on

NAME = LINEAR_CROSS_ENTROPY


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    accumulate_into: Tensor | None = None,
    return_stats: Literal[False] = False,
    return_argmax: Literal[False] = False,
    options: object = None,
    **loss: Unpack[LossOptions],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    accumulate_into: Tensor | None = None,
    return_stats: Literal[True],
    return_argmax: bool = False,
    options: object = None,
    **loss: Unpack[LossOptions],
) -> tuple[Tensor, TokenLogProbs]: ...


def linear_cross_entropy(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    shift: bool | int = False,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    accumulate_into: Tensor | None = None,
    return_stats: bool = False,
    return_argmax: bool = False,
    options: object = None,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """`cross_entropy(input @ linear_weight.T + linear_bias, target)` without the N x V logits.

    Takes what `torch.nn.functional.linear_cross_entropy` takes, by the same names and with the
    same meaning. Rows whose target is ignored are never read, whatever they hold (NaN included):
    the M kept rows are gathered first, and their logits are made, used and forgotten in pieces.
    Under `torch.autocast` the matmuls' operands have the autocast dtype.

    Example:
        >>> import torch, sgp
        >>> hidden = torch.randn(2, 5, 8, requires_grad=True)       # (B, T, D) of a backbone
        >>> head = torch.nn.Linear(8, 11, bias=False)               # (V, D)
        >>> labels = torch.randint(11, (2, 5))                      # token ids: shift them
        >>> labels[:, :3] = -100                                    # context
        >>> loss = sgp.linear_cross_entropy(hidden, head.weight, labels, shift=True)
        >>> loss.backward()
        >>> hidden.grad.abs().sum(-1) > 0                # the row before a token predicts it
        tensor([[False, False,  True,  True, False],
                [False, False,  True,  True, False]])

    Args:
        input: hidden states, float32, float64, bfloat16 or float16; (D,), (N, D) or (..., D), any
            strides, never copied as a whole.
        linear_weight: (V, D), in the dtype of `input` unless autocast is on.
        target: class indices of `input`'s leading shape, or flattened to (N,); or a Selection of N
            tokens. Labels on a GPU cost one wait for the device, which counts them; a Selection
            costs none. Class probabilities, and PyTorch's K-dimensional `linear_weight`
            (V, d1, ..., D), run `F.linear` and `cross_entropy` on whole logits of every row.
        linear_bias: (V,) or None.
        weight, ignore_index, reduction, label_smoothing, token_weight, denominator, softcap,
            logit_scale, lse_square_scale: as in `cross_entropy`. Compiled, a Python number that
            changes from call to call makes a graph for each value: pass a denominator as a tensor.
        shift: labels[..., t] is token t itself (Hugging Face's convention), so the row before it
            predicts it; labels and weights are moved, `input` is not: pass both whole. Flat labels
            (T,) are one sequence; for several use Selection.from_labels(cu_seqlens=). Results a
            token stand at the row that predicts it, so that the last of a sequence is 0. A whole
            number k: row t predicts token t + k (multi-token prediction); True is 1.
        chunk_rows: rows of float32 logits at once, `4 V` bytes each, each chunk added to the
            gradients before the next is made. None: by the planner (`sgp/head/chunks.py`).
        memory_budget: the most bytes that the call may hold at once beyond its inputs, its results
            and gradients; the planner takes the fastest way that fits, always with float32 sums.
            None: as many as a chunk, of equal ones of at most 4096 rows, and a float32 sum of the
            weight's gradient take, or 1024 rows with a frozen head, because more would be little
            faster; on a CPU 256 MiB of logits. `sgp plan` shows the ways.
        accumulate_into: a float32 tensor like `linear_weight` (float64 for a float64 one), to which
            its gradient is added in backward, such as Megatron's `main_grad`; `linear_weight.grad`
            gets nothing. Any backward through the call adds. Refused for a weight that is no leaf
            or has hooks on its gradient, inside DDP, for DTensors and under torch.compile; FSDP2
            would not reduce what is added in a module's forward, and cannot be recognised there.
        return_stats, return_argmax: return (loss, TokenLogProbs), detached, from the same pass; as
            in `cross_entropy`.
        options: PyTorch's, accepted and ignored.

    Returns:
        The loss in nats, float32 (float64 for float64 input); shapes as in `cross_entropy`.

    Cost: matmuls take `6 M V D` floating-point operations with gradients for "mean" and "sum",
    `8 M V D` where a small budget makes the logits twice; `4 M V D` with one side frozen, `2 M V D`
    without gradients. Reductions with an upstream gradient a token or a sequence, and
    `accumulate_into`, make the logits again in backward: `8 M V D`, `6 M V D` where only
    `linear_weight` requires grad, `4 M V D` where only `input` does; a `memory_budget` with room
    for all float32 logits, `4 M V` bytes, holds them until then and saves `2 M V D`. The bytes of
    every way are in `sgp/head/chunks.py`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or constants that do not fit; a budget that
            no way fits, with the least that one takes.
        IndexError: a target outside [0, V), on a CPU or with SGP_CHECK=1. On a GPU the loss and
            gradients become NaN.
        RuntimeError: a second backward through "mean" or "sum", or a second derivative.

    A `linear_weight` that is a DTensor sharded on its rows goes to
    `sgp.parallel.linear_cross_entropy`; `input` may be a DTensor too, sharded over its tokens
    (sequence parallelism): it is gathered, and its gradient reduced and scattered. Over ranks that
    have the same head it stays where it is, and "mean" divides by the count of all of them.

    Source: the row's formulas are in `kernels/arithmetic.py`; gradients in forward, a few rows at
    a time, as in Hsu et al. 2024 (Liger Kernel) and Wijmans et al. 2024 (Cut Your Losses).
    """
    del options
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale)
    if dtensors.is_dtensor(input, linear_weight, linear_bias, target):
        return dtensors.server().of_head(  # type: ignore[no-any-return]
            linear_cross_entropy, input, linear_weight, target, linear_bias, weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            token_weight=token_weight, denominator=denominator, softcap=softcap,
            logit_scale=logit_scale, lse_square_scale=lse_square_scale, shift=shift,
            chunk_rows=chunk_rows, memory_budget=memory_budget, accumulate_into=accumulate_into,
            return_stats=return_stats, return_argmax=return_argmax,
        )  # fmt: skip
    check_flags(NAME, return_stats=return_stats, return_argmax=return_argmax)
    denominator = check_reduction(NAME, reduction, denominator)
    check_argmax(NAME, return_stats, return_argmax)
    pieces = Pieces(chunk_rows, memory_budget, accumulate_into, linear_weight)
    check_head(NAME, input, linear_weight, linear_bias, target)
    pieces.check(NAME, linear_weight)
    if linear_weight.dim() > 2 or (isinstance(target, Tensor) and target.is_floating_point()):
        pieces.refuse(NAME)
        return _whole_logits(
            input, linear_weight, target, linear_bias, shift, weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            token_weight=token_weight, denominator=denominator, softcap=softcap,
            logit_scale=logit_scale, lse_square_scale=lse_square_scale, return_stats=return_stats,
            return_argmax=return_argmax,
        )  # fmt: skip
    refuse_forward_mode(NAME, input, linear_weight, linear_bias)
    problem = make_head_problem(
        NAME, input, linear_weight, target, weight, token_weight, recipe, shift=shift
    )
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(NAME, problem, denominator)
    head = linear_head(linear_weight, linear_bias, target, problem)
    wanted = Wanted(stats=return_stats, argmax=return_argmax)
    chosen = head_options(problem.recipe, head, pieces, wanted, name=NAME)
    return head_loss(problem, head, scale, chosen, reduction)


def head_loss(
    problem: Problem, head: LinearHead, scale: Tensor | None, options: HeadOptions, reduction: str
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """The loss, and the statistics where `options` want them, of what has been checked."""
    if (
        reduction in ("mean", "sum")
        and any(options.call.needs)
        and not options.must_be_late()
        and not torch._C._are_functorch_transforms_active()  # noqa: SLF001  (no public name)
    ):
        loss, stats = _scalar_loss(problem, head, scale, options)
    else:
        plain = without_z_loss(problem, reduction)
        of_lse = plain is not problem
        if of_lse:
            with_lse = options.call.wanted._replace(stats=True)
            call = options.call._replace(recipe=plain.recipe, wanted=with_lse)
            asked = options._replace(call=call, of_lse=True)
        else:
            asked = options
        rows, stats = _row_losses(plain, head, asked.in_backward())
        loss = reduce_rows(problem, rows, reduction, scale)
        if of_lse:
            loss = loss + sequence_z_loss(problem, stats[2])
            stats = (*stats[:2], stats[2].detach(), *stats[3:])
    wanted = options.call.wanted
    if not wanted.stats:
        return loss
    return loss, token_statistics(problem, stats, wanted.argmax)


def _scalar_loss(
    problem: Problem, head: LinearHead, scale: Tensor | None, options: HeadOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(loss (), the statistics), the gradients computed with them."""
    p = problem
    out: tuple[Tensor, ...] = apply(HeadScalarLoss, *head, p.weight, p.token_weight, scale, options)
    return out[0], out[1:6]


def _row_losses(
    problem: Problem, head: LinearHead, options: HeadOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(one loss a row (N,), the statistics), the gradients computed in backward."""
    p, o = problem, options
    out: tuple[Tensor, ...]
    if any(o.call.needs):
        out = apply(HeadRowLoss, *head, p.weight, p.token_weight, o)
        return out[0], out[1:6]
    (loss, _, *stats, _, _, _), _ = o.forward(o.losses(), head.detached(), p.weight, p.token_weight)
    return loss, tuple(stats)


def _whole_logits(
    input: Tensor,  # noqa: A002
    linear_weight: Tensor,
    target: Tensor | Selection,
    linear_bias: Tensor | None,
    shift: bool | int,
    weight: Tensor | None,
    **loss: Any,
) -> Tensor | tuple[Tensor, TokenLogProbs]:
    """K-dimensional weights and class probabilities, by `F.linear` and `cross_entropy`."""
    if tokens_ahead(NAME, shift, 1) or isinstance(target, Selection):
        raise ValueError(
            f"{NAME}: shift and Selection need class indices and a linear_weight (V, D); got "
            f"linear_weight {tuple(linear_weight.shape)}, shift={shift} and a target "
            f"{tuple(target.shape)}"
            + (f" of {target.dtype}" if isinstance(target, Tensor) else " Selection")
        )
    *places, D = linear_weight.shape
    size = math.prod(places)
    bias = None if linear_bias is None else linear_bias.reshape(size)
    if len(places) > 1 and input.dim() != 2:
        raise ValueError(
            f"{NAME}: input is {tuple(input.shape)}; a linear_weight of "
            f"{tuple(linear_weight.shape)} needs input (N, D)"
        )
    logits = F.linear(input, linear_weight.reshape(size, D), bias)
    logits = logits.unflatten(-1, places) if len(places) > 1 else logits
    if input.dim() > 2:  # cross_entropy has the classes second
        logits, target = logits.movedim(-1, 1), target.movedim(-1, 1)
    result: Tensor | tuple[Tensor, TokenLogProbs] = cross_entropy(logits, target, weight, **loss)
    return result


def check_size(name: str, label: str, value: Any) -> None:
    """Raise TypeError or ValueError for what is no size of a dimension."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: {label} = {shown(value)}; expected a whole number")
    if not 0 < int(value) < 2**63:
        raise ValueError(f"{name}: {label} = {value}; expected at least 1, and an int64")


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with the head inside, drop-in for PyTorch's module of that name.

    Example:
        >>> loss_function = sgp.LinearCrossEntropyLoss(8, 11)       # self.linear: 8 -> 11
        >>> loss_function(torch.zeros(2, 8), torch.tensor([1, -100]))
        tensor(2.3979, grad_fn=<HeadScalarLossBackward>)
        >>> loss_function.linear = torch.nn.Linear(8, 11)           # or a model's own head

    Args:
        in_features: D.
        num_classes: V.
        out_features: PyTorch's K further dimensions of the weight, usually none.
        bias: whether the head has one.
        device, dtype: of the head.
        weight: (V,) class weights, a buffer that moves with the module.
        reduction, ignore_index, label_smoothing, softcap, logit_scale, lse_square_scale, shift,
            chunk_rows, memory_budget, return_stats, return_argmax, options: as in
            `linear_cross_entropy`.

    `token_weight` and `denominator` change from batch to batch: give them to the call, and
    `accumulate_into` with them.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        shift: bool | int = False,
        chunk_rows: int | None = None,
        memory_budget: int | None = None,
        return_stats: bool = False,
        return_argmax: bool = False,
        options: object = None,
    ) -> None:
        super().__init__()
        name = "sgp.LinearCrossEntropyLoss"
        sizes = {"in_features": in_features, "num_classes": num_classes}
        for label, value in sizes.items():
            check_size(name, label, value)
        if not isinstance(out_features, (tuple, list)):
            raise TypeError(f"{name}: out_features = {shown(out_features)}; expected a tuple")
        for value in out_features:
            check_size(name, "out_features", value)
        check_flags(name, bias=bias, return_stats=return_stats, return_argmax=return_argmax)
        check_reduction(name, reduction, None)
        check_argmax(name, return_stats, return_argmax)
        check_sizes(name, chunk_rows, memory_budget)
        tokens_ahead(name, shift, 1)
        ignore = -100 if ignore_index is None else ignore_index
        Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale).check(name)
        if weight is not None:
            check_tensor(name, "weight", weight)
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"{name}: weight is {tuple(weight.shape)}; expected ({num_classes},), one a class"
            )
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        size = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, size, bias=bias, device=device, dtype=dtype)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.softcap = label_smoothing, softcap
        self.logit_scale, self.lse_square_scale = logit_scale, lse_square_scale
        self.shift = shift
        self.chunk_rows, self.memory_budget = chunk_rows, memory_budget
        self.return_stats, self.return_argmax = return_stats, return_argmax
        self.options = options

    def forward(
        self,
        input: Tensor,  # noqa: A002
        target: Tensor | Selection,
        *,
        token_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        accumulate_into: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, TokenLogProbs]:
        """The loss of these hidden states; shapes and errors as in `linear_cross_entropy`."""
        head_weight, head_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            places = (self.num_classes, *self.out_features)
            head_weight = head_weight.unflatten(0, places)
            head_bias = None if head_bias is None else head_bias.unflatten(0, places)
        return linear_cross_entropy(  # type: ignore[call-overload,misc,no-any-return]
            input,
            head_weight,
            target,
            linear_bias=head_bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            token_weight=token_weight,
            denominator=denominator,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            shift=self.shift,
            chunk_rows=self.chunk_rows,
            memory_budget=self.memory_budget,
            accumulate_into=accumulate_into,
            return_stats=self.return_stats,
            return_argmax=self.return_argmax,
        )

    def extra_repr(self) -> str:
        """The options that are not at their default."""
        defaults = {
            "out_features": (),
            "ignore_index": None,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "softcap": None,
            "logit_scale": 1.0,
            "lse_square_scale": 0.0,
            "shift": False,
            "chunk_rows": None,
            "memory_budget": None,
            "return_stats": False,
            "return_argmax": False,
        }
        shown = {k: getattr(self, k) for k, v in defaults.items() if getattr(self, k) != v}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())

"""The functions of a split vocabulary: check, agree with the other ranks, dispatch, reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from sgp.head.autograd import head_options
from sgp.head.problem import Pieces
from sgp.linear import head_loss
from sgp.log_probs import head_statistics
from sgp.losses import check_argmax, check_inplace, token_statistics
from sgp.parallel.autograd import Call, ShardLogits
from sgp.parallel.problem import (
    agree_on_head,
    agree_on_logits,
    check_weight_length,
    head_problem,
    logits_problem,
    weight_of_any_length,
)
from sgp.parallel.rows import ShardRows
from sgp.parallel.shard import Group
from sgp.reference import TokenLogProbs
from sgp.rows.autograd import apply
from sgp.rows.by_torch import Wanted
from sgp.rows.divisor import as_mean
from sgp.rows.problem import check_flags
from sgp.rows.recipe import LossOptions, Recipe
from sgp.rows.reduction import check_reduction, reduce_rows, sequence_z_loss, without_z_loss
from sgp.rows.watched import not_compiled
from sgp.selection import Selection

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's from Python 3.11 on


@overload
def cross_entropy(
    local_logits: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    return_stats: Literal[False] = False,
    return_argmax: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> Tensor: ...


@overload
def cross_entropy(
    local_logits: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    return_stats: Literal[True],
    return_argmax: bool = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, TokenLogProbs]: ...


@not_compiled
def cross_entropy(
    local_logits: Tensor,
    target: Tensor | Selection,
    weight: Tensor | None = None,
    *,
    group: Group = None,
    vocab_size: int | None = None,
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
    """`sgp.cross_entropy` of logits whose vocabulary is split over the ranks of a group.

    Example:
        >>> # under torchrun, with a head of V / P rows on each of P ranks
        >>> logits = hidden @ local_head.T                          # doctest: +SKIP
        >>> loss = sgp.parallel.cross_entropy(logits, labels)       # doctest: +SKIP

    Args:
        local_logits: this rank's columns, where `sgp.cross_entropy` has V: (N, V_r),
            (N, V_r, d1, ...), or (..., V_r) with a Selection. Rank order is vocabulary order;
            shards may be uneven, or empty.
        target: class indices in [0, V), or a Selection; the same on every rank.
        weight: class weights of the whole vocabulary (V,).
        group: a ProcessGroup, a one-dimensional DeviceMesh, or None for all ranks.
        vocab_size: V, where the shards together have more columns: the last ones are padding, are
            not read, and get a gradient of zero. None: all columns count, and two ranks with the
            same ones (by a sample of 64 values, zeros aside) are an error: each was probably given
            the whole vocabulary.
        ignore_index, reduction, label_smoothing, token_weight, denominator, softcap, logit_scale,
            lse_square_scale, shift, inplace, return_stats, return_argmax: as in
            `sgp.cross_entropy`. Class probabilities are refused.

    Returns:
        As `sgp.cross_entropy`, the same bits on every rank. The gradient is computed in backward,
        which needs no exchange and reads the kept logits again: `(1 + 2 f) N V_r` elements in all.

    Exchanged: 96 bytes a call, and 16 bytes a kept row (8 more with `return_stats`, or for
    "sequence_mean" with class weights and a z-loss; 4 more each with `return_argmax` and
    `label_smoothing`; twice as many for float64), sent by each rank to every other in one
    all-gather. Labels on a GPU cost one wait for the device, which counts them;
    a Selection costs none but that of the first call, which learns the shards' sizes.

    Raises:
        ValueError, TypeError, IndexError: as `sgp.cross_entropy`; and ValueError on every rank
            where they were not called alike, or two have the same part of the vocabulary: on a CPU
            and with SGP_CHECK=1 always, on a GPU in the first call. Later the loss is NaN where
            they were not called alike, or, where the number of kept rows or an option that changes
            what is exchanged differs, the exchange fails or times out.
        RuntimeError: no process group; a rank that died or did not answer within the group's
            time-out; `torch.func` transforms. `torch.compile` breaks the graph here.

    Source: Shoeybi et al. 2019 (Megatron-LM), section 3; the joined formulas are in
    `sgp/parallel/rows.py`.
    """
    name = "sgp.parallel.cross_entropy"
    check_flags(name, inplace=inplace, return_stats=return_stats, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale)
    denominator = check_reduction(name, reduction, denominator)
    check_argmax(name, return_stats, return_argmax)
    problem = logits_problem(name, local_logits, target, token_weight, recipe, shift)
    need_grad = torch.is_grad_enabled() and local_logits.requires_grad
    if inplace and need_grad:
        check_inplace(name, local_logits)
    problem = problem._replace(weight=weight_of_any_length(name, weight, local_logits))
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(name, problem, denominator)
    options = (reduction, inplace, return_stats, return_argmax)
    shard, rows = agree_on_logits(name, group, problem, target, vocab_size, scale, options)
    check_weight_length(name, weight, shard)
    plain = without_z_loss(problem, reduction)
    of_lse = plain is not problem
    wanted = Wanted(stats=return_stats or of_lse, argmax=return_argmax)
    call = Call(shard, plain.recipe, wanted, of_lse=of_lse, inplace=inplace)
    out: tuple[Tensor, ...] = apply(
        ShardLogits, problem.input, problem.target, rows, problem.weight, problem.token_weight, call
    )
    loss, stats = reduce_rows(problem, out[0], reduction, scale), out[1:6]
    if of_lse:
        loss = loss + sequence_z_loss(problem, stats[2])
        stats = (*stats[:2], stats[2].detach(), *stats[3:])
    loss = shard.checked(loss)
    if not return_stats:
        return loss
    return loss, token_statistics(problem, stats, return_argmax)


@overload
def linear_cross_entropy(
    input: Tensor,
    local_weight: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
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
    local_weight: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
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


@not_compiled
def linear_cross_entropy(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    local_weight: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
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
    """`sgp.linear_cross_entropy` with a head whose rows are split over the ranks of a group.

    Example:
        >>> # under torchrun, with a head of V / P rows on each of P ranks
        >>> loss = sgp.parallel.linear_cross_entropy(               # doctest: +SKIP
        ...     hidden, local_head, labels, shift=True)

    Args:
        input: hidden states (..., D), the same on every rank (they are not compared).
        local_weight: this rank's rows of the head (V_r, D), in rank order; maybe uneven or none.
        target: class indices in [0, V), or a Selection; the same on every rank.
        group, vocab_size: as in `cross_entropy`; rows of padding get a gradient of zero.
        sum_input_grad: sum the gradient of `input` over the ranks, so that every rank has the whole
            one. False leaves each rank its own part: for what sums it in its own backward, as the
            all-gather of sequence parallelism does by a reduce-scatter.
        linear_bias: this rank's part (V_r,) or None.
        weight: class weights of the whole vocabulary (V,).
        ignore_index, reduction, label_smoothing, token_weight, denominator, softcap, logit_scale,
            lse_square_scale, shift, chunk_rows, return_stats, return_argmax: as in
            `sgp.linear_cross_entropy`. All ranks plan by the largest part.
        memory_budget: as in `sgp.linear_cross_entropy`, the same on every rank: what the rank with
            the largest shard may hold, by which all of them plan.
        accumulate_into: this rank's part (V_r, D), on every rank or on none.
        options: PyTorch's, accepted and ignored.

    Returns:
        As `sgp.linear_cross_entropy`, the same bits on every rank.

    Exchanged: what `cross_entropy` does, one all-gather a chunk; and where `input` requires grad,
    its gradient on the kept rows, 4 D bytes each (8 D for float64), summed by an all-reduce that
    goes on beside the matmul of `local_weight`'s gradient. For "mean" and "sum" all of it happens
    in forward; other reductions, `accumulate_into`, and a float16 head's `memory_budget` sum that
    gradient in backward, which every rank has to run.
    Float operations: `6 M V_r D` as in `sgp.linear_cross_entropy`.

    Raises:
        As `cross_entropy`, and as `sgp.linear_cross_entropy` for its arguments.

    Source: as `cross_entropy`, and `sgp/head/algorithm.py`.
    """
    del options
    name = "sgp.parallel.linear_cross_entropy"
    flags = {"return_stats": return_stats, "return_argmax": return_argmax}
    check_flags(name, sum_input_grad=sum_input_grad, **flags)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, label_smoothing, softcap, logit_scale, lse_square_scale)
    denominator = check_reduction(name, reduction, denominator)
    check_argmax(name, return_stats, return_argmax)
    pieces = Pieces(chunk_rows, memory_budget, accumulate_into, local_weight)
    problem, head = head_problem(
        name, input, local_weight, linear_bias, target, token_weight, recipe, pieces, shift
    )
    problem = problem._replace(weight=weight_of_any_length(name, weight, input))
    scale = None
    if reduction == "mean":
        problem, scale = as_mean(name, problem, denominator)
    asked = (reduction, return_stats, return_argmax, *pieces.asked(), sum_input_grad)
    shard, head = agree_on_head(
        name, group, problem, head, vocab_size, scale, asked, sums_input_grad=sum_input_grad
    )
    check_weight_length(name, weight, shard)
    wanted = Wanted(stats=return_stats, argmax=return_argmax)
    pieces = pieces.of_classes(shard.size)
    chosen = head_options(problem.recipe, head, pieces, wanted, ShardRows(shard), name=name)
    result = head_loss(problem, head, scale, chosen, reduction)
    if isinstance(result, Tensor):
        return shard.checked(result)
    return shard.checked(result[0]), result[1]


@not_compiled
def token_log_probs(
    local_logits: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    return_argmax: bool = False,
) -> TokenLogProbs:
    """`sgp.token_log_probs` of logits whose vocabulary is split over the ranks of a group.

    Example:
        >>> result = sgp.parallel.token_log_probs(local_logits, completions)    # doctest: +SKIP

    Args:
        local_logits, target, group, vocab_size: as in `cross_entropy`.
        ignore_index, temperature, softcap, logit_scale, shift, return_argmax: as in
            `sgp.token_log_probs`.

    Returns:
        As `sgp.token_log_probs`, the same bits on every rank; 24 bytes exchanged a kept row, 28
        with `return_argmax`.

    Raises:
        As `cross_entropy`.
    """
    name = "sgp.parallel.token_log_probs"
    check_flags(name, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    problem = logits_problem(name, local_logits, target, None, recipe, shift)
    shard, rows = agree_on_logits(name, group, problem, target, vocab_size, None, (return_argmax,))
    wanted = Wanted(stats=True, argmax=return_argmax)
    call = Call(shard, problem.recipe, wanted, of_stats=True)
    out: tuple[Tensor, ...] = apply(
        ShardLogits, problem.input, problem.target, rows, None, None, call
    )
    return token_statistics(problem, out[1:6], return_argmax)


@not_compiled
def linear_token_log_probs(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    local_weight: Tensor,
    target: Tensor | Selection,
    *,
    group: Group = None,
    vocab_size: int | None = None,
    sum_input_grad: bool = True,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
    accumulate_into: Tensor | None = None,
    return_argmax: bool = False,
) -> TokenLogProbs:
    """`sgp.linear_token_log_probs` with a head whose rows are split over the ranks of a group.

    Example:
        >>> result = sgp.parallel.linear_token_log_probs(           # doctest: +SKIP
        ...     hidden, local_head, completions, shift=True)

    Args:
        input, local_weight, target, group, vocab_size, sum_input_grad, linear_bias: as in
            `linear_cross_entropy`.
        ignore_index, temperature, softcap, logit_scale, shift, chunk_rows, return_argmax: as in
            `sgp.linear_token_log_probs`.
        memory_budget, accumulate_into: as in `linear_cross_entropy`.

    Returns:
        As `sgp.linear_token_log_probs`, the same bits on every rank. The gradient of `input` is
        summed in backward, which every rank has to run.

    Raises:
        As `linear_cross_entropy`.
    """
    name = "sgp.parallel.linear_token_log_probs"
    check_flags(name, sum_input_grad=sum_input_grad, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    pieces = Pieces(chunk_rows, memory_budget, accumulate_into, local_weight)
    problem, head = head_problem(
        name, input, local_weight, linear_bias, target, None, recipe, pieces, shift
    )
    asked = (*pieces.asked(), sum_input_grad, return_argmax)
    shard, head = agree_on_head(
        name, group, problem, head, vocab_size, None, asked, sums_input_grad=sum_input_grad
    )
    wanted = Wanted(stats=True, argmax=return_argmax)
    pieces = pieces.of_classes(shard.size)
    chosen = head_options(problem.recipe, head, pieces, wanted, ShardRows(shard), name=name)
    return head_statistics(problem, head, chosen)

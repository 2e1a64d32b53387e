"""Per-token log-probability, entropy and log-sum-exp: what DPO, GRPO and KTO train on."""

from __future__ import annotations

import torch
from torch import Tensor

from sgp import dtensors
from sgp.head.autograd import (
    LINEAR_LOG_PROBS,
    HeadOptions,
    HeadStatistics,
    head_options,
    linear_head,
)
from sgp.head.calls import LinearHead
from sgp.head.problem import Pieces, check_head, make_head_problem
from sgp.losses import token_statistics
from sgp.reference import TokenLogProbs
from sgp.rows import operators
from sgp.rows.autograd import LOG_PROBS, RowStatistics, apply, refuse_forward_mode
from sgp.rows.by_torch import Wanted
from sgp.rows.problem import Problem, check_flags, make_problem
from sgp.rows.recipe import Recipe
from sgp.selection import Selection


def token_log_probs(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    target: Tensor | Selection,
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool | int = False,
    return_argmax: bool = False,
) -> TokenLogProbs:
    """What each row of logits says about its target, from one read of the kept rows.

    Example:
        >>> logits = torch.log(torch.tensor([[0.8, 0.2], [0.5, 0.5]]))
        >>> result = sgp.token_log_probs(logits, torch.tensor([1, -100]))
        >>> result.log_prob.exp()
        tensor([0.2000, 1.0000])
        >>> result.entropy, result.is_top1          # -0.8 log 0.8 - 0.2 log 0.2
        (tensor([0.5004, 0.0000]), tensor([False, False]))

    Args:
        input: logits as in `sgp.cross_entropy`: (V,), (N, V), (N, V, d1, ...); with a Selection
            (..., V). Ignored rows are not read.
        target: class indices, or a Selection.
        ignore_index: targets of this value get zeros; None means -100.
        temperature: divides the scored logits, after scale and softcap.
        softcap, logit_scale, shift: as in `sgp.cross_entropy`.
        return_argmax: fill `argmax`, the most probable class, from the same read of the logits.

    Returns:
        TokenLogProbs of the target's shape: `log_prob`, `entropy` and `lse` in nats, float32
        (float64 for float64 input), differentiable; `is_top1`, whether no class is more probable
        than the target (see TokenLogProbs for ties); `argmax`, None where it is not asked for.
        Zero (False) where ignored. The backward reads the logits once more and
        serves any upstream gradient of the three; it can be repeated with retain_graph=True.

    Raises:
        ValueError, TypeError, IndexError: as `sgp.cross_entropy`.
        RuntimeError: a second derivative.

    Source: the formulas are in `kernels/arithmetic.py`.
    """
    if dtensors.is_dtensor(input, target):
        return dtensors.server().of_logits(  # type: ignore[no-any-return]
            token_log_probs, input, target, ignore_index=ignore_index, temperature=temperature,
            softcap=softcap, logit_scale=logit_scale, shift=shift, return_argmax=return_argmax,
        )  # fmt: skip
    check_flags(LOG_PROBS, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    problem = make_problem(LOG_PROBS, input, target, None, None, recipe, shift=shift)
    if problem.has_probabilities():
        raise TypeError(f"{LOG_PROBS}: target is {problem.target.dtype}; expected class indices")
    refuse_forward_mode(LOG_PROBS, input)
    out: tuple[Tensor, ...]
    if torch.is_grad_enabled() and input.requires_grad:
        out = apply(RowStatistics, problem.input, problem.target, problem.recipe, return_argmax)
    else:
        p, wanted = problem, Wanted(stats=True, argmax=return_argmax)
        _, _, *stats, _ = operators.row_forward(
            p.input.detach(), p.target, None, None, None, p.recipe, wanted
        )
        out = tuple(stats)
    return token_statistics(problem, out, return_argmax)


def linear_token_log_probs(
    input: Tensor,  # noqa: A002  (PyTorch's name)
    linear_weight: Tensor,
    target: Tensor | Selection,
    *,
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
    """`token_log_probs(input @ linear_weight.T + linear_bias, target)` without N x V logits.

    Example:
        >>> hidden, head = torch.randn(2, 5, 8), torch.randn(11, 8)
        >>> completions = torch.randint(11, (2, 5))
        >>> completions[:, :3] = -100
        >>> result = sgp.linear_token_log_probs(hidden, head, completions, shift=True)
        >>> result.log_prob.sum(1).shape            # one number a completion
        torch.Size([2])

    Args:
        input, linear_weight, target, linear_bias, shift, chunk_rows, memory_budget,
            accumulate_into: as in `sgp.linear_cross_entropy`, class indices or a Selection only.
        ignore_index, temperature, softcap, logit_scale, return_argmax: as in `token_log_probs`.

    Returns:
        TokenLogProbs as `token_log_probs`. Numbers stand at the row that predicts the token: after
        a shift column t is about token t + 1, and the last column is zero. Matmuls: `2 M V D`
        floating-point operations forward, and in backward, which makes the logits again, `6 M V D`
        (`4 M V D` with one side frozen). A `memory_budget` with room for the float32 logits,
        `4 M V` bytes, holds them until the backward: `6 M V D` in all instead of `8 M V D`.

    Raises:
        ValueError, TypeError, IndexError: as `sgp.linear_cross_entropy`.
        RuntimeError: a second derivative.
    """
    if dtensors.is_dtensor(input, linear_weight, linear_bias, target):
        return dtensors.server().of_head(  # type: ignore[no-any-return]
            linear_token_log_probs, input, linear_weight, target, linear_bias,
            ignore_index=ignore_index, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, shift=shift, chunk_rows=chunk_rows,
            memory_budget=memory_budget, accumulate_into=accumulate_into,
            return_argmax=return_argmax,
        )  # fmt: skip
    name = LINEAR_LOG_PROBS
    check_flags(name, return_argmax=return_argmax)
    ignore = -100 if ignore_index is None else ignore_index
    recipe = Recipe(ignore, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    pieces = Pieces(chunk_rows, memory_budget, accumulate_into, linear_weight)
    check_head(name, input, linear_weight, linear_bias, target)
    pieces.check(name, linear_weight)
    problem = make_head_problem(name, input, linear_weight, target, None, None, recipe, shift=shift)
    refuse_forward_mode(name, input, linear_weight, linear_bias)
    head = linear_head(linear_weight, linear_bias, target, problem)
    wanted = Wanted(stats=True, argmax=return_argmax)
    chosen = head_options(problem.recipe, head, pieces, wanted, name=name)
    return head_statistics(problem, head, chosen)


def head_statistics(problem: Problem, head: LinearHead, options: HeadOptions) -> TokenLogProbs:
    """The statistics of what has been checked."""
    o = options
    out: tuple[Tensor, ...]
    if any(o.call.needs):
        out = apply(HeadStatistics, *head, o._replace(call=o.call._replace(late=True)))
    else:
        (_, _, *stats, _, _, _), _ = o.forward(o.losses(), head.detached())
        out = tuple(stats)
    return token_statistics(problem, out, o.call.wanted.argmax)

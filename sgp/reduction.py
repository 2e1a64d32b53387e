"""From one loss a row to what the caller asked for, and by how much each row counts."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from sgp.problem import REDUCTIONS, Problem
from sgp.recipe import LARGEST


def check_reduction(name: str, reduction: str, denominator: float | Tensor | None) -> None:
    """Refuse a reduction that does not exist and a divisor that it would not use.

    Raises:
        ValueError, TypeError: with what was passed.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction = {reduction!r}; expected one of {REDUCTIONS}")
    if denominator is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"{name}: denominator replaces the divisor of reduction='mean'; it has no meaning with "
            f"reduction={reduction!r}"
        )
    if not isinstance(denominator, (Tensor, numbers.Real)):
        raise TypeError(
            f"{name}: denominator is {denominator!r}; expected a number or a 0-d tensor"
        )
    if isinstance(denominator, int) and not -LARGEST <= denominator <= LARGEST:
        raise ValueError(f"{name}: denominator is too large for a float")
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(
                f"{name}: denominator is {tuple(denominator.shape)}; expected a number or a 0-d "
                "tensor"
            )
        if denominator.requires_grad:
            raise ValueError(f"{name}: denominator requires grad; it is a constant, detach it")


def reciprocal(divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / divisor, and 0 where it is 0: nothing to divide means no loss and no gradient."""
    safe = torch.where(divisor == 0, 1, divisor).to(torch.float64)
    return torch.where(divisor == 0, 0, 1 / safe).to(dtype)


def reduce_rows(problem: Problem, rows: Tensor, reduction: str, scale: Tensor | None) -> Tensor:
    """Losses (N,) -> what `reduction` says; a mean is the sum times `scale` (0-d)."""
    if reduction == "none":
        return problem.shaped(rows)
    if reduction in ("mean", "sum"):
        return rows.sum() if scale is None else rows.sum() * scale
    sums = per_sequence(problem, rows)
    if reduction == "sequence_sum":
        return sums
    check_whole_sequences(problem)
    return sums * reciprocal(per_sequence(problem, _divisors(problem, rows)), rows.dtype)


def check_whole_sequences(problem: Problem) -> None:
    """Raise ValueError for a mean over sequences of which other ranks have a part."""
    if problem.is_part:
        raise ValueError(
            "sgp: reduction='sequence_mean' of a Selection that was cut: this rank does not know "
            "how many tokens a sequence has elsewhere; add up 'sequence_sum' over the ranks and "
            "divide by the counts of the whole Selection"
        )


def without_z_loss(problem: Problem, reduction: str) -> Problem:
    """The problem without its z-loss where `sequence_z_loss` has to add it; else as it is.

    In a mean over each sequence the class weights' divisor differs from row to row, so that no
    other weights of the classes can stand for it (see `sgp.divisor`).
    """
    if reduction != "sequence_mean" or not problem.has_two_divisors:
        return problem
    return problem._replace(recipe=problem.recipe._replace(lse_square_scale=0.0))


def sequence_z_loss(problem: Problem, lse: Tensor) -> Tensor:
    """Each sequence's mean z-loss (S,), from the log-sum-exp of each row (N,)."""
    counts = _divisors(problem._replace(weight=None), lse)
    rows = problem.recipe.lse_square_scale * counts * lse**2
    return per_sequence(problem, rows) * reciprocal(per_sequence(problem, counts), rows.dtype)


def _divisors(problem: Problem, rows: Tensor) -> Tensor:
    """(N,): by how much each row counts in a mean."""
    kept = problem.target != problem.recipe.ignore_index
    counts = kept.to(rows.dtype)
    if problem.weight is not None:
        counts = counts * problem.weight[problem.target.clamp(0, problem.weight.numel() - 1)]
    if problem.token_weight is not None:
        counts = torch.where(kept, counts * problem.token_weight, 0)
    return counts


def per_sequence(problem: Problem, rows: Tensor) -> Tensor:
    """(N,) -> (S,): the sum over each sequence, in a fixed order."""
    if problem.boundaries is None:
        length = problem.shape[-1] if problem.shape else 1
        return rows.view(problem.num_sequences, length).sum(1)
    lengths = problem.boundaries.diff()
    sums = torch.segment_reduce(rows, "sum", lengths=lengths, unsafe=True)
    return sums[: problem.num_sequences]

"""From one loss a row to what the caller asked for, and by how much each row counts."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from sgp.rows.problem import REDUCTIONS, Problem
from sgp.rows.recipe import LARGEST


def check_reduction(
    name: str, reduction: str, denominator: float | Tensor | None
) -> float | Tensor | None:
    """Refuse a reduction that does not exist and a divisor that it would not use.

    Returns:
        The denominator, as a 0-d tensor if it is one.

    Raises:
        ValueError, TypeError: with what was passed.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction = {reduction!r}; expected one of {REDUCTIONS}")
    if denominator is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"{name}: denominator replaces the divisor of reduction='mean'; it has no meaning with "
            f"reduction={reduction!r}"
        )
    return check_denominator(f"{name}: denominator", denominator)


def check_denominator(label: str, denominator: object) -> float | Tensor:
    """The number; a tensor of one element as a 0-d one (DataParallel hands out rows of a column).

    Raises:
        ValueError, TypeError: with what was passed.
    """
    if not isinstance(denominator, Tensor):
        if not isinstance(denominator, numbers.Real):
            raise TypeError(
                f"{label} is {denominator!r}; expected a number or a tensor of one element"
            )
        if isinstance(denominator, int) and not -LARGEST <= denominator <= LARGEST:
            raise ValueError(f"{label} is too large for a float")
        return denominator  # type: ignore[return-value]
    if denominator.numel() != 1:
        raise ValueError(
            f"{label} is {tuple(denominator.shape)}; expected a number or a tensor of one element"
        )
    if denominator.requires_grad:
        raise ValueError(f"{label} requires grad; it is a constant, detach it")
    return denominator.view(())


def reciprocal(divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / divisor, and 0 where it is 0: nothing to divide means no loss and no gradient.

    A divisor that is float64 is not rounded first; none is made, which some devices cannot.
    """
    safe = torch.where(divisor == 0, 1, divisor)
    safe = safe if safe.dtype == torch.float64 else safe.to(dtype)
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
    other weights of the classes can stand for it (see `sgp.rows.divisor`).
    """
    if reduction != "sequence_mean" or not problem.has_two_divisors():
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

"""The divisors of a mean, as factors on the rows' device, without waiting for them.

Class weights multiply the cross-entropy and not the z-loss, so each has a divisor of its own. With
token weights t (1 if none) and class weights w, summed over the kept tokens::

    mean = sum(t w ce) / sum(t w) + zeta sum(t lse^2) / sum(t)

The two differ only where class weights and a z-loss meet. A mean over all tokens then has its class
weights multiplied by sum(t) / sum(t w), after which sum(t) divides both; for a mean over each
sequence `sequence_z_loss` adds the z-loss (see `sgp.rows.reduction`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgp.rows import operators
from sgp.rows.problem import Problem
from sgp.rows.reduction import reciprocal


def as_mean(
    name: str, problem: Problem, denominator: float | Tensor | None
) -> tuple[Problem, Tensor]:
    """The problem, and the factor () in its accumulation dtype that makes the rows' sum a mean.

    Without a denominator it is the problem with class weights whose divisor is that of the z-loss.
    """
    if denominator is not None:
        return problem, _of_denominator(problem, denominator)
    scale, weight = _counted(name, problem), problem.weight
    if weight is None or not problem.has_two_divisors():
        return problem, scale
    of_z_loss = _counted(name, problem._replace(weight=None))
    ratio = torch.where(of_z_loss == 0, 0, scale / torch.where(of_z_loss == 0, 1, of_z_loss))
    return problem._replace(weight=weight * ratio), of_z_loss


def _counted(name: str, problem: Problem) -> Tensor:
    """1 / sum of the kept rows' weights, 0 where that is 0."""
    p = problem
    counted: Tensor = operators.mean_scale(
        p.target, p.weight, p.token_weight, p.recipe.ignore_index, p.dtype(), name
    )
    return counted


def _of_denominator(problem: Problem, denominator: float | Tensor) -> Tensor:
    """1 / denominator, 0 where that is 0."""
    p = problem
    if not isinstance(denominator, Tensor):
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        factor = 1.0 / denominator if denominator else 0.0
        return torch.full((), factor, dtype=p.dtype(), device=p.input.device)
    scale: Tensor = reciprocal(denominator, p.dtype())
    if scale.device.type == "cpu":
        # A number on the CPU goes into a launch as an argument: nothing is copied or waited for.
        return torch.ones((), dtype=p.dtype(), device=p.input.device) * scale
    return scale.to(p.input.device)

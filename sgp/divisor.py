"""The divisor of a mean, as a factor on the rows' device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from sgp import operators
from sgp.problem import Problem
from sgp.reduction import reciprocal


def scale_of_mean(name: str, problem: Problem, denominator: float | Tensor | None) -> Tensor:
    """1 / divisor, () in the accumulation dtype: of the denominator, or of the rows' weights."""
    p = problem
    if denominator is None:
        counted: Tensor = operators.mean_scale(
            p.target, p.weight, p.token_weight, p.recipe.ignore_index, p.dtype, name
        )
        return counted
    if not isinstance(denominator, Tensor):
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        factor = 1.0 / denominator if denominator else 0.0
        return torch.full((), factor, dtype=p.dtype, device=p.input.device)
    scale: Tensor = reciprocal(denominator, p.dtype)
    if scale.device.type == "cpu":
        # A number on the CPU goes into a launch as an argument: nothing is copied or waited for.
        return torch.ones((), dtype=p.dtype, device=p.input.device) * scale
    return scale.to(p.input.device)

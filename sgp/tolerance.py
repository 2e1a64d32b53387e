"""What "right" means here: no worse than PyTorch in the same dtype, both against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(value: Tensor, truth: Tensor) -> float:
    """The worst row's |value - truth| / |truth| (absolute for a row of zeros).

    Rows are those of the last dimension; what has one dimension is one row. NaN and infinities
    must stand where they stand in the truth, or the error is infinite.

    Example:
        >>> relative_error(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0], [3, 3]]))
        0.23570226039551587
    """
    value, truth = value.detach().cpu().double(), truth.detach().cpu().double()
    if value.shape != truth.shape:
        raise ValueError(f"value is {tuple(value.shape)} and truth {tuple(truth.shape)}")
    special = ~truth.isfinite()
    if not torch.equal(special, ~value.isfinite()) or not torch.equal(
        value[special].nan_to_num(), truth[special].nan_to_num()
    ):
        return float("inf")
    value, truth = value.masked_fill(special, 0), truth.masked_fill(special, 0)
    if truth.dim() < 2:
        value, truth = value.reshape(1, -1), truth.reshape(1, -1)
    scale = truth.norm(dim=-1)
    error = (value - truth).norm(dim=-1) / torch.where(scale > 0, scale, 1)
    return float(error.max()) if error.numel() else 0.0


def bound(
    plain_error: float, dtype: torch.dtype, *, interpreted: bool = False, roundings: int = 1
) -> float:
    """The largest error that passes, given PyTorch's on the same case.

    PyTorch's own error, and for luck four units in the last place of float32, in which the
    arithmetic is done (an exponent near 10 is itself rounded to that); for float64, whose truth is
    rounded too, 64 units. A bf16 or fp16 result may always be off by its own rounding, half a
    unit. Triton's interpreter truncates where a GPU rounds to bf16, so interpreted bf16 may have
    twice as much. A gradient that is multiplied by an upstream factor after it was stored is
    rounded a second time (`roundings=2`).
    """
    eps = torch.finfo(dtype).eps
    half = dtype in (torch.bfloat16, torch.float16)
    plain_error = plain_error if plain_error < float("inf") else 0.0
    luck = 64 * eps if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    limit = max(plain_error, eps / 2 if half else 0.0) + luck + (roundings - 1) * eps / 2
    return 2.0 * limit if interpreted and dtype == torch.bfloat16 else limit

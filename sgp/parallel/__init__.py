"""The losses of a vocabulary that is split over ranks, and what data and sequence parallelism need.

Every rank of a group holds some columns of the logits, or rows of the head, in rank order, and
passes the same tokens and targets. For each kept row the ranks exchange a few numbers (see
`sgp/parallel/rows.py`), never anything of the vocabulary's size; every rank gets the same loss, bit
for bit, and the gradient of its own part.
"""

from typing import Any

from sgp import dtensors
from sgp.parallel.data import global_denominator, positions
from sgp.parallel.distilling import distillation, linear_distillation
from sgp.parallel.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_token_log_probs,
    token_log_probs,
)
from sgp.parallel.own_loss import linear_loss

__all__ = [
    "cross_entropy",
    "distillation",
    "global_denominator",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_loss",
    "linear_token_log_probs",
    "positions",
    "token_log_probs",
]


def _of_dtensors() -> Any:
    """`sgp.parallel.dtensor`, at first use: PyTorch's DTensors take time to import."""
    from sgp.parallel import dtensor  # noqa: PLC0415

    return dtensor


dtensors.serve(_of_dtensors)

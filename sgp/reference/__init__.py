"""The definition of every loss, in plain PyTorch: short, slow, and the oracle of all tests.

Everything is computed on the kept rows only, in float64 for float64 input and in float32 for the
rest, and differentiated by autograd. `losses` has the formulas of the losses of labels,
`distillation` those of a student and its teachers, `steps` what they share.

The functions take the arguments of their namesakes in `sgp` that define a number; what only says
how to compute it (`inplace`, `chunk_rows`, `memory_budget`, `accumulate_into`, `options`) is not
among them.
"""

from sgp.reference.distilling import distillation, linear_distillation
from sgp.reference.losses import (
    LossFunction,
    TokenLogProbs,
    cross_entropy,
    linear_cross_entropy,
    linear_loss,
    linear_token_log_probs,
    token_log_probs,
)

__all__ = [
    "LossFunction",
    "TokenLogProbs",
    "cross_entropy",
    "distillation",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_loss",
    "linear_token_log_probs",
    "token_log_probs",
]

"""Selective Gradient Propagation: the loss of the tokens you train on, for the price of those.

`cross_entropy` replaces `torch.nn.functional.cross_entropy`, `linear_cross_entropy` the head before
it too; `token_log_probs` and `linear_token_log_probs` give each token's log-probability, and
`linear_loss` trains on what your own lines make of it; `Selection` says which tokens carry loss;
`audit` shows where the gradient went; `huggingface.patch` puts the loss into a model of
transformers, `trl` into TRL's trainers; `parallel` has the losses of a vocabulary split over ranks;
`reference` is the definition of all in plain PyTorch. Kernels are imported at first use, and so is
`trl`, which imports TRL.
"""

# ruff: noqa: E402

from sgp import interrupt as _interrupt

_interrupt.watch_start()  # first: the import of PyTorch takes most of a command's start

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from sgp import huggingface, parallel, reference
from sgp.auditing import AuditReport, audit
from sgp.context import context_loss
from sgp.data.collator import Collator
from sgp.distilling import DistillationLoss, distillation
from sgp.linear import LinearCrossEntropyLoss, linear_cross_entropy
from sgp.linear_distilling import LinearDistillationLoss, linear_distillation
from sgp.log_probs import linear_token_log_probs, token_log_probs
from sgp.losses import CrossEntropyLoss, cross_entropy
from sgp.own_loss import linear_loss
from sgp.reference import TokenLogProbs
from sgp.rows.top_k import TopK
from sgp.selection import Selection

__version__ = "0.2.0"
__all__ = [
    "AuditReport",
    "Collator",
    "CrossEntropyLoss",
    "DistillationLoss",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "Selection",
    "TokenLogProbs",
    "TopK",
    "audit",
    "context_loss",
    "cross_entropy",
    "distillation",
    "huggingface",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_loss",
    "linear_token_log_probs",
    "parallel",
    "reference",
    "token_log_probs",
]

if TYPE_CHECKING:  # which would take any name for one that __getattr__ knows
    from sgp import trl as trl
else:

    def __getattr__(name: str) -> ModuleType:
        """`sgp.trl`, imported at first use, and so not in `__all__`: `import *` would use it."""
        if name == "trl":
            return importlib.import_module("sgp.trl")
        raise AttributeError(f"module 'sgp' has no attribute {name!r}")

"""Selective Gradient Propagation: the loss of the tokens you train on, for the price of those.

`cross_entropy` replaces `torch.nn.functional.cross_entropy`; `Selection` says which tokens carry
loss; `reference` is the definition of both in plain PyTorch. Kernels are imported at first use.
"""

from sgp import reference
from sgp.losses import CrossEntropyLoss, cross_entropy
from sgp.reference import TokenLogProbs
from sgp.selection import Selection

__version__ = "0.1.0"
__all__ = [
    "CrossEntropyLoss",
    "Selection",
    "TokenLogProbs",
    "cross_entropy",
    "reference",
]

"""What the row kernels of other libraries ask of memory, counted as ours are (traffic.py).

Libraries written in Triton run in its interpreter too: every load and store of logits and gradient
is counted with real addresses. Which library is installed decides who is counted; who is not is
named. Loss and gradient are compared with PyTorch's first. PyTorch operators that a library runs
beside its kernels are not seen here. The fused heads of Liger and flash-linear-attention run the
kernels that are counted here, on chunks of logits; cut-cross-entropy's never reach memory ("no
logits").
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sgp
from bench.against import rivals
from bench.against.rivals import Package
from bench.proof.interpreter import watch_accesses

VOCABULARIES = (32_000, 128_256, 151_936)
KEPT_ROWS = (4, 1)
N = 4


class Contestant(NamedTuple):
    """A loss of logits (N, V) and labels (N,)."""

    name: str
    task: str  # "loss" | "log-probs"
    package: Package
    loss: Callable[[Tensor, Tensor], Tensor] | None  # None: see `why_not`
    why_not: str = ""


class RivalCount(NamedTuple):
    """Elements of logits and gradient in units of N V, forward and backward."""

    name: str
    task: str
    version: str | None
    V: int
    kept: float
    asked: float | None  # None: see status
    least: float
    launches: int
    status: str = "ok"


def ours(logits: Tensor, labels: Tensor) -> Tensor:
    """`sgp.cross_entropy`."""
    return sgp.cross_entropy(logits, labels)


def ours_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """`sgp.token_log_probs`."""
    return -sgp.token_log_probs(logits, labels).log_prob.sum() / (labels != -100).sum()


def liger(logits: Tensor, labels: Tensor) -> Tensor:
    """The Triton kernel of its loss module, which overwrites the logits."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # noqa: PLC0415

    options = (None, -100, 0.0, 0.0, "mean", None, False, False, False)
    loss: Tensor = LigerCrossEntropyFunction.apply(1.0 * logits, labels, *options)[0]
    return loss


def flash_linear_attention(logits: Tensor, labels: Tensor) -> Tensor:
    """Its kernels, descended from flash-attention's."""
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss  # noqa: PLC0415

    losses, _ = cross_entropy_loss(logits, labels)
    return losses.sum() / (labels != -100).sum()


def trl(logits: Tensor, labels: Tensor) -> Tensor:
    """Its fused log-probabilities and entropy, told which rows to leave out."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy  # noqa: PLC0415

    kept = labels != -100
    found, _ = selective_log_softmax_and_entropy(logits, labels.clamp(min=0), row_mask=kept.long())
    return -found.sum() / kept.sum()


CONTESTANTS = (
    Contestant("sgp", "loss", rivals.SGP, ours),
    Contestant("Liger", "loss", rivals.LIGER, liger),
    Contestant("flash-linear-attention", "loss", rivals.FLA, flash_linear_attention),
    Contestant("cut-cross-entropy", "loss", rivals.CCE, None, "no logits"),
    Contestant("sgp", "log-probs", rivals.SGP, ours_log_probs),
    Contestant("TRL", "log-probs", rivals.TRL, trl),
)


def count(contestant: Contestant, V: int, kept_rows: int) -> RivalCount:
    """The traffic of one library on N float32 rows, kept_rows of them kept."""
    f = kept_rows / N
    result = RivalCount(
        name=contestant.name,
        task=contestant.task,
        version=contestant.package.version,
        V=V,
        kept=f,
        asked=None,
        least=1 + (2 * f if contestant.task == "log-probs" else f),
        launches=0,
    )
    if result.version is None:
        return result._replace(status=f"{contestant.package.distribution} is not installed")
    if contestant.loss is None:
        return result._replace(status=contestant.why_not)
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.full((N,), -100)
    labels[:kept_rows] = torch.arange(kept_rows) % V
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn that this machine has no GPU
        try:
            with watch_accesses() as seen:
                (gradient,) = torch.autograd.grad(contestant.loss(logits, labels), logits)
        except Exception as error:  # noqa: BLE001  (a failure is the library's result)
            return result._replace(status=f"fails: {type(error).__name__}: {error}"[:120])
    (true,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    if not torch.allclose(gradient, true, rtol=1e-3, atol=1e-6):
        return result._replace(status="wrong")
    unit = N * V * logits.itemsize
    matrices = [r for r in seen.regions.values() if r.stop - r.start >= unit]
    asked = sum(r.loaded + r.stored for r in matrices) / unit
    return result._replace(asked=asked, launches=seen.launches)


def count_all() -> list[RivalCount]:
    """Every library on every size."""
    return [count(*case) for case in itertools.product(CONTESTANTS, VOCABULARIES, KEPT_ROWS)]

"""What the row kernels of other libraries ask of memory, counted as ours are (traffic.py).

Libraries written in Triton run in its interpreter too: every load and store of logits and gradient
is counted with real addresses. Which library is installed decides who is counted; who is not is
named. Loss and gradient are compared with PyTorch's first. PyTorch operators that a library runs
beside its kernels are not seen here. The fused heads of Liger and flash-linear-attention run the
kernels that are counted here, on chunks of logits; cut-cross-entropy's never reach memory ("no
logits").

A divergence from a teacher is counted through both heads, as TRL has it and from kept rows that
were gathered: what its kernels, and ours, ask of the logits and gradients that matmuls make and
take. TRL makes the logits again for each pass over them, 4 or 6 times, which is not counted here.
Liger's kernel takes log-probabilities: what PyTorch's operators ask for before and after it, for
`log_softmax` of both, `softmax` and the gradient of the logits, is not counted here either.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

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
D = 16  # of hidden states, where there is a head
DIVERGENCES = ("forward_kl", "jsd")  # tasks with a teacher
OF_HEADS = (50_257,)  # vocabularies of these: two of TRL's tiles
NUMBERS = 1 << 12  # bytes; numbers a row are fewer, a piece of a row has more


class Heads(NamedTuple):
    """The kept rows of a student and a teacher."""

    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    teacher: Tensor  # (M, D)
    teacher_weight: Tensor  # (V, D)


class Contestant(NamedTuple):
    """A loss of logits (N, V) and labels (N,), or of Heads and a divergence."""

    name: str
    task: str  # "loss" | "log-probs" | one of DIVERGENCES
    package: Package
    loss: Callable[..., Tensor] | None  # None: see `why_not`
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

    @property
    def budget(self) -> float:
        """What ours may ask for: written once, read twice, of a jsd three times."""
        if self.task in DIVERGENCES:
            return self.kept * (5 if self.task == "forward_kl" else 7)
        return 1 + 2 * self.kept


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


def ours_of_teacher(heads: Heads, divergence: str) -> Tensor:
    """`sgp.linear_distillation`."""
    labels = torch.zeros(len(heads.hidden), dtype=torch.int64)
    return sgp.linear_distillation(
        heads.hidden, heads.weight, labels, heads.teacher, heads.teacher_weight,
        divergence=divergence,
    )  # fmt: skip


def trl_of_teacher(heads: Heads, divergence: str) -> Tensor:
    """The function of its DistillationTrainer, with the kernels that it has on a GPU."""
    from trl.kernels import chunked_divergence  # noqa: PLC0415

    beta = 0.0 if divergence == "forward_kl" else 0.5
    with mock.patch.object(chunked_divergence, "_use_triton", return_value=True):
        found, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
            heads.hidden, heads.weight, None, heads.teacher, heads.teacher_weight, None, beta
        )
        loss: Tensor = found.mean()
        gradients = torch.autograd.grad(loss, heads[:2])
    return _Known.apply(loss.detach(), *gradients, *heads[:2])


def liger_of_teacher(heads: Heads, divergence: str) -> Tensor:
    """Its fused head, with its Triton kernel."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction  # noqa: PLC0415

    beta = 0.0 if divergence == "forward_kl" else 0.5
    loss: Tensor = LigerFusedLinearJSDFunction.apply(*heads, None, beta)
    return loss


class _Known(torch.autograd.Function):
    """A loss whose gradients are there."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return None, None, None, *ctx.saved_tensors


CONTESTANTS = (
    Contestant("sgp", "loss", rivals.SGP, ours),
    Contestant("Liger", "loss", rivals.LIGER, liger),
    Contestant("flash-linear-attention", "loss", rivals.FLA, flash_linear_attention),
    Contestant("cut-cross-entropy", "loss", rivals.CCE, None, "no logits"),
    Contestant("sgp", "log-probs", rivals.SGP, ours_log_probs),
    Contestant("TRL", "log-probs", rivals.TRL, trl),
    *(
        Contestant(name, divergence, package, loss)
        for divergence in DIVERGENCES
        for name, package, loss in (
            ("sgp", rivals.SGP, ours_of_teacher),
            ("TRL", rivals.TRL, trl_of_teacher),
            ("Liger", rivals.LIGER, liger_of_teacher),
        )
    ),
)


def count(contestant: Contestant, V: int, kept_rows: int) -> RivalCount:
    """The traffic of one library on N float32 rows, kept_rows of them kept."""
    f, of_heads = kept_rows / N, contestant.task in DIVERGENCES
    result = RivalCount(
        name=contestant.name,
        task=contestant.task,
        version=contestant.package.version,
        V=V,
        kept=f,
        asked=None,
        least=3 * f if of_heads else 1 + (2 * f if contestant.task == "log-probs" else f),
        launches=0,
    )
    if result.version is None:
        return result._replace(status=f"{contestant.package.distribution} is not installed")
    if contestant.loss is None:
        return result._replace(status=contestant.why_not)
    if of_heads:
        return _through_heads(contestant, result, kept_rows)
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


def _through_heads(contestant: Contestant, result: RivalCount, M: int) -> RivalCount:
    """The same of M kept rows of two heads."""
    assert contestant.loss is not None, "looked at before"  # noqa: S101
    V, generator = result.V, torch.Generator().manual_seed(0)
    sizes = ((M, D), (V, D), (M, D), (V, D))
    heads = Heads(*(torch.randn(size, generator=generator) for size in sizes))
    for x in heads[:2]:
        x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with watch_accesses() as seen:
                loss = contestant.loss(heads, contestant.task)
                found = torch.autograd.grad(loss, heads[:2])
        except Exception as error:  # noqa: BLE001
            return result._replace(status=f"fails: {type(error).__name__}: {error}"[:120])
    true_loss = rivals.divergence_of(
        F.linear(heads.hidden, heads.weight), F.linear(heads.teacher, heads.teacher_weight),
        contestant.task,
    ).mean()  # fmt: skip
    true = torch.autograd.grad(true_loss, heads[:2])
    right = all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in zip(found, true, strict=True)
    )
    if not (right and torch.allclose(loss, true_loss, rtol=1e-4)):
        return result._replace(status="wrong")
    weights = [x.data_ptr() for x in heads]
    asked = sum(
        r.loaded + r.stored
        for r in seen.regions.values()
        if r.stop - r.start >= NUMBERS and r.start not in weights
    )
    return result._replace(asked=asked / (4 * N * V), launches=seen.launches)


def count_all() -> list[RivalCount]:
    """Every library on every size."""
    return [
        count(contestant, V, kept_rows)
        for contestant in CONTESTANTS
        for V in (OF_HEADS if contestant.task in DIVERGENCES else VOCABULARIES)
        for kept_rows in KEPT_ROWS
    ]

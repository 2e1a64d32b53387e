"""Who solves a case: sgp, PyTorch, and the libraries that people use, behind one signature.

A rival is a function from a `Problem` to a scalar loss, the mean over the kept tokens, connected to
the problem's leaves. Each is used as its documentation says. What is not installed, needs a GPU, is
wrong or fails is shown as that. Nobody is given the kept rows unless its name says so; what a
library does about ignored rows is its own business.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import sgp
from bench.against.cases import JSD, KL, OWN, SEQUENCE, Problem


class Package(NamedTuple):
    """Where a rival comes from."""

    distribution: str
    module: str
    gpu_only: bool = False

    @property
    def version(self) -> str | None:
        """What is installed; None where it is not."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


TORCH = Package("torch", "torch")
SGP = Package("sgp-kernels", "sgp")
LIGER = Package("liger-kernel", "liger_kernel", gpu_only=True)
LIGER_CHUNKED = LIGER._replace(gpu_only=False)  # those of its losses that are PyTorch
CCE = Package("cut-cross-entropy", "cut_cross_entropy", gpu_only=True)
QUACK = Package("quack-kernels", "quack", gpu_only=True)
FLA = Package("fla-core", "fla", gpu_only=True)
TRL = Package("trl", "trl")
PACKAGES = (TORCH, SGP, LIGER, CCE, QUACK, FLA, TRL)


class Rival(NamedTuple):
    """One way to compute a loss."""

    name: str
    form: str  # of cases.Case
    loss: Callable[[Problem], Tensor]
    package: Package = TORCH
    overwrites: bool = False  # the logits hold something else afterwards

    @property
    def is_ours(self) -> bool:
        """Whether it is held to PyTorch's own errors."""
        return self.package == SGP

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if importlib.util.find_spec(self.package.module) is None:
            return f"{self.package.distribution} is not installed"
        if self.package.gpu_only and device.type == "cpu":
            return "needs a GPU"
        return None


def versions() -> dict[str, str | None]:
    """Of every package that rivals come from; None where it is not installed."""
    return {package.distribution: package.version for package in PACKAGES}


# -- PyTorch ---------------------------------------------------------------------------------------


def pytorch(p: Problem) -> Tensor:
    """As it is usually written, and as transformers does it: logits of all rows, in float32."""
    return F.cross_entropy(p.logits.float(), p.labels)


def pytorch_by_hand(p: Problem) -> Tensor:
    """The honest baseline: the kept rows alone, which anyone can gather."""
    return F.cross_entropy(p.logits[p.rows].float(), p.target)


def pytorch_linear(p: Problem) -> Tensor:
    """Head and loss on all rows."""
    return F.cross_entropy(F.linear(p.hidden, p.weight).float(), p.labels)


def pytorch_linear_by_hand(p: Problem) -> Tensor:
    """Head and loss on the kept rows."""
    return F.cross_entropy(F.linear(p.hidden[p.rows], p.weight).float(), p.target)


def pytorch_chunked(p: Problem) -> Tensor:
    """PyTorch's own chunked head, its own choice of chunks, on all rows."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=options)


def pytorch_large_chunks(p: Problem) -> Tensor:
    """The same in chunks of 1024 rows: its choice is slow where there are fewer rows than D."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(1_024, p.labels.numel()))
    return F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=options)


def pytorch_log_probs(p: Problem) -> Tensor:
    """log_softmax and gather on the kept rows."""
    return _mean_nll(p.logits[p.rows], p.target)


def pytorch_linear_log_probs(p: Problem) -> Tensor:
    """The same from hidden states."""
    return _mean_nll(F.linear(p.hidden[p.rows], p.weight), p.target)


def _mean_nll(logits: Tensor, target: Tensor) -> Tensor:
    return -_log_probs(logits, target[:, None]).mean()


def _log_probs(logits: Tensor, index: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, index)


def cispo(log_prob: Tensor, advantage: float = 1.0, most: float = 5.0) -> Tensor:
    """Each token's loss in the first step after sampling, when the old policy is the new one."""
    ratio = (log_prob - log_prob.detach()).exp()
    return -ratio.clamp(max=most).detach() * advantage * log_prob


def pytorch_own_loss(p: Problem) -> Tensor:
    """Whole logits of the kept rows, and the loss."""
    return cispo(_log_probs(F.linear(p.hidden[p.rows], p.weight), p.target[:, None])).mean()


def divergence_of(student: Tensor, teacher: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """(M,) of two models' logits (M, V), by log_softmax and `F.kl_div`."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def pytorch_distillation(p: Problem) -> Tensor:
    """Whole logits of both on the kept rows."""
    logits = F.linear(p.hidden[p.rows], p.weight).float()
    with torch.no_grad():
        teacher = F.linear(p.teacher[p.rows], p.teacher_weight).float()
    return divergence_of(logits, teacher, p.case.divergence).mean()


@functools.lru_cache(maxsize=1)
def _compiled(form: str, V: int, dtype: torch.dtype) -> Callable[..., Tensor]:  # noqa: ARG001
    """Compiled anew for each head, as in a model: only the number of rows is left open."""
    torch._dynamo.reset()  # noqa: SLF001
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # noqa: SLF001  (not eager in disguise)

    def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def of_hidden(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def of_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
        kept = labels != -100
        scored = _log_probs(logits, labels.clamp(min=0)[:, None])[:, 0]
        return -torch.where(kept, scored, 0.0).sum() / kept.sum()

    functions = {"logits": of_logits, "linear": of_hidden, "log-probs": of_log_probs}
    return torch.compile(functions[form])


def pytorch_compiled(p: Problem) -> Tensor:
    """`torch.compile` of the usual way, with or without the head."""
    rows = p.logits if p.hidden is None else p.hidden
    function = _compiled(p.case.form, p.case.model.V, rows.dtype)
    torch._dynamo.mark_dynamic(rows, 0)  # noqa: SLF001
    torch._dynamo.mark_dynamic(p.labels, 0)  # noqa: SLF001
    return function(rows, p.labels, *p.leaves[1:])


# -- sgp -------------------------------------------------------------------------------------------


def ours(p: Problem) -> Tensor:
    """`sgp.cross_entropy`."""
    return sgp.cross_entropy(p.logits, p.selection)


def ours_in_place(p: Problem) -> Tensor:
    """The gradient takes the logits' place."""
    return sgp.cross_entropy(p.logits, p.selection, inplace=True)


def ours_by_hand(p: Problem) -> Tensor:
    """On rows gathered by hand."""
    return sgp.cross_entropy(p.logits[p.rows], p.target)


def ours_linear(p: Problem) -> Tensor:
    """`sgp.linear_cross_entropy`."""
    return sgp.linear_cross_entropy(p.hidden, p.weight, p.selection)


def ours_linear_small(p: Problem) -> Tensor:
    """In half a byte a logit, a quarter of what its gradient in 16 bits would take."""
    V = p.weight.shape[0]
    budget = p.target.numel() * V // 2 + 64 * V + (1 << 16)  # or a short vocabulary has no way
    return sgp.linear_cross_entropy(p.hidden, p.weight, p.selection, memory_budget=budget)


def ours_log_probs(p: Problem) -> Tensor:
    """`sgp.token_log_probs`."""
    return -sgp.token_log_probs(p.logits, p.selection).log_prob.sum() / p.target.numel()


def ours_linear_log_probs(p: Problem) -> Tensor:
    """`sgp.linear_token_log_probs`."""
    found = sgp.linear_token_log_probs(p.hidden, p.weight, p.selection)
    return -found.log_prob.sum() / p.target.numel()


def ours_own_loss(p: Problem) -> Tensor:
    """`sgp.linear_loss`."""
    kept = p.target.numel()

    def loss_fn(tokens: sgp.TokenLogProbs, rows: Tensor) -> Tensor:  # noqa: ARG001
        return cispo(tokens.log_prob) / kept

    return sgp.linear_loss(p.hidden, p.weight, p.selection, loss_fn)


def ours_loss_of_log_probs(p: Problem) -> Tensor:
    """`sgp.linear_token_log_probs`, and the loss after it."""
    found = sgp.linear_token_log_probs(p.hidden, p.weight, p.selection)
    return cispo(found.log_prob).sum() / p.target.numel()


def ours_linear_log_probs_held(p: Problem) -> Tensor:
    """With room for the logits until the backward."""
    M, D = p.target.numel(), p.weight.shape[1]
    budget = 5 * M * p.weight.shape[0] + 32 * M * D
    found = sgp.linear_token_log_probs(p.hidden, p.weight, p.selection, memory_budget=budget)
    return -found.log_prob.sum() / M


def ours_distillation(p: Problem) -> Tensor:
    """`sgp.linear_distillation`."""
    return sgp.linear_distillation(
        p.hidden, p.weight, p.selection, p.teacher, p.teacher_weight, divergence=p.case.divergence
    )


# -- libraries -------------------------------------------------------------------------------------


def liger(p: Problem) -> Tensor:
    """Its loss module; the gradient takes the logits' place."""
    from liger_kernel.transformers import LigerCrossEntropyLoss  # noqa: PLC0415

    return LigerCrossEntropyLoss()(p.logits, p.labels)


def liger_linear(p: Problem) -> Tensor:
    """Its fused head."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: PLC0415

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.labels)


def liger_own_loss(p: Problem) -> Tensor:
    """Its fused GRPO loss, as its defaults have it but for what the loss is; on all rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # noqa: PLC0415

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=5.0
    )
    mask = (p.labels != -100).view(-1, min(SEQUENCE, p.labels.numel()))
    tokens, hidden = p.labels.clamp(min=0).view_as(mask), p.hidden.unflatten(0, mask.shape)
    found = loss(hidden, p.weight, tokens, mask, p.hidden.new_ones(len(mask)))
    return found[0]


def liger_distillation(p: Problem) -> Tensor:
    """Its fused head of a generalized JSD, which is the forward KL at beta 0."""
    from liger_kernel.transformers import LigerFusedLinearJSD  # noqa: PLC0415

    loss = LigerFusedLinearJSD(jsd_beta=_beta(p))
    return loss(p.hidden, p.weight, p.teacher, p.teacher_weight, p.labels)


def liger_chunked_distillation(p: Problem) -> Tensor:
    """Its chunked loss, which is PyTorch and compiled, as its defaults have it but for the loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_beta(p))
    return loss(p.hidden, p.weight, p.teacher, p.teacher_weight, p.labels)


def _beta(p: Problem) -> float:
    """As TRL and Liger have it."""
    return {"forward_kl": 0.0, "jsd": 0.5}[p.case.divergence]


def cut_cross_entropy(p: Problem) -> Tensor:
    """As its README has it: gradients below a threshold are left out."""
    import cut_cross_entropy as library  # noqa: PLC0415

    return library.linear_cross_entropy(p.hidden, p.weight, p.labels)


def quack(p: Problem) -> Tensor:
    """Its loss function."""
    from quack.cross_entropy import cross_entropy  # noqa: PLC0415

    return cross_entropy(p.logits, p.labels)


class _QuackInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        from quack.cross_entropy import cross_entropy_fwd  # noqa: PLC0415

        found = cross_entropy_fwd(logits, labels, return_dx=True)
        (gradient,) = (x for x in found if x is not None and x.shape == logits.shape)
        kept = (labels != -100).sum()
        ctx.save_for_backward(gradient, kept)
        return found[0].sum() / kept

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        gradient, kept = ctx.saved_tensors
        return gradient * (upstream / kept).to(gradient.dtype), None


def quack_in_forward(p: Problem) -> Tensor:
    """Its kernel that writes the gradient beside the loss, in one launch."""
    return _QuackInForward.apply(p.logits, p.labels)


def quack_linear(p: Problem) -> Tensor:
    """Its chunked head."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: PLC0415

    return chunked_linear_cross_entropy(p.hidden, p.weight, p.labels)


def flash_linear_attention(p: Problem) -> Tensor:
    """Its loss module, descended from flash-attention's."""
    from fla.modules import FusedCrossEntropyLoss  # noqa: PLC0415

    return FusedCrossEntropyLoss()(p.logits, p.labels)


def flash_linear_attention_linear(p: Problem) -> Tensor:
    """Its fused head."""
    from fla.modules import FusedLinearCrossEntropyLoss  # noqa: PLC0415

    return FusedLinearCrossEntropyLoss()(p.hidden, p.labels, p.weight)


def trl_log_probs(p: Problem) -> Tensor:
    """`selective_log_softmax` on the kept rows, as its trainers call it."""
    from trl.trainer.utils import selective_log_softmax  # noqa: PLC0415

    return -selective_log_softmax(p.logits[p.rows], p.target).mean()


def trl_linear_log_probs(p: Problem) -> Tensor:
    """The chunked function of its fused head, on the kept rows, its chunk of the vocabulary."""
    return -_of_trl(p).mean()


def trl_own_loss(p: Problem) -> Tensor:
    """The same, and the loss after it, as its GRPOTrainer does."""
    return cispo(_of_trl(p)).mean()


def trl_distillation(p: Problem) -> Tensor:
    """The chunked function of its DistillationTrainer, on the kept rows as on a GPU."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: PLC0415

    found = ChunkedDivergenceFunction.apply(
        p.hidden[p.rows], p.weight, None, p.teacher[p.rows], p.teacher_weight, None, _beta(p)
    )
    divergence: Tensor = found[0]
    return divergence.mean()


def _of_trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: PLC0415
    from trl.trainer import utils  # noqa: PLC0415

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE  # noqa: SLF001
    found = ChunkedLogProbFunction.apply(
        p.hidden[p.rows], p.weight, None, p.target, 1.0, chunk, None, 1.0, ("log_probs",)
    )  # fmt: skip
    log_probs: Tensor = found[0]
    return log_probs


BASELINE = "PyTorch, kept rows"  # gathered by hand
PLAIN = {
    "logits": pytorch_by_hand,
    "linear": pytorch_linear_by_hand,
    "log-probs": pytorch_log_probs,
    "linear log-probs": pytorch_linear_log_probs,
    OWN: pytorch_own_loss,
    KL: pytorch_distillation,
    JSD: pytorch_distillation,
}
RIVALS = (
    Rival("sgp", "logits", ours, SGP),
    Rival("sgp, in place", "logits", ours_in_place, SGP, overwrites=True),
    Rival("sgp, kept rows", "logits", ours_by_hand, SGP),
    Rival("sgp", "linear", ours_linear, SGP),
    Rival("sgp, small budget", "linear", ours_linear_small, SGP),
    Rival("sgp", "log-probs", ours_log_probs, SGP),
    Rival("sgp", "linear log-probs", ours_linear_log_probs, SGP),
    Rival("sgp, logits held", "linear log-probs", ours_linear_log_probs_held, SGP),
    Rival("sgp", OWN, ours_own_loss, SGP),
    Rival("sgp, log-probs first", OWN, ours_loss_of_log_probs, SGP),
    *(Rival("sgp", form, ours_distillation, SGP) for form in (KL, JSD)),
    *(Rival(BASELINE, form, loss) for form, loss in PLAIN.items()),
    Rival("PyTorch, all rows", "logits", pytorch),
    Rival("PyTorch, all rows", "linear", pytorch_linear),
    Rival("torch.compile", "logits", pytorch_compiled),
    Rival("torch.compile", "linear", pytorch_compiled),
    Rival("torch.compile", "log-probs", pytorch_compiled),
    Rival("F.linear_ce, auto", "linear", pytorch_chunked),
    Rival("F.linear_ce, 1k rows", "linear", pytorch_large_chunks),
    Rival("Liger", "logits", liger, LIGER, overwrites=True),
    Rival("Liger", "linear", liger_linear, LIGER),
    Rival("cut-cross-entropy", "linear", cut_cross_entropy, CCE),
    Rival("quack", "logits", quack, QUACK),
    Rival("quack", "linear", quack_linear, QUACK),
    Rival("flash-linear-attention", "logits", flash_linear_attention, FLA),
    Rival("flash-linear-attention", "linear", flash_linear_attention_linear, FLA),
    Rival("TRL", "log-probs", trl_log_probs, TRL),
    Rival("TRL", "linear log-probs", trl_linear_log_probs, TRL),
    Rival("TRL", OWN, trl_own_loss, TRL),
    Rival("Liger", OWN, liger_own_loss, LIGER_CHUNKED),
    *(
        Rival(name, form, loss, package)
        for form in (KL, JSD)
        for name, loss, package in (
            ("TRL", trl_distillation, TRL),
            ("Liger", liger_distillation, LIGER),
            ("Liger, chunked", liger_chunked_distillation, LIGER_CHUNKED),
        )
    ),
)


# Kernels that make loss and gradient of whole rows in one launch, by a part of their name.
KERNELS = (
    (Rival("Liger", "logits", liger, LIGER, overwrites=True), "liger_cross_entropy_kernel"),
    (Rival("quack", "logits", quack_in_forward, QUACK), "quackcross_entropy"),
)


def rivals_of(form: str) -> list[Rival]:
    """Everyone who solves cases of a form, sgp first."""
    return [rival for rival in RIVALS if rival.form == form]

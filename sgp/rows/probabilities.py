"""Rows whose target is a distribution over the classes: by the kernel, or by PyTorch's operators.

The kernel's gradients are no differentiable operation. PyTorch's operators, which CPU tensors and
float64 run, have every derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sgp.rows import backend, operators
from sgp.rows.autograd import (
    CROSS_ENTROPY,
    Transformed,
    apply,
    mark_constant,
    once,
    refuse_forward_mode,
    saved_tensors,
)
from sgp.rows.operations import implementation
from sgp.rows.problem import Problem, may_wait
from sgp.rows.recipe import Recipe, accumulation_dtype, score
from sgp.rows.watched import is_traced, operator

STORED = (torch.bfloat16, torch.float16, torch.float32)  # what the kernel reads


class ProbabilityOutputs(NamedTuple):
    """What the forward returns; None, and empty from the operator, for what was not asked for."""

    loss: Tensor  # (N,)
    saved: Tensor | None  # (N, 4)
    dlogits: Tensor | None  # of the shape of the logits


def weighted_sum(problem: Problem, scale: Tensor | None) -> Tensor | None:
    """The sum of the weighted losses times `scale`, its gradient in the same launch.

    None where the gradient has to wait: for the target's, for float16's upstream factor, under
    `torch.func` transforms; and where PyTorch's operators run.
    """
    p = problem
    if (
        not torch.is_grad_enabled()
        or not p.input.requires_grad
        or p.target.requires_grad
        or p.input.dtype == torch.float16
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001  (no public name)
        or not _by_kernel(p)
    ):
        return None
    out = apply(
        ProbabilityScalar, p.input, _stored(p.target), p.weight, p.token_weight, scale, p.recipe
    )
    return out[0]  # type: ignore[no-any-return]


def row_losses(problem: Problem) -> Tensor:
    """(N,) losses without token weights, differentiable by logits and probabilities."""
    p = problem
    if not _by_kernel(p):
        V = p.input.shape[-1]
        scored = score(p.input.reshape(-1, V), p.recipe)
        return probability_rows(scored, p.target.reshape(-1, V), p.weight, p.recipe)
    target = _stored(p.target)
    if torch.is_grad_enabled() and (p.input.requires_grad or target.requires_grad):
        return apply(ProbabilityRows, p.input, target, p.weight, p.recipe)[0]  # type: ignore[no-any-return]
    rows: Tensor = probability_forward(
        p.input.detach(), target.detach(), p.weight, None, None, p.recipe, False, False
    )[0]
    return rows


def _by_kernel(problem: Problem) -> bool:
    """Whether the kernel does these rows; it has no forward-mode derivative."""
    if _choice(problem.input.device, problem.input.dtype) != "triton":
        return False
    refuse_forward_mode(CROSS_ENTROPY, problem.input, problem.target)
    return True


def _choice(device: torch.device, dtype: torch.dtype) -> str:
    return backend.choose(device, dtype)


# As torch.compiler.assume_constant_result, which imports the compiler: asked while a graph is made.
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def probability_rows(
    scored: Tensor, target: Tensor, weight: Tensor | None, recipe: Recipe
) -> Tensor:
    """(N,) losses of scored logits (N, V) against class probabilities (N, V), by PyTorch.

    As `torch.nn.functional.cross_entropy`, but for 0 log 0, which is 0: a class without probability
    whose score is minus infinity adds nothing, to gradients neither.
    """
    log_p = F.log_softmax(scored, -1)
    spread = target.to(scored.dtype)
    if recipe.label_smoothing:
        eps = recipe.label_smoothing
        spread = (1 - eps) * spread + eps / scored.shape[-1]
    if weight is not None:
        spread = spread * weight.to(scored.dtype)
    if (
        is_traced(scored, target)
        or not may_wait(scored)
        # Where it can be seen, only where it is needed: on a CPU it takes as long as all the rest.
        or bool((scored.detach().amin(-1) == -torch.inf).any())
    ):
        log_p = log_p.masked_fill((spread == 0) & (log_p == -torch.inf), 0)
    rows = -(spread * log_p).sum(-1)
    if recipe.lse_square_scale:
        rows = rows + recipe.lse_square_scale * scored.logsumexp(-1) ** 2
    return rows


def _stored(target: Tensor) -> Tensor:
    """Probabilities in a dtype that the kernel reads."""
    return target if target.dtype in STORED else target.float()


@operator()
def probability_forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor | None,
    recipe: Recipe,
    saved: bool,
    grad: bool,
) -> ProbabilityOutputs:
    """Losses (N,) of logits (..., V) and probabilities (..., V), and what was asked for.

    Args:
        logits, target: bf16, fp16 or fp32, any strides.
        weight: (V,) class weights in float32.
        row_weight: (N,) float32; multiplies loss and gradient.
        scale: () float32; multiplies the gradient only.
        recipe: the constants of the loss.
        saved: whether what a backward needs is wanted.
        grad: whether the gradient of the logits is.
    """
    out = _new_outputs(logits, saved, grad)
    implementation(logits).probabilities(
        logits, target, out.dlogits, None, out.loss, out.saved, weight, row_weight, scale, recipe
    )
    return out


@probability_forward.register_fake
def _(logits: Tensor, *options: Any) -> ProbabilityOutputs:
    return _new_outputs(logits, *options[-2:])


def _new_outputs(logits: Tensor, saved: bool, grad: bool) -> ProbabilityOutputs:
    N = logits.numel() // logits.shape[-1]
    dtype = accumulation_dtype(logits.dtype)
    return ProbabilityOutputs(
        logits.new_empty(N, dtype=dtype),
        logits.new_empty(N, 4, dtype=dtype) if saved else None,
        logits.new_empty(logits.shape) if grad else None,
    )


@operator()
def probability_backward(
    logits: Tensor,
    target: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    row_weight: Tensor | None,
    recipe: Recipe,
    of_logits: bool,
    of_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and of probabilities, those that are wanted.

    Args:
        logits, target, weight, recipe: as in probability_forward.
        saved: (N, 4) of probability_forward.
        row_weight: (N,) upstream gradients of the losses.
        of_logits, of_target: which gradients.
    """
    gradients = _new_gradients(logits, target, of_logits, of_target)
    implementation(logits).probabilities(
        logits, target, *gradients, None, saved, weight, row_weight, None, recipe
    )
    return gradients


@probability_backward.register_fake
def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor | None, Tensor | None]:
    return _new_gradients(logits, target, *options[-2:])


def _new_gradients(
    logits: Tensor, target: Tensor, of_logits: bool, of_target: bool
) -> tuple[Tensor | None, Tensor | None]:
    return (
        logits.new_empty(logits.shape) if of_logits else None,
        target.new_empty(target.shape) if of_target else None,
    )


class ProbabilityScalar(torch.autograd.Function):
    """(loss (), gradient of the logits) of sum over rows, times `scale`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
    ) -> tuple[Tensor, ...]:
        loss, _, dlogits = probability_forward(
            logits, target, weight, row_weight, scale, recipe, False, True
        )
        total = loss.sum()
        return total if scale is None else total * scale, dlogits

    @staticmethod
    def setup_context(ctx: Any, _: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mark_constant(ctx, origin=output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 6
        (origin,) = saved_tensors(ctx, CROSS_ENTROPY, "'mean' or 'sum' loss")
        dlogits = origin.detach()
        with torch.no_grad():
            operators.multiply_rows_(dlogits, None, grads[0], 0)
        return (once(CROSS_ENTROPY, dlogits, origin, grads[0]), *(None,) * 5)


class ProbabilityRows(Transformed):
    """(losses (N,), saved (N, 4)); logits and probabilities have gradients."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, weight: Tensor | None, recipe: Recipe
    ) -> tuple[Tensor, ...]:
        loss, saved, _ = probability_forward(
            logits, target, weight, None, None, recipe, True, False
        )
        return loss, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, recipe = inputs
        mark_constant(ctx, origin=output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, output[1])
        ctx.recipe = recipe

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_loss, (of_logits, of_target, *_) = grads[0], ctx.needs_input_grad
        if of_loss is None:
            return (None,) * 4
        logits, target, weight, saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = probability_backward(
                logits, target, saved, weight, of_loss.contiguous(), ctx.recipe,
                of_logits, of_target,
            )  # fmt: skip
        wanted = zip(gradients, (of_logits, of_target), strict=True)
        closed = (
            once(CROSS_ENTROPY, x, saved, of_loss) if is_wanted else None for x, is_wanted in wanted
        )
        return (*closed, None, None)

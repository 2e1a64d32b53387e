"""One exact backward pass of a causal language model, looked at from inside.

What is kept of it are norms: of the gradient of each position's logits and hidden states, and, for
the weights of all `nn.Linear` modules, of the two parts that a gradient has. A weight's gradient is
a sum over positions, `g = sum_t delta_t x_t^T` with input x_t and output gradient delta_t. Where a
sequence is context, then output, the positions that predict output give g_outputs, which is the
whole gradient if the context is held constant (nothing flows into them from later positions but
outputs), and the others g_context, what comes back through the context's keys and values.

The parts of one module are made, measured and dropped when the backward pass reaches it. Of a
head that is tied to the embeddings only the head's own part is counted. A model with a linear
layer that is called twice, on flattened tokens, or is not `nn.Linear` (GPT-2) has neither number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgp.log_probs import token_log_probs


@dataclass(frozen=True)
class Trace:
    """What a backward pass left behind."""

    loss: float  # the model's own, or the mean negative log-likelihood of the targets, in nats
    log_prob: Tensor  # (B, T) fp32: of what position t predicts; 0 where it predicts nothing
    logit_grad_norm: Tensor  # (B, T) fp32: at the position that predicts
    grad_norm: Tensor  # (layers + 1, B, T) fp32: of dL / d hidden
    context_share: float | None  # |g_context| / |g|; None where it is not defined
    cosine_detached: float | None  # cos(g, g_outputs)
    without_gradient: tuple[str, ...]  # trainable parameters that got none
    not_finite: tuple[str, ...]  # parameters whose gradient has NaN or infinities


@dataclass
class _Parts:
    """Squared norms and a product of the two parts, summed over modules."""

    outputs: float = 0.0
    context: float = 0.0
    product: float = 0.0
    complete: bool = True  # every weight was seen once, at every position
    handles: list[Any] = field(default_factory=list)


def trace(
    model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, outputs: Tensor | None
) -> Trace:
    """Run forward and backward once, and leave model, gradients and random state as they were.

    Args:
        model: called as `model(**inputs, output_hidden_states=True)`; returns `.logits` (B, T, V)
            and `.hidden_states`, as Hugging Face's do.
        inputs: what the model is called with, on its device. With `labels` among them the loss is
            the one that the model returns.
        targets: (B, T) int64: what position t has to predict, -100 where nothing.
        outputs: (B, T) bool: positions from the first predictor on, where each row is context and
            then output; None: there is no such split.
    """
    with _as_it_was(model) as gradients:
        parts = _Parts()
        if outputs is not None:
            _watch(model, outputs, parts)
        try:
            found = model(**inputs, output_hidden_states=True, use_cache=False)
            logits, hidden = found.logits, list(found.hidden_states)
            for tensor in (logits, *hidden):
                if tensor.requires_grad:
                    tensor.retain_grad()
            found_log_probs = token_log_probs(logits.flatten(0, 1), targets.flatten())
            log_prob = found_log_probs.log_prob.view(targets.shape)
            loss = getattr(found, "loss", None)
            if loss is None:
                loss = -log_prob.sum() / (targets != -100).sum().clamp(min=1)
            if loss.requires_grad:
                loss.backward()
        finally:
            for handle in parts.handles:
                handle.remove()
        share, cosine = _share_and_cosine(parts) if outputs is not None else (None, None)
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return Trace(
            loss=float(loss.detach()),
            log_prob=log_prob.detach().float().cpu(),
            logit_grad_norm=_norm(logits),
            grad_norm=torch.stack([_norm(h) for h in hidden]),
            context_share=share,
            cosine_detached=cosine,
            without_gradient=tuple(n for n in trainable if n not in gradients.seen),
            not_finite=tuple(n for n in gradients.seen if not gradients.seen[n]),
        )


def _norm(x: Tensor) -> Tensor:
    if x.grad is None:
        return torch.zeros(x.shape[:2])
    norms: Tensor = x.grad.detach().float().norm(dim=-1).cpu()
    return norms


# -- the two parts of a gradient -------------------------------------------------------------------


def _watch(model: nn.Module, outputs: Tensor, parts: _Parts) -> None:
    seen: set[int] = set()

    def forward(module: nn.Linear, args: tuple[Any, ...], result: Tensor) -> None:
        x = args[0]
        if x.shape[:2] != outputs.shape or id(module.weight) in seen or not result.requires_grad:
            parts.complete = False
            return
        seen.add(id(module.weight))
        kept = x.detach()

        def backward(delta: Tensor) -> None:
            of_outputs = _product(delta, kept, outputs)
            of_context = _product(delta, kept, ~outputs)
            parts.outputs += float(of_outputs.square().sum())
            parts.context += float(of_context.square().sum())
            parts.product += float((of_outputs * of_context).sum())

        result.register_hook(backward)

    for module in model.modules():
        if type(module).__name__ == "Conv1D":  # GPT-2's linear layers are none of PyTorch's
            parts.complete = False
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            parts.handles.append(module.register_forward_hook(forward))


def _product(delta: Tensor, x: Tensor, where: Tensor) -> Tensor:
    return delta[where].float().t() @ x[where].float()


def _share_and_cosine(parts: _Parts) -> tuple[float | None, float | None]:
    """(|g_context| / |g|, cos(g, g_outputs)); None where not all was seen, or nothing finite."""
    whole = parts.outputs + parts.context + 2 * parts.product
    if not parts.complete or not math.isfinite(whole) or whole <= 0 or parts.outputs <= 0:
        return None, None
    cosine = (parts.outputs + parts.product) / (whole * parts.outputs) ** 0.5
    return float((parts.context / whole) ** 0.5), float(cosine)


# -- leaving things as they were -------------------------------------------------------------------


@dataclass
class _Gradients:
    seen: dict[str, bool] = field(default_factory=dict)  # name: whether all of it is finite


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[_Gradients]:
    """Evaluation mode, no gradient kept, and afterwards everything as before."""
    modes = {module: module.training for module in model.modules()}
    before = {name: p.grad for name, p in model.named_parameters()}
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    gradients = _Gradients()
    handles = []
    for name, p in model.named_parameters():
        p.grad = None
        if p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(_forget(name, gradients)))
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            model.eval()
            yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for name, p in model.named_parameters():
            p.grad = before[name]
        for module, mode in modes.items():
            module.training = mode


def _forget(name: str, gradients: _Gradients) -> Any:
    def hook(p: Tensor) -> None:
        if p.grad is not None:
            gradients.seen[name] = bool(p.grad.isfinite().all())
            p.grad = None

    return hook

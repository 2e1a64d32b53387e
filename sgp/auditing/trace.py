"""One exact backward pass of a causal language model, looked at from inside.

What is kept of it are norms: of the gradient of each position's logits and hidden states, and of
the two parts of the linear layers' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgp.auditing.parts import Parts
from sgp.auditing.untouched import untouched
from sgp.auditing.view import NAME
from sgp.log_probs import token_log_probs
from sgp.losses import cross_entropy
from sgp.selection import Selection

OF_LOSS = ("labels", "shift_labels", "num_items_in_batch")
"""Inputs that a model makes its own loss of."""


@dataclass(frozen=True)
class Trace:
    """What a backward pass left behind."""

    loss: float  # the model's own, or that of the selection, in nats
    own_loss: bool  # the model's
    log_prob: Tensor  # (B, T) fp32: of what position t predicts; 0 where it predicts nothing
    logit_grad_norm: Tensor  # (B, T) fp32: at the position that predicts
    grad_norm: Tensor  # (layers + 1, B, T) fp32: of dL / d hidden; NaN where it is not measured
    measured: Tensor  # (layers + 1,) bool: hidden states that took part in the graph
    context_share: float | None  # |g_context| / |g|; None where it is not defined
    cosine_detached: float | None  # cos(g, g_outputs)
    without_gradient: tuple[str, ...]  # trainable parameters that got none, in modules that ran
    not_run: tuple[str, ...]  # trainable parameters of modules that did not
    not_finite: tuple[str, ...]  # parameters whose gradient has NaN or infinities
    zero: tuple[str, ...]  # parameters whose gradient is exactly zero


@dataclass
class _Seen:
    """What hooks saw of parameters and modules."""

    finite: dict[str, bool] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    ran: set[nn.Module] = field(default_factory=set)
    parts: Parts | None = None

    def gradient(self, name: str, p: nn.Parameter) -> None:
        if p.grad is None:
            return
        largest = float(p.grad.abs().max()) if p.grad.numel() else 0.0
        self.finite[name] = largest < float("inf")  # NaN is not
        if largest == 0 and p.grad.numel():
            self.zero.append(name)
        if self.parts is not None:
            self.parts.check(p)


def check_autocast(autocast: torch.dtype | None) -> None:
    """Whether training can run in it.

    Example:
        >>> check_autocast(torch.bfloat16), check_autocast(None)
        (None, None)

    Raises:
        TypeError: no dtype, or one of integers.
    """
    if autocast is None:
        return
    if not isinstance(autocast, torch.dtype) or not autocast.is_floating_point:
        raise TypeError(
            f"{NAME}: autocast is {autocast!r}; expected a torch.dtype such as torch.bfloat16, or "
            "None"
        )


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Tensor,
    outputs: Tensor | None,
    selection: Selection | None = None,
    autocast: torch.dtype | None = None,
) -> Trace:
    """Run forward and backward once, and leave model, gradients and random state as they were.

    Args:
        model: called as `model(**inputs)`; returns `.logits` (B, T, V) and `.hidden_states`, as
            Hugging Face's do when asked for them.
        inputs: what the model is called with, on its device. With `labels` among them the loss is
            the one that the model returns.
        targets: (B, T) int64: what position t has to predict, -100 where nothing.
        outputs: (B, T) bool: positions from the first predictor on, where each row is context and
            then output; None: there is no such split.
        selection: its weighted mean is the loss where the model returns none; else the mean over
            targets.
        autocast: the dtype of the forward pass; None: as it is.

    Raises:
        ValueError: logits of another length than the targets, virtual tokens of PEFT aside.
    """
    seen = _Seen(parts=Parts(outputs) if outputs is not None else None)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    with untouched(model, seen.gradient), _watching(model, seen):
        found, logits, hidden = _forward(model, inputs, autocast)
        virtual = _virtual(model, logits, targets)
        targets = targets.to(logits.device)
        with torch.no_grad():
            real = logits.detach()[:, virtual:].flatten(0, 1)
            log_prob = token_log_probs(real, targets.flatten()).log_prob
        loss = getattr(found, "loss", None)
        own = loss is not None
        if loss is None:
            loss = _loss(logits[:, virtual:], targets, selection)
        if loss.requires_grad:
            loss.backward()
    share, cosine = seen.parts.share_and_cosine() if seen.parts else (None, None)
    missing = [name for name in names.values() if name not in seen.finite]
    ran = {names.get(id(p)) for module in seen.ran for p in module.parameters(recurse=False)}
    return Trace(
        loss=float(loss.detach()),
        own_loss=own,
        log_prob=log_prob.detach().float().cpu().view(targets.shape),
        logit_grad_norm=_norm(logits, virtual),
        grad_norm=torch.stack([_norm(h, virtual) for h in hidden]),
        measured=torch.tensor([h.requires_grad for h in hidden]),
        context_share=share,
        cosine_detached=cosine,
        without_gradient=tuple(n for n in missing if n in ran),
        not_run=tuple(n for n in missing if n not in ran),
        not_finite=tuple(n for n, finite in seen.finite.items() if not finite),
        zero=tuple(seen.zero),
    )


def gradient_at(
    model: nn.Module, inputs: Mapping[str, Any], targets: Tensor, autocast: torch.dtype | None
) -> Tensor:
    """(layers + 1, B, T): the norm of the gradient of these targets' loss, taken from the logits.

    Whatever else a model adds to its loss has no part in it. Leaves the model as it was.
    """
    inputs = {k: v for k, v in inputs.items() if k not in OF_LOSS}
    with untouched(model, lambda *_: None):
        _, logits, hidden = _forward(model, inputs, autocast)
        virtual = _virtual(model, logits, targets)
        target = targets.to(logits.device).flatten()
        loss = cross_entropy(logits[:, virtual:].flatten(0, 1), target, reduction="sum")
        if loss.requires_grad:
            loss.backward()
    return torch.stack([_norm(h, virtual) for h in hidden])


def _forward(
    model: nn.Module, inputs: Mapping[str, Any], autocast: torch.dtype | None
) -> tuple[Any, Tensor, list[Tensor]]:
    """What the model returns, and its logits and hidden states, which keep their gradients."""
    device = next((x.device.type for x in inputs.values() if isinstance(x, Tensor)), "cpu")
    cast = torch.autocast(device, dtype=autocast) if autocast is not None else nullcontext()
    with cast:
        found = model(**inputs)
    logits, hidden = _outputs_of(model, found)
    for tensor in (logits, *hidden):
        if tensor.requires_grad:
            tensor.retain_grad()
    return found, logits, hidden


def _virtual(model: nn.Module, logits: Tensor, targets: Tensor) -> int:
    """How many virtual tokens, which prompt tuning puts before a row, have logits."""
    more = logits.shape[1] - targets.shape[1]
    config = getattr(model, "active_peft_config", None)
    known = getattr(config, "num_virtual_tokens", None) or 0
    if more not in (0, known):
        raise ValueError(
            f"sgp.audit: {type(model).__name__} returned logits of {logits.shape[1]} positions for "
            f"{targets.shape[1]} tokens; expected as many, or {known} more for virtual tokens"
        )
    return int(more)


def _outputs_of(model: nn.Module, found: Any) -> tuple[Tensor, list[Tensor]]:
    logits, hidden = getattr(found, "logits", None), getattr(found, "hidden_states", None)
    if logits is None or not hidden:
        raise TypeError(
            f"sgp.audit: {type(model).__name__} returned {type(found).__name__} without logits or "
            "hidden_states; expected a causal language model of Hugging Face's kind"
        )
    return logits, [h for h in hidden if h is not None]


def _loss(logits: Tensor, targets: Tensor, selection: Selection | None) -> Tensor:
    if selection is None:
        return cross_entropy(logits.flatten(0, 1), targets.flatten())
    weight, denominator = selection.weight, None
    if weight is not None and bool((weight < 0).any()):
        denominator = max(1, selection.num_kept)  # advantages: their sum is no divisor
    moved = selection.to(logits.device)
    return cross_entropy(logits.flatten(0, 1), moved, denominator=denominator)


def _norm(x: Tensor, virtual: int) -> Tensor:
    """(B, T): of the gradient, of all streams; 0 where none arrived, NaN where none could."""
    if x.grad is None:
        shape = (x.shape[0], x.shape[1] - virtual)
        return torch.full(shape, 0.0 if x.requires_grad else torch.nan)
    norms: Tensor = x.grad.detach()[:, virtual:].float().flatten(2).norm(dim=-1).cpu()
    return norms


@contextmanager
def _watching(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """Which modules run, and the parts of the gradient."""

    def ran(module: nn.Module, *_: Any) -> None:
        seen.ran.add(module)

    handles = [m.register_forward_hook(ran) for m in model.modules()]
    if seen.parts is not None:
        seen.parts.watch(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if seen.parts is not None:
            seen.parts.stop()


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into hidden states, if the model says which."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs go: a model over several devices starts with its embeddings."""
    embeddings = input_embeddings(model)
    first = next((embeddings or model).parameters(), None)
    return first.device if first is not None else torch.device("cpu")

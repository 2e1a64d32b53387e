"""The two parts of the gradient of all linear layers' weights, without holding one of them.

A weight's gradient is a sum over positions, `g = sum_t delta_t x_t^T` with input x_t and output
gradient delta_t. Where a sequence is context, then output, the positions that predict output give
g_outputs, which is the whole gradient if the context is held constant (nothing flows into them
from later positions but outputs), and the others g_context, what comes back through the context's
keys and values. Each module's two parts are made, measured and dropped when the backward pass
reaches it; three numbers of them are kept.

A head that is tied to the embeddings has a gradient of two sums, the head's H and the embeddings'
E, where E has rows only for the tokens of the batch: of H those rows are kept until E is there,
`|H + E|^2 = |H|^2 + 2 <H, E> + |E|^2`.

Activation checkpoints run a module twice: those that make no graph at first (reentrant ones) are
seen when the backward pass runs them again, the others are not looked at again.

When a weight's gradient is complete its norm is compared with the parts' sum. Where they disagree
(a weight that is used outside its module), a layer runs twice, or its input is not (B, T, D), there
is no answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

AGREE = 1e-3  # of a squared norm; seen: 3e-7
ROUNDED = 0.02  # the same of gradients in 16 bits, bfloat16's rounded to 2^-9 each; seen: 1e-3


@dataclass
class _Sums:
    """Of one weight."""

    outputs: float = 0.0  # |g_outputs|^2
    context: float = 0.0  # |g_context|^2
    product: float = 0.0  # <g_outputs, g_context>
    agree: float = AGREE

    def add(self, outputs: Tensor, context: Tensor) -> None:
        self.outputs += float(outputs.square().sum())
        self.context += float(context.square().sum())
        self.product += float((outputs * context).sum())

    @property
    def whole(self) -> float:
        return self.outputs + self.context + 2 * self.product


@dataclass
class _Tied:
    """The embeddings' side of a tied head, and the head's rows of the tokens that they share."""

    tokens: Tensor  # (n,) ascending
    number: Tensor  # (B, T): of the token within `tokens`
    rows: tuple[Tensor, Tensor] | None = None  # (n, D) each: the head's two parts


@dataclass
class Parts:
    """Watches one forward and backward pass.

    Example:
        >>> parts = Parts(outputs)  # doctest: +SKIP
        >>> parts.watch(model)  # doctest: +SKIP
        >>> loss.backward()  # with `parts.check(p)` as each gradient is complete  # doctest: +SKIP
        >>> parts.share_and_cosine()  # doctest: +SKIP

    Args:
        outputs: (B, T) bool: positions from the first predictor on.
    """

    outputs: Tensor
    complete: bool = True
    handles: list[Any] = field(default_factory=list)
    _sums: dict[int, _Sums] = field(default_factory=dict)  # by the weight's id
    _tied: dict[int, _Tied] = field(default_factory=dict)
    _linear: set[int] = field(default_factory=set)
    _waiting: set[int] = field(default_factory=set)  # weights that ran without a graph

    def watch(self, model: nn.Module) -> None:
        """Hook every linear layer with a trainable weight, and embeddings tied to one."""
        linear = [m for m in model.modules() if is_linear(m) and m.weight.requires_grad]
        self._linear = {id(m.weight) for m in linear}
        for module in linear:
            self.handles.append(module.register_forward_hook(self._of_linear))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and id(module.weight) in self._linear:
                self.handles.append(module.register_forward_hook(self._of_embedding))

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def check(self, p: nn.Parameter) -> None:
        """Compare a complete gradient with the sum of its parts."""
        if id(p) not in self._linear or p.grad is None:
            return
        whole = float(p.grad.float().norm()) ** 2
        sums = self._sums.get(id(p), _Sums())
        if not abs(whole - sums.whole) <= sums.agree * whole:  # NaN disagrees
            self.complete = False

    def share_and_cosine(self) -> tuple[float | None, float | None]:
        """(|g_context| / |g|, cos(g, g_outputs)); None where not all was seen, or not finite."""
        outputs = sum(s.outputs for s in self._sums.values())
        context = sum(s.context for s in self._sums.values())
        product = sum(s.product for s in self._sums.values())
        whole = outputs + context + 2 * product
        if (
            self._waiting
            or not self.complete
            or not math.isfinite(whole)
            or whole <= 0
            or outputs <= 0
        ):
            return None, None
        cosine = (outputs + product) / (whole * outputs) ** 0.5
        return float((context / whole) ** 0.5), float(cosine)

    def _of_linear(self, module: Any, args: tuple[Any, ...], result: Any) -> None:
        x, key = args[0] if args else None, id(module.weight)
        seen = key in self._sums
        again = in_backward()
        if again and key not in self._waiting:
            return
        if not again and not torch.is_grad_enabled() and not seen and key not in self._waiting:
            self._waiting.add(key)
            return
        self._waiting.discard(key)
        if x is None or x.shape[:-1] != self.outputs.shape or seen or not result.requires_grad:
            self.complete = False
            return
        self._sums[key] = _Sums(agree=ROUNDED if result.dtype.itemsize < 4 else AGREE)
        kept = x.detach()

        def backward(delta: Tensor) -> None:
            if not isinstance(module, nn.Linear):  # Conv1D's weight is (inputs, outputs)
                parts = self._split(kept, delta)
            else:
                parts = self._split(delta, kept)
            self._sums[key].add(*parts)
            if key in self._tied:
                at = self._tied[key].tokens.to(delta.device)
                self._tied[key].rows = (parts[0][at], parts[1][at])

        result.register_hook(backward)

    def _split(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """sum_t left_t right_t^T over the positions of outputs, and over the others."""
        where = self.outputs.to(left.device)
        with torch.autocast(left.device.type, enabled=False):
            of_outputs = left[where].float().t() @ right[where].float()
            of_context = left[~where].float().t() @ right[~where].float()
        return of_outputs, of_context

    def _of_embedding(self, module: nn.Embedding, args: tuple[Any, ...], result: Any) -> None:
        ids, key = args[0] if args else None, id(module.weight)
        if ids is None or ids.shape != self.outputs.shape or key in self._tied:
            self.complete = False
            return
        scale = _multiple(result, module.weight.detach(), ids)
        if scale is None:
            self.complete = False
            return
        tokens, number = ids.unique(return_inverse=True)
        self._tied[key] = _Tied(tokens, number)
        kept = torch.ones_like(ids, dtype=torch.bool)
        if module.padding_idx is not None:
            kept = ids != module.padding_idx  # whose row gets no gradient

        def backward(delta: Tensor) -> None:
            tied, where = self._tied[key], self.outputs.to(delta.device)
            if tied.rows is None:
                self.complete = False
                return
            rows = [r.to(delta.device) for r in tied.rows]
            found = []
            for mask in (where & kept, ~where & kept):
                part = torch.zeros_like(rows[0])
                found.append(part.index_add_(0, number[mask], scale * delta[mask].float()))
            sums = self._sums[key]
            sums.add(found[0], found[1])
            sums.outputs += 2 * float((rows[0] * found[0]).sum())
            sums.context += 2 * float((rows[1] * found[1]).sum())
            sums.product += float((rows[0] * found[1]).sum() + (rows[1] * found[0]).sum())

        result.register_hook(backward)


def in_backward() -> bool:
    """Whether the backward pass is running: a forward pass is then a checkpoint's second."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001  (nothing public says so)


def is_linear(module: Any) -> bool:
    """`nn.Linear`, or GPT-2's Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _multiple(result: Tensor, weight: Tensor, ids: Tensor) -> float | None:
    """The c with result = c weight[ids], as Gemma's embeddings have one; None without."""
    rows, found = weight[ids].float(), result.detach().float()
    scale = float((rows * found).sum() / rows.square().sum().clamp(min=1e-30))
    exact = float((found - scale * rows).norm()) <= ROUNDED * float(found.norm())
    return scale if exact else None

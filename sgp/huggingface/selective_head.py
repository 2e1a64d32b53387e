"""A head that computes losses or log-probabilities instead of logits, inside its own forward.

There its weight is whole: FSDP gathers it before a module's forward and frees it after. What the
head returns instead of logits is a stand-in, which the model scales and caps and hands on, and from
which `reveal` gives the results back. Gradients go the same way: through the stand-in, so that
whoever waits for the head's output to get its gradient (FSDP) sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgp.shard import is_dtensor


@dataclass
class Request:
    """What is asked of a head in one forward pass."""

    compute: Callable[..., tuple[Tensor, ...]]
    """Given hidden states and weight, and by name linear_bias, softcap and logit_scale."""
    results: tuple[Tensor, ...] | None = None
    gradients: tuple[Tensor, ...] | None = None  # of the results, on their way back


@dataclass
class SelectiveHead:
    """The forward of an `nn.Linear` head, in place of its own while a request waits.

    Example:
        >>> head = nn.Linear(8, 11)
        >>> SelectiveHead.on(head, SelectiveHead(logit_scale=1.0, softcap=None))
        >>> head(torch.randn(2, 8)).shape     # as before
        torch.Size([2, 11])
        >>> SelectiveHead.off(head)
    """

    logit_scale: float
    softcap: float | None
    request: Request | None = None

    @staticmethod
    def on(head: nn.Module, selective: SelectiveHead) -> None:
        """Put one on a head."""
        vars(head)["sgp_head"] = selective  # no module: a plain attribute
        # A bound method that no class has would not unpickle.
        head.forward = partial(_forward, head)  # type: ignore[arg-type]

    @staticmethod
    def off(head: nn.Module) -> None:
        """Take it away."""
        del head.forward, head.sgp_head

    @staticmethod
    def of(head: nn.Module) -> SelectiveHead | None:
        """The one on a head, its copy on a copy of the head."""
        return vars(head).get("sgp_head")


def _forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    selective = SelectiveHead.of(self)
    request = selective.request if selective is not None else None
    if selective is None or request is None:
        return nn.functional.linear(hidden, self.weight, self.bias)
    if is_dtensor(self.weight):  # FSDP2's is whole here
        raise RuntimeError(
            "sgp.huggingface: the head's weight is a DTensor (tensor parallelism), through whose "
            "layout only logits go: patch with mode='rows', whose loss takes them"
        )
    if request.results is not None:
        raise RuntimeError("sgp.huggingface: the head ran twice in one forward pass of the model")
    results = request.compute(
        hidden,
        self.weight,
        linear_bias=self.bias,
        softcap=selective.softcap,
        logit_scale=selective.logit_scale,
    )
    request.results = tuple(x.detach() for x in results)
    return _Hide.apply(request, hidden.dtype, *results)  # type: ignore[no-any-return,no-untyped-call]


def reveal(stand_in: Tensor, request: Request) -> tuple[Tensor, ...]:
    """The results, from what the model made of the stand-in."""
    if request.results is None:
        raise RuntimeError("sgp.huggingface: the model asked for a loss before its head ran")
    return _Reveal.apply(stand_in, request, *request.results)  # type: ignore[no-any-return,no-untyped-call]


class _Hide(torch.autograd.Function):
    """results -> a stand-in of one element; the results' gradients, whatever the stand-in's is."""

    @staticmethod
    def forward(ctx: Any, request: Request, dtype: torch.dtype, *results: Tensor) -> Tensor:
        ctx.request = request
        return results[0].new_zeros((1, 1, 1), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, None, *ctx.request.gradients


class _Reveal(torch.autograd.Function):
    """stand-in -> results; keeps their gradients for `_Hide`."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, request: Request, *results: Tensor) -> Any:
        ctx.request = request
        ctx.like = (stand_in.shape, stand_in.dtype, stand_in.device)
        found = tuple(x.clone() for x in results)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.request.gradients = gradients
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), *(
            None for _ in range(len(gradients) + 1)
        )

"""A head that computes the loss instead of logits, inside its own forward.

There its weight is whole: FSDP gathers it before a module's forward and frees it after. What the
head returns instead of logits is a stand-in, which the model scales, caps and hands to its loss
function; the loss function gives the loss back. The gradient goes the same way: through the
stand-in, so that whoever waits for the head's output to get its gradient (FSDP) sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sgp.linear import linear_cross_entropy
from sgp.selection import Selection


@dataclass
class Request:
    """What the loss needs to know, and then the loss: of one forward pass."""

    target: Tensor | Selection  # of the hidden states' leading shape
    ignore_index: int
    denominator: Tensor | float | None
    label_smoothing: float
    loss: Tensor | None = None
    gradient: Tensor | None = None  # of the loss, on its way back


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
        head.forward = MethodType(_forward, head)

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
    if request.loss is not None:
        raise RuntimeError("sgp.huggingface: the head ran twice in one forward pass of the model")
    request.loss = linear_cross_entropy(
        hidden,
        self.weight,
        request.target,
        linear_bias=self.bias,
        ignore_index=request.ignore_index,
        label_smoothing=request.label_smoothing,
        denominator=request.denominator,
        softcap=selective.softcap,
        logit_scale=selective.logit_scale,
    )
    return _Hide.apply(request.loss, request, hidden.dtype)  # type: ignore[no-any-return,no-untyped-call]


def reveal(stand_in: Tensor, request: Request) -> Tensor:
    """The loss, from what the model made of the stand-in."""
    if request.loss is None:
        raise RuntimeError("sgp.huggingface: the model asked for a loss before its head ran")
    return _Reveal.apply(stand_in, request.loss.detach(), request)  # type: ignore[no-any-return,no-untyped-call]


class _Hide(torch.autograd.Function):
    """loss -> a stand-in of one element; the gradient of the loss, whatever the stand-in's is."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, request: Request, dtype: torch.dtype) -> Tensor:
        ctx.request = request
        return loss.new_zeros((1, 1, 1), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.request.gradient, None, None


class _Reveal(torch.autograd.Function):
    """stand-in -> loss; keeps the gradient of the loss for `_Hide`."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, loss: Tensor, request: Request) -> Tensor:
        ctx.request = request
        ctx.like = (stand_in.shape, stand_in.dtype, stand_in.device)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.request.gradient = gradient
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None, None

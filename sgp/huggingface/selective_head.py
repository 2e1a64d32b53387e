"""A head that computes losses or log-probabilities instead of logits, inside its own forward.

There its weight is whole: FSDP gathers it before a module's forward and frees it after. What the
head returns instead of logits is a stand-in, which the model scales and caps and hands on, and from
which `reveal` gives the results back. They hang on each other by gradients of zero, so that whoever
waits for the gradient of the head's output (FSDP) sees it, before the results' own.

Asked for nothing but logits that may never be read, it returns `LateLogits`, unless a forward hook
is going to read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgp.dtensors import is_dtensor
from sgp.huggingface.late_logits import LateLogits


@dataclass
class Request:
    """What is asked of a head in one forward pass."""

    compute: Callable[..., tuple[Tensor, ...]] | None
    """Given hidden states and weight, and by name linear_bias, softcap and logit_scale. None: late
    logits."""
    results: tuple[Tensor, ...] | None = None


class Here(threading.local):
    """What is under way in this thread: DataParallel's replicas share a patch, not a thread."""

    def __init__(self) -> None:
        """Nothing is."""
        self.requests: dict[SelectiveHead, Request] = {}
        self.calls: dict[Any, Any] = {}  # of patched models


HERE = Here()


@dataclass(eq=False)
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

    @property
    def request(self) -> Request | None:
        """What this thread asks for."""
        return HERE.requests.get(self)

    @request.setter
    def request(self, request: Request | None) -> None:
        if request is not None:
            HERE.requests[self] = request
        else:
            HERE.requests.pop(self, None)

    @staticmethod
    def on(head: nn.Module, selective: SelectiveHead) -> None:
        """Put one on a head."""
        vars(head)["sgp_head"] = selective  # no module: a plain attribute
        # Bound methods that no class has would not unpickle.
        head.forward = partial(_forward, head)  # type: ignore[arg-type]
        vars(head)["_replicate_for_data_parallel"] = partial(_replicate, head)

    @staticmethod
    def off(head: nn.Module) -> None:
        """Take it away."""
        del head.forward, head.sgp_head, head._replicate_for_data_parallel  # noqa: SLF001

    @staticmethod
    def of(head: nn.Module) -> SelectiveHead | None:
        """The one on a head, its copy on a copy of the head."""
        return vars(head).get("sgp_head")


def _replicate(self: Any) -> Any:
    """A replica of DataParallel has a copy of the attributes; its forward must be its own."""
    replica = type(self)._replicate_for_data_parallel(self)  # noqa: SLF001
    replica.forward = partial(_forward, replica)
    return replica


def _forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    selective = SelectiveHead.of(self)
    request = selective.request if selective is not None else None
    if selective is None or request is None:
        return nn.functional.linear(hidden, self.weight, self.bias)
    if request.compute is None:
        if type(hidden) is not Tensor or hidden.is_meta or _is_watched(self):
            return nn.functional.linear(hidden, self.weight, self.bias)
        return LateLogits.of(hidden, self.weight, self.bias)
    if is_dtensor(self.weight):  # FSDP2's is whole here
        raise RuntimeError(
            "sgp.huggingface: the head's weight is a DTensor (tensor parallelism), through whose "
            "layout only logits go: patch with mode='rows', whose loss takes them"
        )
    if request.results is not None:
        raise RuntimeError("sgp.huggingface: the head ran twice in one forward pass of the model")
    request.results = request.compute(
        hidden,
        self.weight,
        linear_bias=self.bias,
        softcap=selective.softcap,
        logit_scale=selective.logit_scale,
    )
    zeros = [_zero(x).sum() for x in request.results if x.is_floating_point()]
    return torch.stack(zeros).sum().to(hidden.dtype).view(1, 1, 1)


def _is_watched(head: nn.Module) -> bool:
    """Whether a forward hook of somebody's, of the head or of all modules, will see its output."""
    every = nn.modules.module._global_forward_hooks  # noqa: SLF001  (no public name)
    return bool(head._forward_hooks or every)  # noqa: SLF001


def reveal(stand_in: Tensor, request: Request) -> tuple[Tensor, ...]:
    """The results, from what the model made of the stand-in."""
    if request.results is None:
        raise RuntimeError("sgp.huggingface: the model asked for a loss before its head ran")
    zero = _zero(stand_in.sum())
    return tuple(x + zero.to(x) if x.is_floating_point() else x for x in request.results)


def _zero(x: Tensor) -> Tensor:
    """Zeros with a gradient of zero for x, whatever x is: NaN and inf too."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)

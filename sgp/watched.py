"""Who may be watching a call, and operators that are left out where nobody is.

torch.compile, dispatch modes, tensor subclasses and profilers see what the package does as
`torch.library` operators. A call of one passes the dispatcher twice and looks for aliases, which
costs as much as the launch inside it, and an eager training loop needs none of that: there the
operator's plain body runs. Both compute the same and raise the same errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import update_wrapper
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd import profiler

PLAIN = (Tensor, nn.Parameter)


def is_watched(*tensors: Tensor) -> bool:
    """Whether more than autograd looks at what happens to these tensors.

    That is torch.compile and torch.export, dispatch modes (fake tensors, make_fx, selective
    checkpointing) and function modes, `torch.func` transforms, `torch.jit.trace`, profilers,
    tensor subclasses, and tensors without memory: those on the meta device, and those that a
    transform has left behind.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()  # noqa: SLF001  (no public names)
        or torch._C._len_torch_function_stack()  # noqa: SLF001
        or torch._C._are_functorch_transforms_active()  # noqa: SLF001
        or torch._C._is_tracing()  # noqa: SLF001
        or profiler._is_profiler_enabled  # noqa: SLF001
    ):
        return True
    for x in tensors:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001
        if type(x) not in PLAIN or x.is_meta or wrapped(x):
            return True
    return False


class Operator:
    """An operator, `op`, and the plain `body` that runs in its place where nobody watches."""

    def __init__(
        self, body: Callable[..., Any], op: Any, mutates_args: Iterable[str], looks_at: int
    ) -> None:
        self.body, self.op, self.looks_at = body, op, looks_at
        parameters = list(inspect.signature(body).parameters)
        self.written = [parameters.index(argument) for argument in mutates_args]
        update_wrapper(self, body)

    def __call__(self, *arguments: Any) -> Any:
        """What the body returns; from the operator, empty tensors instead of None."""
        if is_watched(*arguments[: self.looks_at]):
            return self.op(*arguments)
        out = self.body(*arguments)
        for place in self.written:  # autograd hears of it, as from the operator
            torch.autograd.graph.increment_version(arguments[place])
        return out

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Give the operator its fake, which like the body may return None for a tensor."""
        self.op.register_fake(_filling(fake))
        return fake


def operator(
    name: str, *, mutates_args: Iterable[str], looks_at: int = 1, **options: Any
) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.custom_op`, left out where nobody watches.

    Args:
        name, mutates_args, options: as for `torch.library.custom_op`.
        looks_at: how many of the first arguments are tensors that somebody may be watching.
    """

    def wrap(body: Callable[..., Any]) -> Operator:
        op = torch.library.custom_op(name, _filling(body), mutates_args=mutates_args, **options)
        return Operator(body, op, mutates_args, looks_at)

    return wrap


def _filling(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body with empty tensors instead of None: an operator's schema has tensors only."""

    def filled(*arguments: Any) -> Any:
        out = body(*arguments)
        if not isinstance(out, tuple):
            return out
        return tuple(arguments[0].new_empty(0) if x is None else x for x in out)

    signature = inspect.signature(body, eval_str=True)
    returned = signature.return_annotation
    if returned not in (None, Tensor):  # a tuple, maybe with names
        number = len(getattr(returned, "_fields", get_args(returned)))
        returned = tuple[(Tensor,) * number]  # type: ignore[misc]
    filled.__signature__ = signature.replace(return_annotation=returned)  # type: ignore[attr-defined]
    return filled

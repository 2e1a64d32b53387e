"""Logits that are computed when they are first looked at: in evaluation often nobody does.

Trainer's `prediction_step` takes all values out of a model's output before it drops all but the
loss, so what waits must be the tensor itself and not the output's attribute.
"""

# ruff: noqa: SLF001  (of its own objects; PyTorch has no public names for subclasses without memory)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# What a model, or accelerate, does to all logits alike, without looking at them.
ALIKE = {
    "mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__",
    "tanh", "float", "to", "contiguous",
}  # fmt: skip
KNOWN = {  # without looking
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
MARKS = 64  # values of the weight by which a change is noticed

Step = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


class LateLogits(Tensor):
    """(..., V) logits of hidden states (..., D): a tensor for all that is done to it.

    While the model's forward runs it has one element, as the stand-in that it is; `whole` gives it
    the shape of the logits. No gradients.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    _steps: tuple[Step, ...]
    _autocast: tuple[bool, torch.dtype]
    _mark: Tensor
    _made: Tensor | None

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LateLogits:
        """The output of a linear head.

        Args:
            hidden: (..., D), not changed afterwards.
            weight, bias: (V, D) and (V,) or None.
        """
        device = hidden.device.type
        autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        mark = _marked(weight).clone()
        state = (hidden, weight.detach(), None if bias is None else bias.detach(), autocast, mark)
        return LateLogits._make(state, (), (1,) * hidden.dim())

    @staticmethod
    def _make(state: Any, steps: tuple[Step, ...], shape: tuple[int, ...]) -> LateLogits:
        like = _run(state, steps, state[0].new_empty(0, state[0].shape[-1]))
        late: LateLogits = Tensor._make_wrapper_subclass(
            LateLogits, shape, dtype=like.dtype, device=like.device
        )
        late.hidden, late.weight, late.bias, late._autocast, late._mark = state
        late._steps, late._made = steps, None
        return late

    @property
    def _state(self) -> Any:
        return self.hidden, self.weight, self.bias, self._autocast, self._mark

    def whole(self) -> LateLogits:
        """The same in its own shape."""
        return self._make(self._state, self._steps, (*self.hidden.shape[:-1], len(self.weight)))

    def rows(self, kept: Tensor) -> Tensor:
        """(M, V) the logits where `kept` (...) is true."""
        return _run(self._state, self._steps, self.hidden[kept])

    def _now(self) -> Tensor:
        """The logits, computed once."""
        if self._made is None:
            if not torch.equal(_marked(self.weight).nan_to_num(), self._mark.nan_to_num()):
                raise RuntimeError(
                    "sgp.huggingface: out.logits of an evaluation is computed when it is first "
                    "used, and the weight of the model's head has changed since; use the logits "
                    "(out.logits.detach()) before the weights change"
                )
            with torch.no_grad():
                self._made = _run(self._state, self._steps, self.hidden)
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is done to all logits alike; compute them for the rest."""
        del types
        kwargs = kwargs or {}
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if (
            getattr(func, "__name__", "") in ALIKE
            and len(found) == 1
            and found[0] is args[0]
            and found[0]._made is None
        ):
            step = (func, tuple(args[1:]), kwargs)
            return cls._make(found[0]._state, (*found[0]._steps, step), tuple(found[0].shape))
        return func(*_now(args), **_now(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches PyTorch's C++ directly, such as collectives."""
        del types
        return func(*_now(args), **_now(kwargs or {}))


def _now(tree: Any) -> Any:
    return tree_map(lambda x: x._now() if isinstance(x, LateLogits) else x, tree)


def _run(state: Any, steps: tuple[Step, ...], hidden: Tensor) -> Tensor:
    """What the head and the model make of hidden states."""
    _, weight, bias, (enabled, dtype), _ = state
    with torch.autocast(hidden.device.type, dtype=dtype, enabled=enabled):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        for func, args, kwargs in steps:
            logits = func(logits, *args, **kwargs)
    return logits


def _marked(weight: Tensor) -> Tensor:
    """A few values of a weight (V, D), from all over it."""
    V, D = weight.shape
    i = torch.arange(MARKS, device=weight.device)
    return weight.detach()[i * V // MARKS, i * 7 % D]

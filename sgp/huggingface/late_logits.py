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
CONSTANTS = (int, float, str, torch.dtype, torch.device, torch.memory_format, type(None))
MARKS = 64  # values of a tensor by which a change is noticed that autograd does not count

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
    _mark: tuple[Tensor, tuple[int | None, ...]]
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
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        state = (hidden, weight, bias, autocast, _marked(hidden, weight, bias))
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
            values, versions = _marked(self.hidden, self.weight, self.bias)
            before, counted = self._mark
            if versions != counted or not torch.equal(values.nan_to_num(), before.nan_to_num()):
                raise RuntimeError(
                    "sgp.huggingface: out.logits of an evaluation is computed when it is first "
                    "used, and the hidden states or the weights of the model's head have changed "
                    "since; use the logits (out.logits.detach()) before that"
                )
            # As without the patch: no inference tensor because it is first used in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                self._made = _run(self._state, self._steps, self.hidden)
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is done to all logits alike; compute them for the rest."""
        del types
        kwargs = kwargs or {}
        late, *others = args or (None,)
        if isinstance(late, LateLogits) and late._made is None:
            if func in KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if getattr(func, "__name__", "") in ALIKE and all(
                isinstance(x, CONSTANTS) for x in tree_leaves((others, kwargs))
            ):
                sample = torch.empty(0, dtype=late.dtype, device=late.device)
                if func(sample, *others, **kwargs) is sample:
                    return late  # as float() of what is float32
                step = (func, tuple(others), kwargs)
                return cls._make(late._state, (*late._steps, step), tuple(late.shape))
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


def _marked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[int | None, ...]]:
    """By what a change shows: a few values from all over a head, and how often each was written to.

    What is written through `.data` is not counted, nor is what inference mode has made.
    """
    V, D = weight.shape
    i = torch.arange(MARKS, device=weight.device)
    values = weight[i * V // MARKS, i * 7 % D]
    if bias is not None:
        values = torch.cat([values, bias[i * V // MARKS]])
    given = [x for x in (hidden, weight, bias) if x is not None]
    return values, tuple(None if x.is_inference() else x._version for x in given)

"""What a row's loss is made of, apart from its logits and target."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

LARGEST = int(sys.float_info.max)


class Recipe(NamedTuple):
    """The constants of a loss; the defaults are the plain negative log-likelihood."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    lse_square_scale: float = 0.0
    temperature: float = 1.0

    def check(self, name: str) -> Recipe:
        """Itself, with floats for other real numbers (NumPy's, fractions).

        Raises:
            ValueError, TypeError: where a constant has no meaning.
        """
        for label, value in zip(self._fields, self, strict=True):
            usual = (int,) if label == "ignore_index" else (float, int)
            if type(value) in usual:  # without a look at abstract base classes
                continue
            whole = label == "ignore_index"
            expected: Any = numbers.Integral if whole else numbers.Real
            if isinstance(value, bool) or not (
                isinstance(value, expected) or (label == "softcap" and value is None)
            ):
                kind = "a whole number" if whole else "a number"
                raise TypeError(f"{name}: {label} = {shown(value)}; expected {kind}")
        if not is_int64(self.ignore_index):
            raise ValueError(f"{name}: ignore_index = {self.ignore_index} is no int64")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"{name}: label_smoothing = {self.label_smoothing}; expected 0 to 1")
        if self.softcap is not None and not 0.0 < self.softcap < math.inf:
            raise ValueError(f"{name}: softcap = {self.softcap}; expected a number above 0 or None")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"{name}: temperature = {self.temperature}; expected a number above 0")
        for label, value in (
            ("logit_scale", self.logit_scale),
            ("lse_square_scale", self.lse_square_scale),
        ):
            if not -math.inf < value < math.inf:  # compiled, math.isfinite breaks the graph
                raise ValueError(f"{name}: {label} = {value}; expected a finite number")
        return self._plain(name)

    def _plain(self, name: str) -> Recipe:
        """The same with Python's own numbers: kernels and operators take no others."""
        if all(
            value is None or type(value) is float or (type(value) is int and is_int64(value))
            for value in self
        ):
            return self
        first, *others = self
        for label, value in zip(self._fields, self, strict=True):
            if isinstance(value, numbers.Integral) and not -LARGEST <= value <= LARGEST:
                raise ValueError(f"{name}: {label} is too large for a float")
        return Recipe(int(first), *(None if x is None else float(x) for x in others))  # type: ignore[arg-type]


class LossOptions(TypedDict, total=False):
    """The keywords that every form of the loss takes, for the types of its two results."""

    ignore_index: int | None
    reduction: str
    label_smoothing: float
    token_weight: Tensor | None
    denominator: float | Tensor | None
    softcap: float | None
    logit_scale: float
    lse_square_scale: float
    shift: bool | int


def is_int64(value: int) -> bool:
    """Whether tensors and operators can hold it."""
    return -(2**63) <= value < 2**63


def whole_number(name: str, label: str, value: Any, least: int) -> int:
    """A whole number, NumPy's too, of at least `least`, as an int.

    Raises:
        TypeError, ValueError: for anything else; with the value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: {label} = {shown(value)}; expected a whole number")
    if not is_int64(int(value)):
        raise ValueError(f"{name}: {label} = {value} is no int64")
    if value < least:
        raise ValueError(f"{name}: {label} = {value}; expected at least {least}")
    return int(value)


def shown(value: object) -> str:
    """A value for an error message: of a tensor its shape and dtype, not its numbers."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return repr(value)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which costs the host a microsecond even where nothing changes."""
    return x if x.dtype == dtype else x.to(dtype)


def score(logits: Tensor, recipe: Recipe) -> Tensor:
    """Stored logits -> scored logits: scale, then softcap; by differentiable operators."""
    scored = logits.to(accumulation_dtype(logits.dtype))
    if recipe.logit_scale != 1.0:
        scored = scored * recipe.logit_scale
    if recipe.softcap is not None:
        scored = recipe.softcap * torch.tanh(scored / recipe.softcap)
    return scored

"""What a row's loss is made of, apart from its logits and target."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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
            expected: Any = int if label == "ignore_index" else numbers.Real
            if isinstance(value, bool) or not (
                isinstance(value, expected) or (label == "softcap" and value is None)
            ):
                raise TypeError(f"{name}: {label} = {value!r}; expected a number")
        if not -(2**63) <= self.ignore_index < 2**63:
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
        return self._plain()

    def _plain(self) -> Recipe:
        """The same with Python's own numbers: kernels and operators take no others."""
        if all(value is None or type(value) in (float, int) for value in self):
            return self
        first, *others = self
        return Recipe(int(first), *(None if x is None else float(x) for x in others))  # type: ignore[arg-type]


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


def probability_rows(
    scored: Tensor, target: Tensor, weight: Tensor | None, recipe: Recipe
) -> Tensor:
    """(N,) losses of scored logits (N, V) against class probabilities (N, V), by PyTorch."""
    rows = F.cross_entropy(
        scored,
        target.to(scored.dtype),
        None if weight is None else weight.to(scored.dtype),
        reduction="none",
        label_smoothing=recipe.label_smoothing,
    )
    if recipe.lse_square_scale:
        rows = rows + recipe.lse_square_scale * scored.logsumexp(-1) ** 2
    return rows

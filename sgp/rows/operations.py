"""The row operations: what they are, and who does them on one device.

A row is what belongs to one token: its logits, a target, a loss. `by_torch` and `by_triton` have
the same two functions, `forward` and `backward`, and `sgp.parallel.rows` has them for logits of
which other ranks hold the rest. The linear head is handed one of them.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from sgp.rows import backend, by_torch, two_rows
from sgp.rows.by_torch import NOTHING, Columns, RowOutputs, Upstream
from sgp.rows.recipe import Recipe


class RowOperations(Protocol):
    """What a linear head does with the logits that it makes."""

    @property
    def name(self) -> str:
        """The function that was called, for messages."""

    @property
    def is_part(self) -> bool:
        """Whether the logits are some columns only, so that `start_sum` has something to add."""

    def vocabulary(self, columns: int) -> int:
        """V, of logits with so many columns."""

    def largest_part(self, columns: int) -> int:
        """The most columns that anyone has, where these have so many."""

    def forward(
        self,
        logits: Tensor,
        dlogits: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        out: RowOutputs,
        *,
        scratch: bool = False,
    ) -> None:
        """Fill `out` and, unless it is None, `dlogits` (see `by_torch`)."""

    def backward(
        self,
        logits: Tensor,
        dlogits: Tensor,
        target: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        row_weight: Tensor | None,
        recipe: Recipe,
        upstream: Upstream = NOTHING,
        columns: Columns | None = None,
    ) -> None:
        """Fill `dlogits` from what the forward saved (see `by_torch`)."""

    def at(self, part: slice, rows: Tensor) -> RowOperations:
        """Those of some kept rows, which are `rows` (m,) of all; they are of use to a teacher."""

    def two_rows(self, logits: Tensor) -> Any:
        """`forward` and `backward` of such logits and a teacher's (see `two_by_torch`)."""

    def start_sum(self, x: Tensor) -> Any:
        """Begin to add x up over who holds the other columns, in place; None: nothing to do."""

    def finish_sum(self, handle: Any) -> None:
        """Wait for what `start_sum` began."""


class OneDevice:
    """The row operations on whole rows: kernels or PyTorch's operators."""

    name = "sgp"
    is_part = False

    def vocabulary(self, columns: int) -> int:
        """All of them."""
        return columns

    largest_part = vocabulary

    def forward(self, logits: Tensor, *arguments: Any, scratch: bool = False) -> None:
        """As `by_torch.forward`."""
        implementation(logits).forward(logits, *arguments, scratch=scratch)

    def backward(self, logits: Tensor, *arguments: Any) -> None:
        """As `by_torch.backward`."""
        implementation(logits).backward(logits, *arguments)

    def at(self, *_: Any) -> RowOperations:
        """Itself: all rows are alike."""
        return self

    def two_rows(self, logits: Tensor) -> ModuleType:
        """The module that does them."""
        return two_rows.implementation(logits)

    def start_sum(self, _: Tensor) -> None:
        """Nobody else has a part."""

    def finish_sum(self, _: Any) -> None:
        """Nothing was begun."""


ONE_DEVICE = OneDevice()


def implementation(rows: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
    """The module, by_triton or by_torch, that does these rows."""
    if backend.choose(rows.device, dtype or rows.dtype) == "triton":
        return _kernels()
    return by_torch


@functools.cache
def _kernels() -> ModuleType:
    """`by_triton`, which imports Triton, at first use."""
    from sgp.rows import by_triton  # noqa: PLC0415

    return by_triton

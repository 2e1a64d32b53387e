"""The teacher's side of a head: its logits for the rows of a chunk, made when they are compared.

What a head does with its logits are row operations (`sgp.rows.operations`); with a teacher they are
those of two rows, and the teacher's logits, from its hidden states and its head, are one matmul
more. They have a buffer of their own, which is gone when the rows are done.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgp.head import products
from sgp.rows.by_torch import NOTHING, Columns, RowOutputs, Upstream, row_index
from sgp.rows.divergence import Divergence
from sgp.rows.operations import RowOperations
from sgp.rows.recipe import Recipe, cast
from sgp.rows.top_rows import Listed, top_rows
from sgp.rows.two_by_torch import Whose


class Teachers(NamedTuple):
    """Constants that a student's head is compared with; all empty for a loss without a teacher."""

    inputs: list[Tensor] = []  # noqa: RUF012  (never changed)  (..., D_t) hidden states of each
    weights: list[Tensor] = []  # noqa: RUF012  (V_t, D_t) of each
    biases: list[Tensor] = []  # noqa: RUF012  (V_t,) of each, or none at all
    indices: Tensor | None = None  # (M, K) of an `sgp.TopK`, and its other fields
    log_probs: Tensor | None = None
    valid: Tensor | None = None

    def are_there(self) -> bool:
        """Whether there is one."""
        return bool(self.inputs) or self.indices is not None

    def tensors(self) -> list[Tensor | None]:
        """All that there is to save for a backward; `again` puts them together."""
        if not self.are_there():
            return []
        return [*self[0], *self[1], *self[2], *self[3:]]

    def again(self, tensors: Sequence[Tensor | None]) -> Teachers:
        """The same of other `tensors`."""
        if not tensors:
            return NO_TEACHERS
        a = len(self.inputs)
        b, c = 2 * a, 2 * a + len(self.biases)
        inputs, weights, biases = (
            [x for x in part if x is not None] for part in (tensors[:a], tensors[a:b], tensors[b:c])
        )
        return Teachers(inputs, weights, biases, *tensors[c:])

    def emptied(self) -> Teachers:
        """As many, without memory."""
        return self.again([None if x is None else x.new_empty(0) for x in self.tensors()])

    def width(self) -> int:
        """D_t, or the largest; 0 without a head."""
        return max((x.shape[-1] for x in self.weights), default=0)


NO_TEACHERS = Teachers()


class TeacherRows:
    """Row operations on a student's logits that compare them with a teacher's.

    `at` says which kept rows the logits are of; before that nothing can be done.
    """

    def __init__(
        self,
        operations: RowOperations,
        teachers: Teachers,
        divergence: Divergence,
        ends: list[int],
        dtype: torch.dtype | None,
    ) -> None:
        """Of kept rows of which ends[i] are teacher i's or an earlier one's.

        `dtype` is what autocast makes of operands; None: it is off.
        """
        self.operations, self.teachers, self.divergence = operations, teachers, divergence
        self.name, self.is_part = operations.name, operations.is_part
        self.ends = ends
        self.weights = [cast(x, operand_dtype(x, dtype)) for x in teachers.weights]
        self.part = slice(0, 0)
        # The number of a teacher, its rows of the part, and their hidden states.
        self.hidden: list[tuple[int, slice, Tensor]] = []

    def vocabulary(self, columns: int) -> int:
        """As without a teacher."""
        return self.operations.vocabulary(columns)

    def largest_part(self, columns: int) -> int:
        """As without a teacher."""
        return self.operations.largest_part(columns)

    def at(self, part: slice, rows: Tensor) -> TeacherRows:
        """The same for these kept rows, which are `rows` (m,) of all."""
        found = copy.copy(self)
        found.part, found.hidden = part, []
        first, stop, start = part.start or 0, (part.start or 0) + len(rows), 0
        ends = self.ends or [stop]
        for number, (x, end) in enumerate(zip(self.teachers.inputs, ends, strict=False)):
            mine = slice(max(start, first) - first, max(0, min(end, stop) - first))
            if mine.start < mine.stop:
                whole = x if x.dim() > 1 else x[None]
                some = whole[row_index(whole, rows[mine])]
                found.hidden.append((number, mine, cast(some, self.weights[number].dtype)))
            start = end
        return found

    def forward(
        self,
        logits: Tensor,
        dlogits: Tensor | None,
        target: Tensor,
        weight: Tensor | None,  # noqa: ARG002  (there are no class weights)
        row_weight: Tensor | None,
        scale: Tensor | None,
        recipe: Recipe,
        out: RowOutputs,
        *,
        scratch: bool = False,  # noqa: ARG002
    ) -> None:
        """Fill `out` and, unless it is None, `dlogits`."""
        listed = self._listed()
        if listed is not None:
            top_rows(
                logits, dlogits, listed, target, row_weight, scale, recipe, self.divergence, out
            )
            return
        self.operations.two_rows(logits).forward(
            logits, self._logits(logits, None), dlogits, target, Whose(), row_weight, scale,
            recipe, self.divergence, out,
        )  # fmt: skip

    def backward(
        self,
        logits: Tensor,
        dlogits: Tensor,
        target: Tensor,
        saved: Tensor,
        weight: Tensor | None,  # noqa: ARG002
        row_weight: Tensor | None,
        recipe: Recipe,
        upstream: Upstream = NOTHING,  # noqa: ARG002  (of statistics, which have no gradient)
        columns: Columns | None = None,
    ) -> None:
        """Fill `dlogits` from what the forward saved."""
        listed = self._listed()
        if listed is not None:
            top_rows(
                logits, dlogits, listed, target, row_weight, None, recipe, self.divergence, None
            )
            return
        self.operations.two_rows(logits).backward(
            logits, self._logits(logits, columns), dlogits, target, Whose(), saved, row_weight,
            recipe, self.divergence, columns,
        )  # fmt: skip

    def two_rows(self, logits: Tensor) -> Any:
        """As without a teacher."""
        return self.operations.two_rows(logits)

    def start_sum(self, x: Tensor) -> Any:
        """As without a teacher."""
        return self.operations.start_sum(x)

    def finish_sum(self, handle: Any) -> None:
        """As without a teacher."""
        self.operations.finish_sum(handle)

    def _listed(self) -> Listed | None:
        t = self.teachers
        if t.indices is None or t.log_probs is None:
            return None
        return Listed(t.indices, t.log_probs, t.valid).part(self.part)

    def _logits(self, like: Tensor, columns: Columns | None) -> Tensor:
        """The teachers' logits of the same rows and columns, in the dtype of the student's."""
        out = torch.empty_like(like)
        first = 0 if columns is None else columns.first
        classes = slice(first, first + like.shape[1])
        for number, rows, hidden in self.hidden:
            bias = self.teachers.biases[number][classes] if self.teachers.biases else None
            products.logits(hidden, self.weights[number][classes], bias, out[rows])
        return out


def operand_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """An operand's, where autocast makes it `dtype` (float64 aside); None: it is off."""
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype

"""What one pass over a linear head is called with, and the gradients that it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgp.head import chunks
from sgp.head.chunks import Plan
from sgp.head.shape import OfTeachers, Shape
from sgp.head.teachers import NO_TEACHERS, Teachers, operand_dtype
from sgp.rows.by_torch import Wanted, row_index
from sgp.rows.divergence import Divergence
from sgp.rows.operations import RowOperations
from sgp.rows.recipe import Recipe, accumulation_dtype, cast


class Needs(NamedTuple):
    """Which gradients are wanted; what is not wanted is not computed."""

    input: bool = False
    weight: bool = False
    bias: bool = False


class HeadCall(NamedTuple):
    """What is no tensor in one pass over a head."""

    recipe: Recipe
    compute_dtype: torch.dtype  # of the matmuls' operands
    chunk_rows: int  # chunks.UNSET: by the plan
    needs: Needs  # of this pass
    wanted: Wanted = Wanted()  # of the rows' outputs
    wide: bool = False  # gradients in float32 although the operands are float16
    memory_budget: int = chunks.UNSET
    planned: Needs = Needs()  # of the whole call, forward and backward
    late: bool = False  # the call's gradients are made in backward
    scaled: bool = False  # the input's alone, which waits for an upstream gradient a row
    into: bool = False  # the weight's gradient is added to a tensor of the caller's
    name: str = "sgp"  # of the function that was called, for messages
    divergence: Divergence = Divergence()  # from a teacher
    classes: int = 0  # that student and teacher have; 0: all of the weight
    teacher_dtype: torch.dtype | None = None  # of its operands under autocast
    teacher_ends: list[int] = []  # noqa: RUF012  of kept rows that are in order of their teachers

    def name_of(self, operations: RowOperations) -> str:
        """The function, for messages about its targets."""
        return self.name if self.divergence.is_on() else operations.name

    @property
    def is_half(self) -> bool:
        """Whether the operands are float16, in which row factors must not be folded."""
        return self.compute_dtype == torch.float16


class LinearHead(NamedTuple):
    """Hidden states, the linear map to logits, and which rows it is applied to."""

    input: Tensor  # (..., D), any strides; leading dimensions flatten to N
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64: the kept rows, ascending or teacher after teacher, padded
    num_kept: Tensor  # () int64 on the CPU: how many they are

    def detached(self) -> LinearHead:
        """Without a graph behind it."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(input=self.input.detach(), weight=self.weight.detach(), bias=bias)


class Head(NamedTuple):
    """A linear head of which only the kept rows are left, and what is done with them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    rows: Tensor  # (M,), ascending or teacher after teacher
    class_weight: Tensor | None  # (V,)
    operations: RowOperations  # on rows of logits; target and class_weight are of all that it joins
    call: HeadCall
    into: Tensor | None = None  # (V, D) of the caller's, to which the weight's gradient is added
    teachers: Teachers = NO_TEACHERS
    padding: int = 0  # rows of the weight behind those that are used, whose gradient is zero

    def at(self, part: slice) -> RowOperations:
        """The row operations for some kept rows."""
        return self.operations.at(part, self.rows[part])

    @property
    def is_whole(self) -> bool:
        """Whether every row is kept, in order."""
        return self.rows.numel() == self.target.numel() and not self.call.teacher_ends

    @property
    def sums_dtype(self) -> torch.dtype:
        """Of logits and sums: float32, or float64."""
        return accumulation_dtype(self.call.compute_dtype)

    def plan(self, *, own: bool = False, least: int = 0) -> Plan:
        """In which pieces the logits are made.

        Args:
            own: whether a loss of the caller's stands between statistics and gradient.
            least: rows that it needs at once.
        """
        call = self.call
        V, D = self.weight.shape
        shape = Shape(
            M=self.rows.numel(),
            N=self.target.numel() + bool(call.teacher_ends),  # in another order, so never as is
            V=self.operations.largest_part(V),
            D=D,
            input_bytes=self.input.element_size(),
            weight_bytes=self.weight.element_size(),
            operand_bytes=call.compute_dtype.itemsize,
            input_grad=call.planned.input,
            weight_grad=call.planned.weight,
            late=call.late,
            scaled=call.scaled,
            is_half=call.is_half,
            wide=call.wide,
            into=call.into,
            own=own,
            teachers=_of_teachers(self.teachers, call),
            least=chunks.padded(min(least, self.rows.numel()), self.rows.numel()),
            is_cpu=not self.input.is_cuda,
            # Ranks plan alike, so as for one whose hidden states are strided and copied.
            is_contiguous=self.input.is_contiguous() and not self.operations.is_part,
        )
        return chunks.plan(
            call.name,
            shape,
            chunk_rows=call.chunk_rows,
            memory_budget=call.memory_budget,
        )

    def hidden(self, part: slice) -> Tensor:
        """Some kept rows (m, D) in the compute dtype; a copy where they are not used as they are.

        Rows that are not kept are not read.
        """
        x, D = self.input, self.input.shape[-1]
        if not x.is_contiguous():
            x = x[None] if x.dim() == 1 else x
            found = x[row_index(x, self.rows[part])]
        elif self.is_whole:
            found = x.view(-1, D)[part]
        else:
            found = x.view(-1, D).index_select(0, self.rows[part])
        return cast(found, self.call.compute_dtype)

    def of_rows(self, x: Tensor | None, part: slice = slice(None)) -> Tensor | None:
        """Numbers (N, ...) of some kept rows."""
        if x is None:
            return None
        return x[part] if self.is_whole else x.index_select(0, self.rows[part])


def _of_teachers(teachers: Teachers, call: HeadCall) -> OfTeachers:
    """What a plan has to know of them."""
    if teachers.indices is not None:
        own_sums = call.recipe.temperature != 1.0 and call.divergence.cross_entropy_weight > 0
        copies = (call.recipe.softcap is not None) + own_sums
        return OfTeachers(copies=copies, listed=teachers.indices.shape[1], is_listed=True)
    if not teachers.inputs:
        return OfTeachers()
    operands = [operand_dtype(x, call.teacher_dtype) for x in teachers.weights]
    copied = sum(
        x.numel() * dtype.itemsize
        for x, dtype in zip(teachers.weights, operands, strict=True)
        if dtype != x.dtype
    )
    return OfTeachers(1, teachers.width(), max(x.itemsize for x in operands), copied)


class Gradients(NamedTuple):
    """Gradients of a head; None where not wanted."""

    input: Tensor | None = None  # of input's shape
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V,)


def gradient_dtypes(
    head: Head | LinearHead, call: HeadCall
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Those of what the gradients belong to, or float32."""
    if call.wide:
        return (torch.float32,) * 3
    of_input, bias = head.input.dtype, head.bias
    return of_input, head.weight.dtype, of_input if bias is None else bias.dtype


def new_gradients(head: LinearHead, call: HeadCall) -> Gradients:
    """Uninitialised gradients, for tracing."""
    needs, (of_input, of_weight, of_bias) = call.needs, gradient_dtypes(head, call)
    return Gradients(
        new(head.input, needs.input, of_input),
        new(head.weight, needs.weight, of_weight),
        new(head.bias, needs.bias, of_bias),
    )


def new(
    x: Tensor | None, needed: bool, dtype: torch.dtype, *, zero: bool = False, padding: int = 0
) -> Tensor | None:
    """A contiguous tensor of x's shape and `padding` rows of zeros, where it is needed."""
    if x is None or not needed:
        return None
    if not padding:
        return x.new_zeros(x.shape, dtype=dtype) if zero else x.new_empty(x.shape, dtype=dtype)
    found = new(x[:1].expand(len(x) + padding, *x.shape[1:]), needed, dtype, zero=zero)
    assert found is not None, "it is needed"  # noqa: S101
    found[len(x) :] = 0
    return found

"""The sizes of a call of a linear head, from which its plan is made."""

from __future__ import annotations

from typing import NamedTuple


class OfTeachers(NamedTuple):
    """What a loss with a teacher takes more."""

    copies: int = 0  # of a chunk's logits: the teacher's, or what an `sgp.TopK` needs
    width: int = 0  # D_t, of the hidden states that the teacher's logits are made from
    operand_bytes: int = 0  # of an element of these, as operands
    copied: int = 0  # bytes of heads that autocast copies
    listed: int = 0  # K of an `sgp.TopK`
    is_listed: bool = False  # whether it is one, which goes by rows alone

    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return self.is_listed or self.width > 0


class Shape(NamedTuple):
    """What a plan is made from."""

    M: int  # kept rows
    N: int  # rows
    V: int  # classes; of a vocabulary split over ranks, those of the largest part
    D: int  # width
    input_bytes: int  # of an element of the hidden states, and of their gradient
    weight_bytes: int
    operand_bytes: int  # of the matmuls' operands; others than the weight's under autocast
    input_grad: bool
    weight_grad: bool
    late: bool = False  # gradients in backward, with an upstream gradient a row
    scaled: bool = False  # the input's alone, made in forward, times one a row in backward
    is_half: bool = False  # float16 operands: factors of rows wait outside, in float32
    wide: bool = False  # gradients in float32 although the weight is narrower
    into: bool = False  # the weight's gradient is added to a float32 tensor of the caller's
    own: bool = False  # a loss of the caller's stands between a chunk's statistics and its gradient
    least: int = 0  # rows that it needs in one chunk
    is_cpu: bool = False
    is_contiguous: bool = True  # the hidden states
    teachers: OfTeachers = OfTeachers()

    def sum_bytes(self) -> int:
        """Of an element of the logits and of every sum."""
        return max(4, self.operand_bytes)

    def row_bytes(self) -> int:
        """Of a row's logits and of what else has their size."""
        return self.sum_bytes() * self.V * (1 + self.teachers.copies)

    def is_narrow(self) -> bool:
        """Whether matmuls have 16-bit operands, and so the logits' gradient 16 bits."""
        return self.operand_bytes < 4

    def keeps_any(self) -> bool:
        """Whether the logits' gradient may be kept for rows of several chunks.

        The factors of float16 rows are known chunk by chunk where the caller's loss gives them.
        """
        return self.weight_grad and self.is_narrow() and not (self.own and self.is_half)

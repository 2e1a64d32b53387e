"""How a kernel addresses a matrix of logits, whatever its strides, without a copy.

Row ``i``, column ``j`` of a ``Matrix`` is the element at
``ptr + (i // inner) * outer_stride + (i % inner) * inner_stride + j * col_stride``.
Two levels of rows are what the field's views need: ``logits[:, :-1]`` keeps its batch stride, and
``(B, V, T)`` moved to ``(B, T, V)`` has a strided vocabulary. What needs three levels is copied.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A view (N, V) of logits or their gradient; strides in elements."""

    ptr: Any  # a tensor here, a pointer inside a kernel
    inner: int  # rows in a group; 1 where all rows are one stride apart
    outer_stride: int
    inner_stride: int
    col_stride: int  # 1 where the vocabulary is contiguous, which Triton then compiles in


def matrix(x: torch.Tensor) -> Matrix | None:
    """The addressing of x (..., V), or None where its leading dimensions need three levels."""
    if x.dim() == 2:
        rows, V = x.shape
        row_stride, col_stride = x.stride()
        return Matrix(x, 1, row_stride if rows > 1 else 0, 0, col_stride if V > 1 else 1)
    groups: list[list[int]] = []  # [size, stride], outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = [groups[-1][0] * size, stride]
        else:
            groups.append([size, stride])
    if len(groups) > 2:
        return None
    col_stride = 1 if x.shape[-1] <= 1 else x.stride(-1)
    if len(groups) == 2:
        return Matrix(x, groups[1][0], groups[0][1], groups[1][1], col_stride)
    return Matrix(x, 1, groups[0][1] if groups else 0, 0, col_stride)


def alignment(V: int, *matrices: Matrix | None) -> int:
    """The largest power of two up to 16 that divides V and every stride between rows.

    Triton infers alignment by 16 elements alone; 16-byte accesses need only 8 of bf16 or 4 of
    fp32, and vocabularies such as 50 264 have only 8.
    """
    sizes = [16, V]
    for m in matrices:
        if m is not None:
            sizes += [m.outer_stride, m.inner_stride]
    common = math.gcd(*sizes)
    return common & -common


@triton.jit
def aligned(x, ALIGN: tl.constexpr):
    # x itself, in a form from which the compiler can tell that ALIGN divides it. (A hint by
    # tl.multiple_of on a kernel's argument is lost: seen with Triton 3.9.)
    return x // ALIGN * ALIGN


@triton.jit
def row_pointer(m, i_row, ALIGN: tl.constexpr):
    """The first element of row i_row (int64)."""
    if m.inner == 1:
        o_row = i_row * m.outer_stride
    else:
        o_row = (i_row // m.inner) * m.outer_stride + (i_row % m.inner) * m.inner_stride
    return m.ptr + aligned(o_row, ALIGN)


@triton.jit
def column_offset(m, o_col):
    return o_col.to(tl.int64) * m.col_stride

"""Multiply a gradient by the upstream factor in place, and do nothing when the factor is 1.

The factor lives on the device and is compared there, so that the host never waits for it. Each
program reads 4 bytes and returns when they say 1, which is what `loss.backward()` passes. Rows
whose target is `ignore_index` are zero already and are not read, whatever the factor.
"""

import triton
import triton.language as tl

from sgp.kernels.layout import aligned, body, column_offset, edge_columns, row_pointer


@triton.jit
def multiply_block(p_block, m_col, f):
    b_g = tl.load(p_block, mask=m_col).to(tl.float32) * f
    tl.store(p_block, b_g.to(p_block.dtype.element_ty), mask=m_col)


@triton.jit
def multiply_rows(
    dlogits,  # Matrix (N, V) bf16 | fp32, read and written
    target,  # (N,) int64; None: no row is ignored
    factor,  # () fp32
    ignore_index,
    V,
    BV: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    f = tl.load(factor)
    if f != 1.0:
        kept = True
        if target is not None:
            kept = tl.load(target + i_row) != ignore_index
        if kept:
            p_g, before, columns = body(dlogits, i_row, V, ALIGN, VECTOR, EDGES)
            o_lane = tl.arange(0, BV)
            for k in range(tl.cdiv(columns, BV)):
                p_block = p_g + column_offset(dlogits, k * BV) + column_offset(dlogits, o_lane)
                multiply_block(p_block, o_lane < columns - k * BV, f)
            if EDGES:
                o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
                multiply_block(row_pointer(dlogits, i_row, 1) + o_col, m_col, f)

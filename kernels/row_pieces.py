"""Pieces of more than one row kernel: empty rows, class weights, the second loop, the target.

The gradient may be written into the storage of the logits it is made from, in their dtype or, where
the logits are float32 and the gradient is bf16 or fp16, into the first half of each row's own
storage (row stride 2 V). There a store reaches bytes that other threads of the program still have
to load, so barriers stand between loads and stores. Blocks ascend, and the store of columns
[i, i + BV) ends at byte 2 (i + BV), never past what the same block has loaded.

Gradients leave with `evict_first`: nobody reads them again here, and the L2 they would take is what
the second reading of a row lives from.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import coefficients, gradient
from sgp.kernels.layout import body, column_offset, edge_columns, row_pointer


@triton.jit
def zero_row(
    dlogits, i_row, V,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    p_row = row_pointer(dlogits, i_row, 1)
    p_body, before, columns = body(dlogits, i_row, V, ALIGN, VECTOR, EDGES)
    o_lane = tl.arange(0, BV)
    b_zero = tl.zeros([BV], dtype=p_row.dtype.element_ty)
    for k in range(tl.cdiv(columns, BV)):
        p_block = p_body + column_offset(dlogits, k * BV)
        tl.store(
            p_block + column_offset(dlogits, o_lane),
            b_zero,
            mask=o_lane < columns - k * BV,
            eviction_policy="evict_first",
        )
    if EDGES:
        o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
        b_zero = tl.zeros([LANES], dtype=p_row.dtype.element_ty)
        tl.store(p_row + o_col, b_zero, mask=m_col)


@triton.jit
def load_class_weight(o_col, m_col, opt):
    if opt.weight is not None:
        if opt.first is not None:
            o_col += opt.first
        return tl.load(opt.weight + o_col, mask=m_col, other=0.0)
    else:
        return 1.0


@triton.jit
def wait_for_loads(k, p_x, p_g):
    """A barrier before the stores of block k where the gradient is narrower than the logits.

    Once every thread has loaded blocks 0 to k, the stores of blocks up to 2 k + 1 reach nothing
    that is still to be loaded; so blocks 0, 2, 6, 14 and so on need one.
    """
    if p_x.dtype.element_ty != p_g.dtype.element_ty:
        if ((k + 2) & (k + 1)) == 0:
            tl.debug_barrier()


@triton.jit
def write_gradient(
    logits, dlogits, i_row, y, x_y, m_y, top, inv_d, so_d, r, w_y, w_mean, opt, V,
    BV: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    p_x, before, columns = body(logits, i_row, V, ALIGN, VECTOR, EDGES)
    p_g, _, _ = body(dlogits, i_row, V, ALIGN, VECTOR, EDGES)
    a, a_y, b_y, c_over_v, c_y, h, h_origin, l, c, rest = coefficients(  # noqa: E741
        i_row, top, inv_d, so_d, m_y, r, w_y, w_mean, V, opt
    )
    o_lane = tl.arange(0, BV)
    for k in range(tl.cdiv(columns, BV)):
        start = k * BV
        m_col = o_lane < columns - start
        b_x = tl.load(
            p_x + column_offset(logits, start) + column_offset(logits, o_lane),
            mask=m_col,
            eviction_policy="evict_first",
        )
        b_w = load_class_weight(before + start + o_lane, m_col, opt)
        b_g = gradient(b_x, l, c, rest, a, 0.0, c_over_v * b_w, h, h_origin, opt)
        wait_for_loads(k, p_x, p_g)
        tl.store(
            p_g + column_offset(dlogits, start) + column_offset(dlogits, o_lane),
            b_g.to(p_g.dtype.element_ty),
            mask=m_col,
            eviction_policy="evict_first",
        )
    p_row = row_pointer(dlogits, i_row, 1)
    if EDGES:
        o_col, m_col = edge_columns(before, columns, V, VECTOR, LANES)
        b_x = tl.load(row_pointer(logits, i_row, 1) + o_col, mask=m_col)
        b_w = load_class_weight(o_col, m_col, opt)
        b_g = gradient(b_x, l, c, rest, a, 0.0, c_over_v * b_w, h, h_origin, opt)
        tl.store(p_row + o_col, b_g.to(p_g.dtype.element_ty), mask=m_col)
    # The target's gradient, over what has been stored for its column, maybe by another thread.
    g_y = gradient(x_y, l, c, rest, a_y, b_y, c_y, h, h_origin, opt)
    tl.debug_barrier()
    p_y = p_row + column_offset(dlogits, y)
    if opt.first is None:
        tl.store(p_y, g_y.to(p_g.dtype.element_ty))
    else:  # another part of the row may have the target: y is -1
        tl.store(p_y, g_y.to(p_g.dtype.element_ty), mask=y >= 0)

"""Pieces of more than one row kernel: empty rows, class weights, the second loop, the target.

The gradient may be written into the storage of the logits it is made from, in their dtype or, where
the logits are float32 and the gradient is bf16 or fp16, into the first half of each row's own
storage (row stride 2 V). There a store reaches bytes that other threads of the program still have
to load, so a barrier stands between a block's loads and its stores. Blocks ascend, and the store
of columns [i, i + BV) ends at byte 2 (i + BV), never past what the same block has loaded.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import coefficients, gradient
from sgp.kernels.layout import column_offset, row_pointer


@triton.jit
def zero_row(dlogits, i_row, V, BV: tl.constexpr, ALIGN: tl.constexpr):
    p_row = row_pointer(dlogits, i_row, ALIGN)
    b_zero = tl.zeros([BV], dtype=p_row.dtype.element_ty)
    for start in range(0, V, BV):
        o_col = start + tl.arange(0, BV)
        tl.store(p_row + column_offset(dlogits, o_col), b_zero, mask=o_col < V)


@triton.jit
def load_class_weight(o_col, m_col, opt):
    if opt.weight is not None:
        return tl.load(opt.weight + o_col, mask=m_col, other=0.0)
    else:
        return 1.0


@triton.jit
def wait_for_loads(p_x, p_g):
    """A barrier where the gradient is narrower than the logits whose storage it may share."""
    if p_x.dtype.element_ty != p_g.dtype.element_ty:
        tl.debug_barrier()


@triton.jit
def store_target_gradient(dlogits, p_g, y, g_y, BV: tl.constexpr):
    """The target's gradient, over what has been stored for its column.

    By the same thread, as both stores have one layout; the barrier is for a compiler that gives
    them two. It is one of the program: the programs of a cluster share a block of BV columns in the
    same way at every store.
    """
    tl.debug_barrier()
    o_col = y // BV * BV + tl.arange(0, BV)
    b_g = tl.full([BV], g_y, tl.float32).to(p_g.dtype.element_ty)
    tl.store(p_g + column_offset(dlogits, o_col), b_g, mask=o_col == y)


@triton.jit
def write_gradient(
    logits, dlogits, i_row, y, x_y, m_y, top, inv_d, so_d, r, w_y, w_mean, opt, V,
    BV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    p_x = row_pointer(logits, i_row, ALIGN)
    p_g = row_pointer(dlogits, i_row, ALIGN)
    a, a_minus_b, b_so_d, c_over_v, h, h_origin = coefficients(
        i_row, top, inv_d, so_d, m_y, r, w_y, w_mean, V, opt
    )
    g_y = gradient(x_y, top, inv_d, a_minus_b, b_so_d, c_over_v * w_y, h, h_origin, opt)
    for start in range(0, V, BV):
        o_col = start + tl.arange(0, BV)
        m_col = o_col < V
        b_x = tl.load(
            p_x + column_offset(logits, o_col),
            mask=m_col,
            other=0.0,
            eviction_policy="evict_first",
        )
        b_w = load_class_weight(o_col, m_col, opt)
        b_g = gradient(b_x, top, inv_d, a, 0.0, c_over_v * b_w, h, h_origin, opt)
        wait_for_loads(p_x, p_g)
        tl.store(p_g + column_offset(dlogits, o_col), b_g.to(p_g.dtype.element_ty), mask=m_col)
    store_target_gradient(dlogits, p_g, y, g_y, BV)

"""Loss, statistics and gradient of a row in one launch, the whole row on chip, read once.

The same formulas as the streaming form (arithmetic.py) on one block that holds the row: each kept
logit is asked for once, `(1 + f) N V` elements with kept fraction f. The price: the row must fit
the registers of one program, so this is the form for vocabularies of a few thousand; the table in
launch.py says up to which size.
Rows whose target is `ignore_index` are not read; their gradient is written as zero.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    accumulate,
    coefficients,
    finish,
    finish_ignored,
    finite_or_zero,
    gradient,
    load_row_scalars,
    transform,
)
from sgp.kernels.layout import aligned, column_offset, row_pointer
from sgp.kernels.row_pieces import load_class_weight, wait_for_loads, zero_row


@triton.jit
def row_resident(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: loss and statistics only
    target,  # (N,) int64
    loss,  # (N,) fp32, written
    saved,  # (N, 3) fp32: max, 1/d, s_o/d, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    opt,  # Options
    ignore_index,
    V,
    BV: tl.constexpr,  # at least V
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    y = tl.load(target + i_row)
    if y == ignore_index:
        finish_ignored(i_row, loss, saved, stats)
        if dlogits is not None:
            zero_row(dlogits, i_row, V, BV, ALIGN)
    else:
        m_y = (y >= 0) & (y < V)
        i_y = tl.where(m_y, y, -1).to(tl.int32)
        o_col = tl.arange(0, BV)
        m_col = o_col < V
        p_x = row_pointer(logits, i_row, ALIGN)
        b_x = tl.load(p_x + column_offset(logits, o_col), mask=m_col, other=0.0)
        # The target's logit comes from the block: a second access would count at V = 1.
        x_y = tl.sum(tl.where(o_col == i_y, b_x.to(tl.float32), 0.0), 0)
        s_y = transform(tl.where(m_y, x_y, float("nan")), opt)
        reference = finite_or_zero(s_y)
        r, w_y, w_mean = load_row_scalars(i_row, i_y, m_y, opt)
        b_w = load_class_weight(o_col, m_col, opt)
        carry = (float("-inf"), 0.0, 0.0, 0.0)
        carry = accumulate(carry, b_x, o_col, m_col, i_y, reference, b_w, opt, stats is not None)
        top, inv_d, so_d = finish(
            carry, s_y, reference, r, w_y, w_mean, i_row, loss, saved, stats, V, opt
        )
        if dlogits is not None:
            a, a_minus_b, b_so_d, c_over_v, h, h_origin = coefficients(
                i_row, top, inv_d, so_d, m_y, r, w_y, w_mean, V, opt
            )
            b_g = gradient(
                b_x, o_col, i_y, top, inv_d, a, a_minus_b, b_so_d, c_over_v, h, h_origin, b_w, opt
            )
            p_g = row_pointer(dlogits, i_row, ALIGN)
            wait_for_loads(p_x, p_g)
            tl.store(p_g + column_offset(dlogits, o_col), b_g.to(p_g.dtype.element_ty), mask=m_col)

"""The streaming form of before: maximum and sums of every block meet over the whole program.

`row_streaming` does the same without barriers in its first loop. This form stays selectable
(SGP_ROW_FORM=blockwise); on an H200 it was slower at every size.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    NOWHERE,
    candidates,
    entropy_term,
    exp,
    finish,
    finish_ignored,
    finite_or_zero,
    leading,
    load_row_scalars,
    origin_of,
    rescaled,
    score,
    smoothing_term,
    transform,
)
from sgp.kernels.layout import aligned, column_offset, row_pointer
from sgp.kernels.row_pieces import load_class_weight, write_gradient, zero_row


@triton.jit
def accumulate(
    carry, b_x, o_col, m_col, y, reference, b_w, opt, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr
):  # fmt: skip
    """One block more into (max, s_o, t_o, k, argmax), the running statistics of a row."""
    top, s_o, t_o, k, i_top = carry
    b_s = score(b_x, m_col, opt)
    b_top = tl.max(b_s, 0)
    if ARGMAX:
        i_top = leading(top, i_top, b_top, tl.min(candidates(b_s, b_top, o_col), 0))
    top_new = tl.maximum(top, b_top)
    origin = origin_of(top_new, ENTROPY)
    b_z = b_s - origin
    b_e = tl.where(o_col == y, 0.0, exp(b_z))
    s_o, t_o = rescaled(top, s_o, t_o, origin, ENTROPY)
    s_o += tl.sum(b_e, 0)
    if ENTROPY:
        t_o += tl.sum(entropy_term(b_z, b_e), 0)
    if opt.label_smoothing is not None:
        k += tl.sum(smoothing_term(b_s, m_col, reference, b_w, opt), 0)
    return top_new, s_o, t_o, k, i_top


@triton.jit
def row_blockwise(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: loss and statistics only
    target,  # (N,) int64
    loss,  # (N,) fp32, written
    saved,  # (N, 3) fp32: max, 1/d, s_o/d, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    argmax,  # (N,) int64, written; None: not wanted, as it is where stats is None
    opt,  # Options
    ignore_index,
    V,
    BV: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    V = aligned(V, ALIGN)
    y = tl.load(target + i_row)
    if y == ignore_index:
        finish_ignored(i_row, loss, saved, stats, argmax)
        if dlogits is not None:
            zero_row(dlogits, i_row, V, BV, LANES, VECTOR, False, ALIGN)
    else:
        m_y = (y >= 0) & (y < V)
        i_y = tl.where(m_y, y, 0).to(tl.int32)
        p_x = row_pointer(logits, i_row, ALIGN)
        x_y = tl.load(p_x + column_offset(logits, i_y), mask=m_y, other=float("nan"))
        s_y = transform(x_y, opt)
        reference = finite_or_zero(s_y)
        r, w_y, w_mean = load_row_scalars(i_row, i_y, m_y, opt)
        carry = (float("-inf"), 0.0, 0.0, 0.0, NOWHERE)
        for start in range(0, V, BV):
            o_col = start + tl.arange(0, BV)
            m_col = o_col < V
            b_x = tl.load(
                p_x + column_offset(logits, o_col),
                mask=m_col,
                other=float("-inf"),
                eviction_policy="evict_last",
            )
            b_w = load_class_weight(o_col, m_col, opt)
            carry = accumulate(
                carry, b_x, o_col, m_col, i_y, reference, b_w, opt,
                stats is not None, argmax is not None,
            )  # fmt: skip
        top, inv_d, so_d = finish(
            carry, s_y, reference, r, w_y, w_mean, i_row, loss, saved, stats, argmax, V, opt
        )
        if dlogits is not None:
            write_gradient(
                logits, dlogits, i_row, i_y, x_y, m_y, top, inv_d, so_d, r, w_y, w_mean, opt, V,
                BV, LANES, VECTOR, False, ALIGN,
            )  # fmt: skip

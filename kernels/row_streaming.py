"""Loss, statistics and gradient of a row in one launch, the row streamed in blocks, read twice.

The first loop takes maximum and sums, the second writes the gradient while the row is still in L2;
the formulas are in arithmetic.py. The maximum is kept running (Milakov and Gimelshein 2018, Online
normalizer calculation for softmax). The choice: any vocabulary, any GPU, any option, no cluster.
The price: each kept logit is asked for twice, `(1 + 2 f) N V` elements with kept fraction f, of
which `(1 + f) N V` are distinct.
Rows whose target is `ignore_index` are not read; their gradient is written as zero.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import (
    accumulate,
    finish,
    finish_ignored,
    finite_or_zero,
    load_row_scalars,
    transform,
)
from sgp.kernels.layout import aligned, column_offset, row_pointer
from sgp.kernels.row_pieces import load_class_weight, write_gradient, zero_row


@triton.jit
def row_streaming(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`; None: loss and statistics only
    target,  # (N,) int64
    loss,  # (N,) fp32, written
    saved,  # (N, 3) fp32: max, 1/d, s_o/d, written; None: not wanted
    stats,  # Statistics, written; None: not wanted
    opt,  # Options
    ignore_index,
    V,
    BV: tl.constexpr,
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
        i_y = tl.where(m_y, y, 0).to(tl.int32)
        p_x = row_pointer(logits, i_row, ALIGN)
        x_y = tl.load(p_x + column_offset(logits, i_y), mask=m_y, other=float("nan"))
        s_y = transform(x_y, opt)
        reference = finite_or_zero(s_y)
        r, w_y, w_mean = load_row_scalars(i_row, i_y, m_y, opt)
        carry = (float("-inf"), 0.0, 0.0, 0.0)
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
                carry, b_x, o_col, m_col, i_y, reference, b_w, opt, stats is not None
            )
        top, inv_d, so_d = finish(
            carry, s_y, reference, r, w_y, w_mean, i_row, loss, saved, stats, V, opt
        )
        if dlogits is not None:
            write_gradient(
                logits,
                dlogits,
                i_row,
                i_y,
                x_y,
                m_y,
                top,
                inv_d,
                so_d,
                r,
                w_y,
                w_mean,
                opt,
                V,
                BV,
                ALIGN,
            )

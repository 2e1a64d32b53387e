"""What a mean is divided by, as a factor: 1 / sum over kept rows of their weights.

    scale = 1 / sum_i r_i w_{y_i} [y_i != ignored],   0 where the sum is 0

The row kernel needs it before it writes a gradient, so it is a launch of its own: one program that
reads the targets and their weights, `8 N` bytes and up to as many more. It adds in float64 and in a
fixed order, so that the same batch has the same divisor on every run.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])  # or each kind of batch size would be compiled
def mean_scale(
    target,  # (N,) int64
    weight,  # (V,) fp32: class weights w; None: all 1
    row_weight,  # (N,) fp32: r; None: all 1
    scale,  # () fp32, written
    ignore_index,
    N,
    V,
    BN: tl.constexpr,
):
    b_sum = tl.zeros([BN], tl.float64)
    for start in range(0, N, BN):
        o_row = start + tl.arange(0, BN)
        m_row = o_row < N
        b_y = tl.load(target + o_row, mask=m_row, other=0)
        m_kept = m_row & (b_y != ignore_index)
        b_weight = m_kept.to(tl.float64)
        if weight is not None:
            i_y = tl.minimum(tl.maximum(b_y, 0), V - 1)  # a bad target's loss is NaN anyway
            b_weight *= tl.load(weight + i_y, mask=m_kept, other=0.0).to(tl.float64)
        if row_weight is not None:
            b_weight *= tl.load(row_weight + o_row, mask=m_kept, other=0.0).to(tl.float64)
        b_sum += b_weight
    divisor = tl.sum(b_sum, 0)
    safe = tl.where(divisor == 0, 1.0, divisor)
    tl.store(scale, tl.where(divisor == 0, 0.0, 1.0 / safe).to(tl.float32))

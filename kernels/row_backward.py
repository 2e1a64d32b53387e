"""The gradient of a row from what the forward saved, where the upstream factor came later.

For upstream gradients that differ by row (`reduction="none"`, per-sequence losses,
log-probabilities with their entropy) and for float16, whose small gradients must not be rounded
before the loss scaler's factor is known. Reads each kept logit once, writes every gradient once:
`(1 + f) N V` elements. The row's own `(max, 1/d, s_o/d)` are saved, 12 bytes, never the log-sum-exp
alone: the third cannot be rebuilt from the others when the target's probability is near 1.
"""

import triton
import triton.language as tl

from sgp.kernels.arithmetic import load_row_scalars
from sgp.kernels.layout import aligned, column_offset, row_pointer
from sgp.kernels.row_pieces import write_gradient, zero_row


@triton.jit
def row_backward(
    logits,  # Matrix (N, V) bf16 | fp16 | fp32
    dlogits,  # Matrix (N, V), may be `logits`
    target,  # (N,) int64
    saved,  # (N, 3) fp32: max, 1/d, s_o/d
    opt,  # Options, the upstream gradient folded into row_weight
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
    y = tl.load(target + i_row)
    if y == ignore_index:
        zero_row(dlogits, i_row, V, BV, LANES, VECTOR, EDGES, ALIGN)
    else:
        p_x = row_pointer(logits, i_row, 1)
        if opt.first is None:
            m_y = (y >= 0) & (y < V)
            i_w = tl.where(m_y, y, 0).to(tl.int32)
            i_y = i_w
            x_y = tl.load(p_x + column_offset(logits, i_y), mask=m_y, other=float("nan"))
        else:  # some columns of a row: the target may be another one
            m_y = (y >= 0) & (y < opt.vocabulary)
            i_w = tl.where(m_y, y, 0).to(tl.int32)
            is_here = m_y & (y >= opt.first) & (y < opt.first + V)
            i_y = tl.where(is_here, i_w - opt.first, -1)
            x_y = tl.load(p_x + column_offset(logits, i_y), mask=is_here, other=0.0)
        tl.debug_barrier()  # in place, the block that holds the target is stored later
        top = tl.load(saved + 3 * i_row)
        inv_d = tl.load(saved + 3 * i_row + 1)
        so_d = tl.load(saved + 3 * i_row + 2)
        r, w_y, w_mean = load_row_scalars(i_row, i_w, m_y, opt)
        write_gradient(
            logits, dlogits, i_row, i_y, x_y, m_y, top, inv_d, so_d, r, w_y, w_mean, opt, V,
            BV, LANES, VECTOR, EDGES, ALIGN,
        )  # fmt: skip
